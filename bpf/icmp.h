/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * ICMP and ICMPv6 errors about flows of ours. An error quotes the packet that it is about, as its sender saw it; turned
 * round, the quoted packet's tuple is the key of the entry for the answers, and the error travels as an answer would:
 *
 *     guest -> bridge:  unreachable, about  bridge:e -> guest:p           found under  guest:p -> bridge:e
 *     becomes
 *     ::1 -> ::1:       unreachable, about  ::1:e -> ::1:p                which leads to ::1:p -> ::1:e
 *
 * The error is not translated piece by piece but written anew, in the IP version of whom it goes to: what it says, and of
 * the quoted packet the IP header and the eight bytes that RFC 792 asks for.
 */
#pragma once

#include "fragments.h"
#include "ports.h"

#define ICMP_UNREACHABLE 3
#define ICMP_UNREACHABLE_HOST 1
#define ICMP_UNREACHABLE_PORT 3
#define ICMP_UNREACHABLE_TOO_BIG 4
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETER_PROBLEM 12
#define ICMP6_UNREACHABLE 1
#define ICMP6_UNREACHABLE_PORT 4
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

/* --- building one ----------------------------------------------------------------------------------------------- */

struct error_ipv4 {
	struct iphdr ip;
	__u8 type, code;
	__u16 csum;
	__u32 rest;
	struct iphdr quoted;
	__u32 l4[2];
};
_Static_assert(sizeof(struct error_ipv4) == 56, "error_ipv4");

struct error_ipv6 {
	struct ipv6hdr ip;
	__u8 type, code;
	__u16 csum;
	__u32 rest;
	struct ipv6hdr quoted;
	__u32 l4[2];
};
_Static_assert(sizeof(struct error_ipv6) == 96, "error_ipv6");

/* What an error says, and of which packet: its addresses are the error's own the other way round. */
struct error {
	__u8 family, type, code, proto;
	__u16 length; /* of the quoted packet, from its IP header on */
	__u32 rest;   /* the ICMP header's last four bytes; network order */
	__u32 l4[2];  /* how the quoted packet goes on: ports, and TCP's sequence number, which its sender checks */
	const struct addr *saddr, *daddr;
};

static inline __u16 fold_csum(__u32 sum)
{
	return adjust_csum(0xffff, sum);
}

static inline void build_ipv4(struct error_ipv4 *m, const struct error *e)
{
	m->ip = (struct iphdr){.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_ICMP};
	m->ip.tot_len = be16(sizeof(*m));
	m->ip.saddr = e->saddr->word[3];
	m->ip.daddr = e->daddr->word[3];
	m->ip.check = fold_csum(bpf_csum_diff(0, 0, (void *)&m->ip, sizeof(m->ip), 0));
	m->quoted = (struct iphdr){.version = 4, .ihl = 5, .ttl = 64, .protocol = e->proto};
	m->quoted.tot_len = be16(e->length);
	m->quoted.frag_off = be16(0x4000); /* DF */
	m->quoted.saddr = e->daddr->word[3];
	m->quoted.daddr = e->saddr->word[3];
	m->quoted.check = fold_csum(bpf_csum_diff(0, 0, (void *)&m->quoted, sizeof(m->quoted), 0));
	m->type = e->type;
	m->code = e->code;
	m->csum = 0;
	m->rest = e->rest;
	m->l4[0] = e->l4[0];
	m->l4[1] = e->l4[1];
	m->csum = fold_csum(bpf_csum_diff(0, 0, (void *)&m->type, sizeof(*m) - sizeof(m->ip), 0));
}

static inline void build_ipv6(struct error_ipv6 *m, const struct error *e)
{
	__u32 pseudo[2] = {be32(sizeof(*m) - sizeof(m->ip)), be32(IPPROTO_ICMPV6)};
	__u32 sum;

	m->ip = (struct ipv6hdr){.version = 6, .hop_limit = 64, .nexthdr = IPPROTO_ICMPV6};
	m->ip.payload_len = be16(sizeof(*m) - sizeof(m->ip));
	__builtin_memcpy(&m->ip.saddr, e->saddr, sizeof(*e->saddr));
	__builtin_memcpy(&m->ip.daddr, e->daddr, sizeof(*e->daddr));
	m->quoted = (struct ipv6hdr){.version = 6, .hop_limit = 64, .nexthdr = e->proto};
	m->quoted.payload_len = be16(e->length - sizeof(m->quoted));
	__builtin_memcpy(&m->quoted.saddr, e->daddr, sizeof(*e->daddr));
	__builtin_memcpy(&m->quoted.daddr, e->saddr, sizeof(*e->saddr));
	m->type = e->type;
	m->code = e->code;
	m->csum = 0;
	m->rest = e->rest;
	m->l4[0] = e->l4[0];
	m->l4[1] = e->l4[1];
	sum = bpf_csum_diff(0, 0, (void *)&m->ip.saddr, 2 * sizeof(struct addr), 0);
	sum = bpf_csum_diff(0, 0, (void *)pseudo, sizeof(pseudo), sum);
	m->csum = fold_csum(bpf_csum_diff(0, 0, (void *)&m->type, sizeof(*m) - sizeof(m->ip), sum));
}

