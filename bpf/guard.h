/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What a guest may send: frames from its own MAC address, its own IPv4 and IPv6 addresses, and no word about anybody
 * else's. The rest is dropped and counted by reason.
 *
 * Packets of a known flow do not come here: the flow table knows them by TAP and source address, they are given MAC
 * addresses of ours, and the bridge never sees them.
 */
#pragma once

#include "parse.h"

#define ICMP_REDIRECT 5
#define ICMP_ROUTER_ADVERT 9
#define ND_ROUTER_SOLICIT 133
#define ND_ROUTER_ADVERT 134
#define ND_SOLICIT 135
#define ND_ADVERT 136
#define ND_REDIRECT 137
#define ND_OPTIONS_MAX 4
#define EXTENSIONS_MAX 6 /* five, as RFC 8200, 4.1, recommends, and what they lead to */

/* Counted, and shown to whoever watches. */
static inline int count_drop(struct packet *p, __u32 reason)
{
	struct counters *c = pod_counters.lookup(&p->pod_id);
	void *ring = drops.lookup(&p->pod_id);

	if (c && reason < DROP_SLOTS)
		c->dropped[reason]++;
	p->reason = reason;
	if (ring)
		bpf_ringbuf_output(ring, p, sizeof(*p), 0);
	return TC_ACT_SHOT;
}

static inline void count_passed(__u32 pod_id)
{
	struct counters *c = pod_counters.lookup(&pod_id);

	if (c)
		c->passed++;
}

/* A link-local address is made by the guest itself. One that is made of a MAC address (RFC 4291, appendix A) is made of its
 * own; of another there is nothing to check it by. */
static inline int is_own_link_local(const struct addr *a, const struct guest *g)
{
	const __u8 *id = (const __u8 *)&a->word[2];

	if ((a->word[0] & be32(0xffc00000)) != be32(0xfe800000))
		return 0;
	if (id[3] != 0xff || id[4] != 0xfe)
		return 1;
	return !((id[0] ^ 2 ^ g->mac[0]) | (id[1] ^ g->mac[1]) | (id[2] ^ g->mac[2]) | (id[5] ^ g->mac[3]) |
		 (id[6] ^ g->mac[4]) | (id[7] ^ g->mac[5]));
}

static inline int is_unspecified(const struct addr *a)
{
	return !(a->word[0] | a->word[1] | a->word[2] | a->word[3]);
}

struct arp_ipv4 {
	__u16 hardware, protocol;
	__u8 hardware_length, protocol_length;
	__u16 operation;
	__u8 sender_mac[6];
	__u8 sender_ip[4];
} __attribute__((packed));

static inline int same_mac(const __u8 *a, const __u8 *b)
{
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]) | (a[5] ^ b[5]));
}

/* Each check returns a drop reason, or -1: nothing wrong. */
static inline int check_arp(struct __sk_buff *skb, struct guest *g)
{
	struct arp_ipv4 arp;
	__u32 ip;

	if (bpf_skb_load_bytes(skb, L3, &arp, sizeof(arp)) < 0)
		return DROP_MALFORMED;
	__builtin_memcpy(&ip, arp.sender_ip, 4);
	if (arp.hardware != be16(1) || arp.protocol != be16(ETH_P_IP) || arp.hardware_length != ETH_ALEN ||
	    arp.protocol_length != 4 || !same_mac(arp.sender_mac, g->mac))
		return DROP_SPOOFED_ARP;
	if (ip == g->ipv4.word[3]) {
		g->seen_ipv4 = 1;
		return -1;
	}
	return ip ? DROP_SPOOFED_ARP : -1; /* 0.0.0.0: a probe, RFC 5227 */
}

/* Does the header speak of more than there is? What is longer is padding. */
static inline int is_cut_short(struct __sk_buff *skb, __u8 family)
{
	__u16 length;

	if (bpf_skb_load_bytes(skb, family == 4 ? L3 + 2 : L3 + 4, &length, sizeof(length)) < 0)
		return 1;
	return be16(length) + (family == 4 ? 0 : sizeof(struct ipv6hdr)) > skb->len - L3;
}

static inline int check_ipv4(struct __sk_buff *skb, struct packet *p, struct guest *g)
{
	__u8 type;

	if (is_cut_short(skb, 4))
		return DROP_MALFORMED;
	if (!same_addr(&p->key.saddr, &g->ipv4))
		return DROP_SPOOFED_IPV4;
	if (p->kind == KIND_ICMP) {
		if (bpf_skb_load_bytes(skb, p->l4, &type, 1) < 0)
			return DROP_MALFORMED;
		if (type == ICMP_REDIRECT || type == ICMP_ROUTER_ADVERT)
			return DROP_ROUTER_ND;
	}
	if ((p->key.daddr.word[3] & be32(0xff000000)) == be32(0x7f000000))
		return DROP_MARTIAN;
	g->seen_ipv4 = 1;
	return -1;
}

/* Neighbour discovery's options, RFC 4861, 4.6: 1 and 2 are link-layer addresses. 0: one of them is another's. */
static inline int has_own_link_layer(struct __sk_buff *skb, __u32 at, struct guest *g)
{
	struct {
		__u8 type, length, mac[6];
	} option;
	int i;

#pragma nounroll
	for (i = 0; i < ND_OPTIONS_MAX; i++) {
		if (bpf_skb_load_bytes(skb, at, &option, sizeof(option)) < 0)
			return 1;
		if ((option.type == 1 || option.type == 2) && !same_mac(option.mac, g->mac))
			return 0;
		if (!option.length)
			return 1; /* invalid: whoever gets it drops it */
		at += option.length * 8;
	}
	return 0;
}

