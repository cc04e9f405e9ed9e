/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * From a frame to a flow key. All bounds checks on packet pointers are here; whoever needs more of a packet than
 * `struct packet` says fetches it with bpf_skb_load_bytes(), which checks for itself.
 */
#pragma once

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>

#include "maps.h"

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define be16(x) ((__u16)__builtin_bswap16(x))
#define be32(x) ((__u32)__builtin_bswap32(x))
#else
#define be16(x) ((__u16)(x))
#define be32(x) ((__u32)(x))
#endif

#define L3 ETH_HLEN /* the IP header's offset: `lo`, TAP and veth all carry Ethernet headers */
#define IPV4_ADDRS (L3 + 12)
#define IPV6_ADDRS (L3 + 8)
#define HEADERS_MAX (L3 + 60 + 20) /* Ethernet, IPv4 with all its options, TCP up to its flags */

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define IPV4_MF_OR_OFFSET 0x3fff
#define IPV4_OFFSET 0x1fff
#define IPV6_OFFSET 0xfff8
#define LATER_FRAGMENT(p) ((p)->fragment == FRAGMENT_LATER)

enum {
	KIND_OTHER,     /* not IP, or IP that carries none of the below: ports are zero */
	KIND_FLOW,      /* TCP or UDP, with ports; a datagram's first fragment too */
	KIND_ICMP,      /* of the family's own kind */
	KIND_FRAGMENT,  /* any further fragment, or one of another protocol; addresses are set */
	KIND_EXTENSION, /* IPv6 with an extension header that is not the fragment header alone; likewise */
	KIND_MALFORMED
};

enum {
	FRAGMENT_NONE,
	FRAGMENT_FIRST,
	FRAGMENT_LATER
};

#define IPV6_TLV_JUMBO 194

struct ipv6_jumbo { /* RFC 2675, as include/net/ipv6.h has it: struct hop_jumbo_hdr */
	__u8 next, length, option, option_length;
	__u32 payload_length;
};

struct ipv6_fragment { /* RFC 8200, 4.5 */
	__u8 next, reserved;
	__u16 offset;
	__u32 id;
};

static inline void set_ipv4(struct addr *a, __u32 ipv4)
{
	a->word[0] = 0;
	a->word[1] = 0;
	a->word[2] = be32(0xffff);
	a->word[3] = ipv4;
}

static inline int same_addr(const struct addr *a, const struct addr *b)
{
	/* Words, not memcmp: LLVM turns 16 bytes of it into a call. */
	return !((a->word[0] ^ b->word[0]) | (a->word[1] ^ b->word[1]) | (a->word[2] ^ b->word[2]) |
		 (a->word[3] ^ b->word[3]));
}

static inline int is_ipv6_loopback(const struct addr *a)
{
	return !(a->word[0] | a->word[1] | a->word[2] | (a->word[3] ^ be32(1)));
}

static inline int is_extension(__u8 next_header)
{
	return next_header == IPPROTO_HOPOPTS || next_header == IPPROTO_ROUTING || next_header == IPPROTO_FRAGMENT ||
	       next_header == IPPROTO_DSTOPTS || next_header == IPPROTO_AH || next_header == 135 /* mobility */ ||
	       next_header == 139 /* HIP */ || next_header == 140 /* shim6 */;
}

/* What is at p->l4: ports and TCP flags. Returns the packet's kind. */
static inline __u8 parse_l4(struct __sk_buff *skb, struct packet *p, void *l4)
{
	void *end = (void *)(long)skb->data_end;

	if (LATER_FRAGMENT(p))
		return KIND_FRAGMENT;
	if (p->key.proto != IPPROTO_TCP && p->key.proto != IPPROTO_UDP) {
		if (p->fragment)
			return KIND_FRAGMENT;
		if (p->key.proto == (p->key.family == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6))
			return KIND_ICMP;
		return p->key.family == 6 && is_extension(p->key.proto) ? KIND_EXTENSION : KIND_OTHER;
	}
	/* One bound for both protocols would turn away an empty UDP datagram: 8 bytes of UDP, 14 of TCP up to its flags. */
	if (l4 + 8 > end)
		return KIND_MALFORMED;
	p->key.sport = ((__u16 *)l4)[0];
	p->key.dport = ((__u16 *)l4)[1];
	if (p->key.proto == IPPROTO_UDP) {
		p->csum = p->l4 + 6;
		return KIND_FLOW;
	}
	if (l4 + 20 > end)
		return KIND_MALFORMED;
	p->tcp_flags = ((__u8 *)l4)[13];
	p->csum = p->l4 + 16;
	return KIND_FLOW;
}