/* The packet becomes the error. MACs are the caller's to set. 0, or negative. */
static inline int become_error(struct hook *h, const struct error *e)
{
	__u16 ethertype = e->family == 4 ? be16(ETH_P_IP) : be16(ETH_P_IPV6);
	__u32 size;

	if (e->family != h->p->key.family && bpf_skb_change_proto(h->skb, ethertype, 0))
		return -1;
	if (e->family == 4) {
		size = sizeof(struct error_ipv4);
		build_ipv4((void *)h->scratch->bytes, e);
	} else {
		size = sizeof(struct error_ipv6);
		build_ipv6((void *)h->scratch->bytes, e);
	}
	return bpf_skb_change_tail(h->skb, L3 + size, 0) || bpf_skb_store_bytes(h->skb, L3, h->scratch->bytes, size, 0) ||
	       bpf_skb_store_bytes(h->skb, 2 * ETH_ALEN, &ethertype, sizeof(ethertype), 0);
}

/* --- passing one on --------------------------------------------------------------------------------------------- */

/* Read the quoted packet; its tuple, turned round, goes to `key`. 0, or -1: it is not whole, or none of ours. */
static inline int read_quoted(struct hook *h, struct error *e, struct flow_key *key)
{
	__u32 l3 = h->p->l4 + 8, l4;

	key->ifindex = h->p->key.ifindex;
	key->family = h->p->key.family;
	key->row = ROW_PACKETS;
	if (key->family == 4) {
		struct iphdr *ip = (void *)h->scratch->bytes;

		if (bpf_skb_load_bytes(h->skb, l3, ip, sizeof(*ip)) < 0 || ip->version != 4 || ip->ihl < 5 ||
		    ip->frag_off & be16(IPV4_OFFSET))
			return -1;
		key->proto = ip->protocol;
		set_ipv4(&key->saddr, ip->daddr);
		set_ipv4(&key->daddr, ip->saddr);
		e->length = be16(ip->tot_len);
		l4 = l3 + ip->ihl * 4;
	} else {
		struct ipv6hdr *ip = (void *)h->scratch->bytes;

		if (bpf_skb_load_bytes(h->skb, l3, ip, sizeof(*ip)) < 0 || ip->version != 6)
			return -1;
		key->proto = ip->nexthdr;
		__builtin_memcpy(&key->saddr, &ip->daddr, sizeof(key->saddr));
		__builtin_memcpy(&key->daddr, &ip->saddr, sizeof(key->daddr));
		e->length = be16(ip->payload_len) + sizeof(*ip);
		l4 = l3 + sizeof(*ip);
	}
	if (key->proto != IPPROTO_TCP && key->proto != IPPROTO_UDP)
		return -1;
	if (bpf_skb_load_bytes(h->skb, l4, e->l4, sizeof(e->l4)) < 0)
		return -1;
	key->sport = ((__u16 *)e->l4)[1];
	key->dport = ((__u16 *)e->l4)[0];
	e->proto = key->proto;
	return 0;
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
	if (h->self)
		forget_owner(h->p, f);
	reverse_key(&h->scratch->twin, &h->p->key, f);
	twin = bpf_map_lookup_elem(h->flows, &h->scratch->twin);
	if (twin)
		twin->seen |= SEEN_RST;
}

/* The same error in the other IP version's words: RFC 7915, 4.2 and 5.2. 0, or -1: it has none. */
static inline int translate_error(struct error *e, int kind, __u8 family)
{
	int is_port = e->type == (family == 4 ? ICMP_UNREACHABLE : ICMP6_UNREACHABLE) &&
		      e->code == (family == 4 ? ICMP_UNREACHABLE_PORT : ICMP6_UNREACHABLE_PORT);

	e->length += e->family == 6 ? sizeof(struct ipv6hdr) - sizeof(struct iphdr) :
				      sizeof(struct iphdr) - sizeof(struct ipv6hdr);
	if (kind == ERROR_REFUSED && e->family == 6) {
		e->type = ICMP6_UNREACHABLE;
		e->code = is_port ? ICMP6_UNREACHABLE_PORT : 0;
		e->rest = 0;
	} else if (kind == ERROR_REFUSED) {
		e->type = ICMP_UNREACHABLE;
		e->code = is_port ? ICMP_UNREACHABLE_PORT : ICMP_UNREACHABLE_HOST;
		e->rest = 0;
	} else {
		return -1;
	}
	return 0;
}

