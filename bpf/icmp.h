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
