/* SPDX-License-Identifier: GPL-2.0-only
 *
 * ICMP and ICMPv6 errors about flows of ours. An error quotes the packet that it is about, as its sender saw it; turned
 * round, the quoted packet's tuple is the key of the entry for the answers, and the error travels as an answer would:
 *
 *     guest -> bridge:  unreachable, about  bridge:e -> guest:p           found under  guest:p -> bridge:e
 *     becomes
 *     ::1 -> ::1:       unreachable, about  ::1:e -> ::1:p                which leads to ::1:p -> ::1:e
 *
 * The quoted addresses are the outer ones the other way round. So one difference (csum_diff) serves the outer IP header,
 * the quoted one, the quoted checksum, and, for IPv6, the pseudo-header of the ICMP checksum.
 */
#pragma once

#include "ports.h"

#define ICMP_UNREACHABLE 3
#define ICMP_UNREACHABLE_TOO_BIG 4
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETER_PROBLEM 12
#define ICMP6_UNREACHABLE 1
#define ICMP6_TOO_BIG 2
#define ICMP6_PARAMETER_PROBLEM 4

enum {
	ERROR_NONE, /* not an error: echo, neighbour discovery */
	ERROR_REFUSED,
	ERROR_TOO_BIG,
	ERROR_OTHER
};

static inline int error_kind(__u8 family, __u8 type, __u8 code)
{
	if (family == 4) {
		if (type == ICMP_UNREACHABLE)
			return code == ICMP_UNREACHABLE_TOO_BIG ? ERROR_TOO_BIG : ERROR_REFUSED;
		return type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETER_PROBLEM ? ERROR_OTHER : ERROR_NONE;
	}
	if (type == ICMP6_UNREACHABLE)
		return ERROR_REFUSED;
	if (type == ICMP6_TOO_BIG)
		return ERROR_TOO_BIG;
	return type <= ICMP6_PARAMETER_PROBLEM ? ERROR_OTHER : ERROR_NONE;
}

struct quoted {
	__u32 l3, l4, csum; /* offsets in the frame */
	__u16 ip_csum;
};

/* Read the quoted packet; its tuple, turned round, goes to `key`. 0, or -1: it is not whole, or none of ours. */
static inline int read_quoted(struct hook *h, struct quoted *q, struct flow_key *key)
{
	__u16 ports[2];

	q->l3 = h->p->l4 + 8;
	key->ifindex = h->p->key.ifindex;
	key->family = h->p->key.family;
	key->row = ROW_PACKETS;
	if (key->family == 4) {
		struct iphdr *ip = (void *)h->scratch->bytes;

		if (bpf_skb_load_bytes(h->skb, q->l3, ip, sizeof(*ip)) < 0 || ip->version != 4 || ip->ihl < 5 ||
		    ip->frag_off & be16(IPV4_OFFSET))
			return -1;
		key->proto = ip->protocol;
		set_ipv4(&key->saddr, ip->daddr);
		set_ipv4(&key->daddr, ip->saddr);
		q->ip_csum = ip->check;
		q->l4 = q->l3 + ip->ihl * 4;
	} else {
		struct ipv6hdr *ip = (void *)h->scratch->bytes;

		if (bpf_skb_load_bytes(h->skb, q->l3, ip, sizeof(*ip)) < 0 || ip->version != 6)
			return -1;
		key->proto = ip->nexthdr;
		__builtin_memcpy(&key->saddr, &ip->daddr, sizeof(key->saddr));
		__builtin_memcpy(&key->daddr, &ip->saddr, sizeof(key->daddr));
		q->l4 = q->l3 + sizeof(*ip);
	}
	if (key->proto != IPPROTO_TCP && key->proto != IPPROTO_UDP)
		return -1;
	if (bpf_skb_load_bytes(h->skb, q->l4, ports, sizeof(ports)) < 0)
		return -1;
	key->sport = ports[1];
	key->dport = ports[0];
	q->csum = q->l4 + (key->proto == IPPROTO_TCP ? 16 : 6);
	return 0;
}

static inline __u32 csum_swap(__u32 old, __u32 new)
{
	__u64 sum = (__u64)(__u32)~old + new;

	return (sum & 0xffffffff) + (sum >> 32);
}

static inline __u32 csum_sum(__u32 a, __u32 b)
{
	__u64 sum = (__u64)a + b;

	return (sum & 0xffffffff) + (sum >> 32);
}

