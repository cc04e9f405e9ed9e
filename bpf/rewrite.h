/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Changing a packet's addresses, ports and MACs, checksums kept right.
 *
 * All writes go through helpers. A program that writes through packet pointers gets a prologue that unshares every
 * cloned packet (net/core/filter.c, tc_cls_act_prologue), and what TCP sends over `lo` is cloned: plain loopback would
 * pay for writes that never happen to it.
 */
#pragma once

#include "parse.h"

#ifndef BPF_F_CURRENT_NETNS
#define BPF_F_CURRENT_NETNS (-1L)
#endif

/* RFC 1624: the checksum after what it covers has changed by `diff` (new minus old, as bpf_csum_diff() counts). */
static inline __u16 adjust_csum(__u16 csum, __u32 diff)
{
	__u64 sum = (__u16)~csum;

	sum += diff;
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* What sums grow by when `old` becomes `new`, and when two such changes come together: one's complement, 32 bits. */
static inline __u32 csum_sum(__u32 a, __u32 b)
{
	__u64 sum = (__u64)a + b;

	return (sum & 0xffffffff) + (sum >> 32);
}

static inline __u32 csum_swap(__u32 old, __u32 new)
{
	return csum_sum(~old, new);
}

/* saddr and daddr lie next to each other in struct flow_key and in struct flow. */
static inline __u32 addrs_diff(struct addr *from, struct addr *to)
{
	return bpf_csum_diff((void *)from, 2 * sizeof(struct addr), (void *)to, 2 * sizeof(struct addr), 0);
}

static inline __u32 both_ports(__u16 sport, __u16 dport)
{
	union {
		__u16 port[2];
		__u32 both;
	} u = {.port = {sport, dport}};

	return u.both;
}

/* IPv4's header as far as it changes: 10 bytes in a row. */
struct ipv4_tail {
	__u16 csum;
	__u32 saddr;
	__u32 daddr;
} __attribute__((packed));

/* Addresses of the IP header with its checksum, and of the Ethernet header. */
static inline int store_addrs(struct __sk_buff *skb, struct packet *p, struct flow *f)
{
	int failed;

	if (p->key.family == 4) {
		struct ipv4_tail ip;

		p->ip_csum = adjust_csum(p->ip_csum, f->csum_diff);
		ip.csum = p->ip_csum;
		ip.saddr = f->saddr.word[3];
		ip.daddr = f->daddr.word[3];
		failed = bpf_skb_store_bytes(skb, IPV4_ADDRS - 2, &ip, sizeof(ip), 0);
	} else {
		failed = bpf_skb_store_bytes(skb, IPV6_ADDRS, &f->saddr, 2 * sizeof(struct addr), 0);
	}
	return failed | bpf_skb_store_bytes(skb, 0, f->dmac, 2 * ETH_ALEN, 0);
}

#define IPV6_VERSION_CLASS 0x60000000 /* and flow label 0 */

/* Give the packet the other version's IP header (RFC 7915), and MACs. Its transport header and checksum are right
 * already: the pseudo-headers differ in the addresses alone, IPv4-mapped ones add up like IPv4's. */
static inline int change_version(struct __sk_buff *skb, struct packet *p, struct flow *f)
{
	__u16 ethertype = f->family == 4 ? be16(ETH_P_IP) : be16(ETH_P_IPV6), head, length;
	__u8 ttl;
	int failed;

	failed = bpf_skb_load_bytes(skb, L3, &head, sizeof(head));
	/* Not the frame's length: a short one is padded. */
	failed |= bpf_skb_load_bytes(skb, p->key.family == 4 ? L3 + 2 : L3 + 4, &length, sizeof(length));
	failed |= bpf_skb_load_bytes(skb, p->key.family == 4 ? L3 + 8 : L3 + 7, &ttl, sizeof(ttl));
	failed |= bpf_skb_change_proto(skb, ethertype, 0);
	if (failed)
		return failed;
	head = be16(head);
	length = be16(length);
	if (f->family == 4) {
		struct iphdr ip = {.version = 4, .ihl = 5, .ttl = ttl, .protocol = p->key.proto};

		ip.tos = head >> 4;
		ip.tot_len = be16(length + sizeof(ip));
		ip.frag_off = be16(0x4000); /* DF, for IPv6 has no fragments on the way; so the identification may be 0, RFC 6864 */
		ip.saddr = f->saddr.word[3];
		ip.daddr = f->daddr.word[3];
		p->ip_csum = adjust_csum(0xffff, bpf_csum_diff(0, 0, (void *)&ip, sizeof(ip), 0));
		ip.check = p->ip_csum;
		p->l4 = L3 + sizeof(ip);
		failed = bpf_skb_store_bytes(skb, L3, &ip, sizeof(ip), 0);
	} else {
		__u32 first[2];

		first[0] = be32(IPV6_VERSION_CLASS | (__u32)(head & 0xff) << 20);
		first[1] = be32((length - sizeof(struct iphdr)) << 16 | p->key.proto << 8 | ttl);
		p->l4 = L3 + sizeof(struct ipv6hdr);
		failed = bpf_skb_store_bytes(skb, L3, first, sizeof(first), 0);
		failed |= bpf_skb_store_bytes(skb, IPV6_ADDRS, &f->saddr, 2 * sizeof(struct addr), 0);
	}
	p->key.family = f->family;
	p->ethertype = ethertype;
	p->csum = p->l4 + (p->key.proto == IPPROTO_TCP ? 16 : 6);
	failed |= bpf_skb_store_bytes(skb, 0, f->dmac, 2 * ETH_ALEN, 0);
	return failed | bpf_skb_store_bytes(skb, 2 * ETH_ALEN, &ethertype, sizeof(ethertype), 0);
}

/* Ports, and the checksum over them and the addresses. 0, or negative. */
static inline int rewrite_l4(struct __sk_buff *skb, struct packet *p, struct flow *f)
{
	__u64 flags = p->key.proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0; /* no checksum stays no checksum */
	__u32 ports = both_ports(f->sport, f->dport), old_ports = both_ports(p->key.sport, p->key.dport);
	int failed = 0;

	/* Of a packet whose checksum the device is to fill in, the field holds the addresses' share only: hence
	 * BPF_F_PSEUDO_HDR for them and not for the ports (include/linux/skbuff.h, CHECKSUM_PARTIAL). */
	failed |= bpf_l4_csum_replace(skb, p->csum, 0, f->csum_diff, flags | BPF_F_PSEUDO_HDR);
	if (ports != old_ports) {
		failed |= bpf_l4_csum_replace(skb, p->csum, old_ports, ports, flags | sizeof(ports));
		failed |= bpf_skb_store_bytes(skb, p->l4, &ports, sizeof(ports), 0);
		p->key.sport = f->sport;
		p->key.dport = f->dport;
	}
	return failed;
}

/* Make the packet what the flow says; `p` then describes the packet as it is now. 0, or negative: half-done. */
static inline int rewrite(struct __sk_buff *skb, struct packet *p, struct flow *f)
{
	int failed = rewrite_l4(skb, p, f);

	failed |= f->family == p->key.family ? store_addrs(skb, p, f) : change_version(skb, p, f);
	p->key.saddr = f->saddr;
	p->key.daddr = f->daddr;
	return failed;
}

/* Send the rewritten packet where the flow says, and count it. */
static inline int redirect(__u32 pod_id, const struct flow *f)
{
	struct counters *c = pod_counters.lookup(&pod_id);

	if (c)
		c->redirected++;
	return bpf_redirect(f->ifindex, f->ifindex == LO_IFINDEX ? BPF_F_INGRESS : 0);
}