/* An ICMP message, from a guest, from the pod's own stack or from outside: a verdict. */
static inline int forward_error(struct hook *h)
{
	struct flow_key *key = &h->scratch->key;
	struct packet *p = h->p;
	struct error e = {};
	struct flow *f;
	__u8 family = p->key.family;
	int kind;

	if (bpf_skb_load_bytes(h->skb, p->l4, h->scratch->bytes, 8) < 0)
		return TC_ACT_UNSPEC;
	e.type = h->scratch->bytes[0];
	e.code = h->scratch->bytes[1];
	e.rest = *(__u32 *)&h->scratch->bytes[4];
	kind = error_kind(family, e.type, e.code);
	if (kind == ERROR_NONE || read_quoted(h, &e, key))
		return TC_ACT_UNSPEC;
	f = bpf_map_lookup_elem(h->flows, key);
	if (!f || !same_addr(&key->daddr, &p->key.daddr))
		return TC_ACT_UNSPEC;
	/* Nobody but who is spoken to may say so; outside, whoever is on the way. */
	if (!same_addr(&key->saddr, &p->key.saddr) && !is_from_outside(h))
		return TC_ACT_UNSPEC;
	/* `lo` has one path MTU for all: nobody in the pod would get more than the guest's through it for ten minutes. */
	if (kind == ERROR_TOO_BIG && f->ifindex == LO_IFINDEX)
		return count_drop(p, DROP_PATH_MTU);
	e.family = f->family;
	if (f->family != family && translate_error(&e, kind, family))
		return count_drop(p, DROP_UNTRANSLATABLE);
	p->key = *key;
	if (kind == ERROR_REFUSED) {
		if (f->role == FLOW_CANDIDATE && !is_last_refusal(h, f))
			return count_drop(p, DROP_REFUSED_BY_SOME);
		mark_refused(h, f);
	}
	e.l4[0] = both_ports(f->dport, f->sport);
	e.saddr = &f->saddr;
	e.daddr = &f->daddr;
	if (become_error(h, &e) || bpf_skb_store_bytes(h->skb, 0, f->dmac, 2 * ETH_ALEN, 0))
		return count_drop(p, DROP_REWRITE_FAILED);
	return redirect(p->pod_id, f);
}

/* --- too big ---------------------------------------------------------------------------------------------------- */

/* `lo` lets datagrams of 64 KiB pass, a guest's network does not. The sender is told as a router on the way would tell
 * it (RFC 1191, RFC 8201), in the place of its own packet, and gets EMSGSIZE. But not the true MTU: the kernel would note
 * it for 127.0.0.1 itself, and for ten minutes the whole pod's loopback would run at a guest's packet size. What it is
 * told is what its link has anyway, which changes nothing (net/ipv4/route.c, __ip_rt_update_pmtu; net/ipv6/route.c); and
 * likewise a guest, whose way to other guests is wider. Outside there is one way, and the truth. */
static inline __u32 told_mtu(struct hook *h, struct flow *f)
{
	if (h->self)
		return h->self->mtu;
	if (is_from_outside(h))
		return f->mtu;
	return h->p->key.family == 4 ? LO_MTU : LO_MTU + 1;
}

/* A packet that does not fit where it is to go is counted, and turned into the answer to its sender. TCP hardly comes
 * here: it goes by the guest's MSS. */
static inline int too_big(struct hook *h, struct flow *f)
{
	struct packet *p = h->p;
	struct error e = {.family = p->key.family, .proto = p->key.proto};
	__u32 mtu = told_mtu(h, f);
	__u8 macs[2][ETH_ALEN];

	count_drop(p, DROP_TOO_BIG);
	if (p->fragment || bpf_skb_load_bytes(h->skb, p->l4, e.l4, sizeof(e.l4)) < 0 ||
	    bpf_skb_load_bytes(h->skb, 0, macs[1], ETH_ALEN) < 0 || bpf_skb_load_bytes(h->skb, ETH_ALEN, macs[0], ETH_ALEN) < 0)
		return TC_ACT_SHOT;
	e.length = h->skb->len - L3;
	e.saddr = &p->key.daddr;
	e.daddr = &p->key.saddr;
	if (e.family == 4) {
		e.type = ICMP_UNREACHABLE;
		e.code = ICMP_UNREACHABLE_TOO_BIG;
		e.rest = be32(mtu & 0xffff);
	} else {
		e.type = ICMP6_TOO_BIG;
		e.rest = be32(mtu);
	}
	if (become_error(h, &e) || bpf_skb_store_bytes(h->skb, 0, macs, sizeof(macs), 0))
		return TC_ACT_SHOT;
	return bpf_redirect(p->key.ifindex, p->key.ifindex == LO_IFINDEX ? BPF_F_INGRESS : 0);
}