/* The quoted packet as the other side knows it. *diff: by how much the sum over the ICMP message changes. */
static inline int rewrite_quoted(struct hook *h, struct quoted *q, struct flow *f, __u32 *diff)
{
	__u32 old_ports = both_ports(h->p->key.dport, h->p->key.sport), ports = both_ports(f->dport, f->sport);
	__u32 inner = csum_sum(f->csum_diff, csum_swap(old_ports, ports));
	__u16 csum, new_csum;
	int failed;

	*diff = inner;
	/* An error quotes as much as its sender likes: TCP's checksum may be beyond the end. */
	if (!bpf_skb_load_bytes(h->skb, q->csum, &csum, sizeof(csum)) && (csum || h->p->key.proto == IPPROTO_TCP)) {
		new_csum = adjust_csum(csum, inner);
		*diff = csum_sum(*diff, csum_swap(csum, new_csum));
		if (bpf_skb_store_bytes(h->skb, q->csum, &new_csum, sizeof(new_csum), 0))
			return -1;
	}
	if (h->p->key.family == 4) {
		struct ipv4_tail ip = {
			.csum = adjust_csum(q->ip_csum, f->csum_diff),
			.saddr = f->daddr.word[3],
			.daddr = f->saddr.word[3],
		};

		*diff = csum_sum(*diff, csum_swap(q->ip_csum, ip.csum));
		failed = bpf_skb_store_bytes(h->skb, q->l3 + 10, &ip, sizeof(ip), 0);
	} else {
		failed = bpf_skb_store_bytes(h->skb, q->l3 + 8, &f->daddr, sizeof(f->daddr), 0);
		failed |= bpf_skb_store_bytes(h->skb, q->l3 + 24, &f->saddr, sizeof(f->saddr), 0);
	}
	return failed | bpf_skb_store_bytes(h->skb, q->l4, &ports, sizeof(ports), 0);
}

/* The next datagram of the flow is decided anew: who refused may have gone. h->p->key is the entry's. */
static inline void mark_refused(struct hook *h, struct flow *f)
{
	struct flow *twin;

	if (h->p->key.proto != IPPROTO_UDP)
		return; /* TCP treats these errors as passing trouble (RFC 1122, 4.2.3.9), and so do we */
	f->seen |= SEEN_RST;
	if (f->role != FLOW_REVERSE)
		return;
	if (h->p->key.ifindex != LO_IFINDEX)
		forget_owner(h->p);
	reverse_key(&h->scratch->twin, &h->p->key, f);
	twin = bpf_map_lookup_elem(h->flows, &h->scratch->twin);
	if (twin)
		twin->seen |= SEEN_RST;
}

/* An ICMP message, from a guest or from the pod's own stack: a verdict. */
static inline int forward_error(struct hook *h)
{
	struct flow_key *key = &h->scratch->key;
	struct packet *p = h->p;
	struct quoted q = {};
	struct flow *f;
	__u8 head[2];
	__u32 diff;
	int kind;

	if (bpf_skb_load_bytes(h->skb, p->l4, head, sizeof(head)) < 0)
		return TC_ACT_UNSPEC;
	kind = error_kind(p->key.family, head[0], head[1]);
	if (kind == ERROR_NONE || read_quoted(h, &q, key))
		return TC_ACT_UNSPEC;
	f = bpf_map_lookup_elem(h->flows, key);
	if (!f || !same_addr(&key->saddr, &p->key.saddr) || !same_addr(&key->daddr, &p->key.daddr))
		return TC_ACT_UNSPEC;
	/* `lo` has one path MTU for all: nobody in the pod would get more than the guest's through it for ten minutes. */
	if (kind == ERROR_TOO_BIG && f->ifindex == LO_IFINDEX)
		return count_drop(p->pod_id, DROP_PATH_MTU);
	p->key = *key;
	if (kind == ERROR_REFUSED) {
		if (f->role == FLOW_CANDIDATE && !is_last_refusal(h, f))
			return count_drop(p->pod_id, DROP_REFUSED_BY_SOME);
		mark_refused(h, f);
	}
	if (rewrite_quoted(h, &q, f, &diff) || bpf_l4_csum_replace(h->skb, p->l4 + 2, 0, diff, 0) ||
	    (p->key.family == 6 && bpf_l4_csum_replace(h->skb, p->l4 + 2, 0, f->csum_diff, BPF_F_PSEUDO_HDR)) ||
	    store_addrs(h->skb, p, f))
		return count_drop(p->pod_id, DROP_REWRITE_FAILED);
	return redirect(p->pod_id, f);
}

/* --- too big ---------------------------------------------------------------------------------------------------- */