static inline __u8 parse_ipv4(struct __sk_buff *skb, struct packet *p, void *data)
{
	struct iphdr *ip = data + L3;
	__u32 length;

	if (data + L3 + sizeof(*ip) > (void *)(long)skb->data_end)
		return KIND_MALFORMED;
	length = ip->ihl * 4;
	if (ip->version != 4 || length < sizeof(*ip))
		return KIND_MALFORMED;
	p->key.family = 4;
	p->key.proto = ip->protocol;
	p->ip_csum = ip->check;
	set_ipv4(&p->key.saddr, ip->saddr);
	set_ipv4(&p->key.daddr, ip->daddr);
	p->l4 = L3 + length;
	if (ip->frag_off & be16(IPV4_MF_OR_OFFSET)) {
		p->ip_id = ip->id;
		p->fragment = ip->frag_off & be16(IPV4_OFFSET) ? FRAGMENT_LATER : FRAGMENT_FIRST;
	}
	return parse_l4(skb, p, data + L3 + length);
}

static inline __u8 parse_ipv6(struct __sk_buff *skb, struct packet *p, void *data)
{
	struct ipv6hdr *ip = data + L3;
	struct ipv6_fragment *fragment = data + L3 + sizeof(*ip);
	struct ipv6_jumbo *jumbo = data + L3 + sizeof(*ip);

	if (data + L3 + sizeof(*ip) > (void *)(long)skb->data_end || ip->version != 6)
		return KIND_MALFORMED;
	p->key.family = 6;
	p->key.proto = ip->nexthdr;
	__builtin_memcpy(&p->key.saddr, &ip->saddr, 2 * sizeof(struct addr));
	p->l4 = L3 + sizeof(*ip);
	/* A packet of over 64 KiB, which is cut up before it leaves the host: net/ipv6/ip6_output.c, ip6_xmit. TCP makes them
	 * when two segments are larger than that. */
	if (p->key.proto == IPPROTO_HOPOPTS && skb->gso_size &&
	    data + L3 + sizeof(*ip) + sizeof(*jumbo) <= (void *)(long)skb->data_end && jumbo->next == IPPROTO_TCP &&
	    !jumbo->length && jumbo->option == IPV6_TLV_JUMBO) {
		p->key.proto = IPPROTO_TCP;
		p->l4 += sizeof(*jumbo);
		return parse_l4(skb, p, data + L3 + sizeof(*ip) + sizeof(*jumbo));
	}
	if (p->key.proto != IPPROTO_FRAGMENT)
		return parse_l4(skb, p, data + L3 + sizeof(*ip));
	if (data + L3 + sizeof(*ip) + sizeof(*fragment) > (void *)(long)skb->data_end)
		return KIND_MALFORMED;
	p->key.proto = fragment->next;
	p->ip_id = fragment->id;
	p->fragment = fragment->offset & be16(IPV6_OFFSET) ? FRAGMENT_LATER : FRAGMENT_FIRST;
	p->l4 += sizeof(*fragment);
	return parse_l4(skb, p, data + L3 + sizeof(*ip) + sizeof(*fragment));
}

static inline void parse_linear(struct __sk_buff *skb, struct packet *p)
{
	void *data = (void *)(long)skb->data;

	p->kind = KIND_MALFORMED;
	if (data + L3 > (void *)(long)skb->data_end)
		return;
	p->ethertype = ((struct ethhdr *)data)->h_proto;
	if (p->ethertype == be16(ETH_P_IP))
		p->kind = parse_ipv4(skb, p, data);
	else if (p->ethertype == be16(ETH_P_IPV6))
		p->kind = parse_ipv6(skb, p, data);
	else
		p->kind = KIND_OTHER;
}

static inline void parse(struct __sk_buff *skb, struct packet *p)
{
	__u32 missing;

	parse_linear(skb, p);
	if (p->kind != KIND_MALFORMED)
		return;
	/* A guest can make its TAP's frames arrive with as little as an Ethernet header in the linear part (virtio's
	 * hdr_len: drivers/net/tun.c, tun_get_user). Everyone else's headers are linear: what TCP sends over `lo` has
	 * nothing but headers there, and pulling more would copy. */
	missing = skb->len < HEADERS_MAX ? skb->len : HEADERS_MAX;
	if (skb->data_end - skb->data < missing && !bpf_skb_pull_data(skb, missing))
		parse_linear(skb, p);
}