static inline int check_nd(struct __sk_buff *skb, struct packet *p, struct guest *g)
{
	struct addr target;
	__u8 type;

	if (bpf_skb_load_bytes(skb, p->l4, &type, 1) < 0)
		return DROP_MALFORMED;
	if (p->fragment && type >= ND_ROUTER_SOLICIT && type <= ND_REDIRECT)
		return DROP_SPOOFED_ND; /* RFC 6980: never fragmented but to hide */
	if (type == ND_ROUTER_ADVERT || type == ND_REDIRECT)
		return DROP_ROUTER_ND;
	if (type != ND_ADVERT && type != ND_SOLICIT)
		return -1;
	if (bpf_skb_load_bytes(skb, p->l4 + 8, &target, sizeof(target)) < 0)
		return DROP_MALFORMED;
	if (!has_own_link_layer(skb, p->l4 + 24, g))
		return DROP_SPOOFED_ND;
	/* A solicitation from :: claims its target, as an advertisement does: RFC 4862, 5.4. */
	if (type == ND_SOLICIT && !is_unspecified(&p->key.saddr))
		return -1;
	if (!same_addr(&target, &g->ipv6))
		return is_own_link_local(&target, g) ? -1 : DROP_SPOOFED_ND;
	if (type == ND_ADVERT)
		g->seen_ipv6 = 1;
	return -1;
}


/* Neighbour discovery has no use for extension headers, while a kernel reads it behind any number of them. */
static inline int check_extensions(struct __sk_buff *skb, struct packet *p)
{
	struct {
		__u8 next, length;
	} header;
	__u8 next = p->key.proto, type;
	__u32 at = p->l4;
	int i;

#pragma nounroll
	for (i = 0; i < EXTENSIONS_MAX; i++) {
		if (next == IPPROTO_ICMPV6) {
			if (bpf_skb_load_bytes(skb, at, &type, 1) < 0)
				return DROP_MALFORMED;
			return type >= ND_ROUTER_SOLICIT && type <= ND_REDIRECT ? DROP_SPOOFED_ND : -1;
		}
		if (!is_extension(next))
			return -1;
		if (bpf_skb_load_bytes(skb, at, &header, sizeof(header)) < 0)
			return DROP_MALFORMED;
		if (next == IPPROTO_FRAGMENT)
			at += 8;
		else if (next == IPPROTO_AH)
			at += (header.length + 2) * 4;
		else
			at += (header.length + 1) * 8;
		next = header.next;
	}
	return DROP_EXTENSION;
}

static inline int check_ipv6(struct __sk_buff *skb, struct packet *p, struct guest *g)
{
	struct addr *to = &p->key.daddr;
	int own = same_addr(&p->key.saddr, &g->ipv6);

	if (is_cut_short(skb, 6))
		return DROP_MALFORMED;
	if (!own && !is_own_link_local(&p->key.saddr, g) && !is_unspecified(&p->key.saddr))
		return DROP_SPOOFED_IPV6;
	/* ::, ::1 and everything that looks like an IPv4 address to us: ::/96 and ::ffff:0:0/96 */
	if (!(to->word[0] | to->word[1]) && (to->word[2] == 0 || to->word[2] == be32(0xffff)))
		return DROP_MARTIAN;
	if (own)
		g->seen_ipv6 = 1;
	if (p->kind == KIND_EXTENSION)
		return check_extensions(skb, p);
	/* RFC 7112: all that leads to the transport header is in the first fragment. */
	if (p->fragment == FRAGMENT_FIRST && is_extension(p->key.proto))
		return DROP_EXTENSION;
	return p->key.proto == IPPROTO_ICMPV6 && !LATER_FRAGMENT(p) ? check_nd(skb, p, g) : -1;
}

static inline int check_guest(struct __sk_buff *skb, struct packet *p, struct guest *g)
{
	struct ethhdr eth;

	if (p->kind == KIND_MALFORMED || bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)) < 0)
		return DROP_MALFORMED;
	if (!same_mac(eth.h_source, g->mac))
		return DROP_SPOOFED_MAC;
	/* 01:80:c2:00:00:0x: spanning tree, LACP, LLDP and their like speak to the bridge itself */
	if (eth.h_dest[0] == 0x01 && eth.h_dest[1] == 0x80 && eth.h_dest[2] == 0xc2 && eth.h_dest[3] == 0 &&
	    eth.h_dest[4] == 0 && eth.h_dest[5] < 0x10)
		return DROP_RESERVED_GROUP;
	if (skb->vlan_present || p->ethertype == be16(ETH_P_8021Q) || p->ethertype == be16(ETH_P_8021AD))
		return DROP_VLAN;
	if (p->ethertype == be16(ETH_P_ARP))
		return check_arp(skb, g);
	if (p->ethertype == be16(ETH_P_IP))
		return check_ipv4(skb, p, g);
	if (p->ethertype == be16(ETH_P_IPV6))
		return check_ipv6(skb, p, g);
	return DROP_ETHERTYPE;
}