/* `lo` lets datagrams of 64 KiB pass, a guest's network does not. The sender is told as a router on the way would tell
 * it (RFC 1191, RFC 8201), in the place of its own packet, and gets EMSGSIZE. But not the true MTU: the kernel would note
 * it for 127.0.0.1 itself, and for ten minutes the whole pod's loopback would run at a guest's packet size. What it is
 * told is what `lo` has anyway, which changes nothing (net/ipv4/route.c, __ip_rt_update_pmtu; net/ipv6/route.c). */
#define LO_MTU_IPV4 65535
#define LO_MTU_IPV6 65536

struct too_big_ipv4 {
	struct iphdr ip;
	__u8 type, code;
	__u16 csum, unused, mtu;
	struct iphdr quoted;
	__u8 udp[8];
};
_Static_assert(sizeof(struct too_big_ipv4) == 56, "too_big_ipv4");

struct too_big_ipv6 {
	struct ipv6hdr ip;
	__u8 type, code;
	__u16 csum;
	__u32 mtu;
	struct ipv6hdr quoted;
	__u8 udp[8];
};
_Static_assert(sizeof(struct too_big_ipv6) == 96, "too_big_ipv6");

static inline __u16 fold_csum(__u32 sum)
{
	return adjust_csum(0xffff, sum);
}

static inline int build_too_big_ipv4(struct __sk_buff *skb, struct packet *p, struct too_big_ipv4 *m)
{
	if (p->l4 != L3 + sizeof(struct iphdr) ||
	    bpf_skb_load_bytes(skb, L3, &m->quoted, sizeof(m->quoted) + sizeof(m->udp)) < 0)
		return -1;
	m->ip = (struct iphdr){.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_ICMP};
	m->ip.tot_len = be16(sizeof(*m));
	m->ip.saddr = m->quoted.daddr;
	m->ip.daddr = m->quoted.saddr;
	m->ip.check = fold_csum(bpf_csum_diff(0, 0, (void *)&m->ip, sizeof(m->ip), 0));
	m->type = ICMP_UNREACHABLE;
	m->code = ICMP_UNREACHABLE_TOO_BIG;
	m->csum = 0;
	m->unused = 0;
	m->mtu = be16(LO_MTU_IPV4);
	m->csum = fold_csum(bpf_csum_diff(0, 0, (void *)&m->type, sizeof(*m) - sizeof(m->ip), 0));
	return bpf_skb_change_tail(skb, L3 + sizeof(*m), 0) || bpf_skb_store_bytes(skb, L3, m, sizeof(*m), 0);
}

static inline int build_too_big_ipv6(struct __sk_buff *skb, struct packet *p, struct too_big_ipv6 *m)
{
	__u32 pseudo[2] = {be32(sizeof(*m) - sizeof(m->ip)), be32(IPPROTO_ICMPV6)};
	__u32 sum;

	if (bpf_skb_load_bytes(skb, L3, &m->quoted, sizeof(m->quoted) + sizeof(m->udp)) < 0)
		return -1;
	m->ip = (struct ipv6hdr){.version = 6, .hop_limit = 64, .nexthdr = IPPROTO_ICMPV6};
	m->ip.payload_len = be16(sizeof(*m) - sizeof(m->ip));
	m->ip.saddr = m->quoted.daddr;
	m->ip.daddr = m->quoted.saddr;
	m->type = ICMP6_TOO_BIG;
	m->code = 0;
	m->csum = 0;
	m->mtu = be32(LO_MTU_IPV6);
	sum = bpf_csum_diff(0, 0, (void *)&m->ip.saddr, 2 * sizeof(struct addr), 0);
	sum = bpf_csum_diff(0, 0, (void *)pseudo, sizeof(pseudo), sum);
	m->csum = fold_csum(bpf_csum_diff(0, 0, (void *)&m->type, sizeof(*m) - sizeof(m->ip), sum));
	return bpf_skb_change_tail(skb, L3 + sizeof(*m), 0) || bpf_skb_store_bytes(skb, L3, m, sizeof(*m), 0);
}

/* A packet that does not fit where it is to go is counted, and turned into the answer if a container sent it. TCP never
 * comes here: it goes by the guest's MSS. */
static inline int too_big(struct __sk_buff *skb, struct packet *p)
{
	struct scratch *s;
	int zero = 0, failed;

	count_drop(p->pod_id, DROP_TOO_BIG);
	s = scratch.lookup(&zero);
	if (!s || p->key.ifindex != LO_IFINDEX || p->key.proto != IPPROTO_UDP)
		return TC_ACT_SHOT;
	if (p->key.family == 4)
		failed = build_too_big_ipv4(skb, p, (void *)s->bytes);
	else
		failed = build_too_big_ipv6(skb, p, (void *)s->bytes);
	return failed ? TC_ACT_SHOT : bpf_redirect(LO_IFINDEX, BPF_F_INGRESS);
}
