/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Fragments. The first one has the ports and finds the flow; where the others go it leaves in the table, under the
 * datagram's identification. Others that come before it are dropped and counted: who fragments sends in order.
 *
 * The pod's stack puts the pieces together by addresses and identification alone, and those of all guests come to
 * 127.0.0.1 from 127.0.0.1. So each datagram is given another identification, which no guest can foresee: nobody can
 * slip a piece into another's.
 */
#pragma once

#include "flows.h"

static inline void set_fragments_key(struct hook *h, struct flow_key *key)
{
	*key = h->p->key;
	key->row = ROW_FRAGMENTS;
	key->sport = h->p->ip_id;
	key->dport = h->p->ip_id >> 16;
}

/* The first fragment's way is for all: along `f`, or, if it is NULL, to the pod's own stack. `p` is as it came. */
static inline int remember_fragments(struct hook *h, struct flow *f)
{
	struct flow *row = &h->scratch->fwd;

	set_fragments_key(h, &h->scratch->key);
	if (f)
		*row = *f;
	else
		*row = (struct flow){};
	row->asked = bpf_get_prandom_u32();
	h->scratch->fragments_id = row->asked;
	return bpf_map_update_elem(h->flows, &h->scratch->key, row, BPF_ANY);
}

/* After the addresses, since it adjusts the header's checksum as they left it. */
static inline int store_identification(struct __sk_buff *skb, struct packet *p, __u32 id)
{
	__u16 id16 = id;

	if (p->key.family == 6)
		return bpf_skb_store_bytes(skb, L3 + sizeof(struct ipv6hdr) + offsetof(struct ipv6_fragment, id), &id,
					   sizeof(id), 0);
	p->ip_csum = adjust_csum(p->ip_csum, csum_swap(p->ip_id, id16));
	return bpf_skb_store_bytes(skb, L3 + offsetof(struct iphdr, id), &id16, sizeof(id16), 0) |
	       bpf_skb_store_bytes(skb, L3 + offsetof(struct iphdr, check), &p->ip_csum, sizeof(p->ip_csum), 0);
}

/* Any further fragment: a verdict. */
static inline int forward_fragment(struct hook *h)
{
	struct packet *p = h->p;
	struct flow *row;

	set_fragments_key(h, &h->scratch->key);
	row = bpf_map_lookup_elem(h->flows, &h->scratch->key);
	if (!row)
		return count_drop(p, DROP_FRAGMENT);
	if (!row->role)
		return TC_ACT_UNSPEC;
	if (store_addrs(h->skb, p, row) || store_identification(h->skb, p, row->asked))
		return count_drop(p, DROP_REWRITE_FAILED);
	return redirect(p->pod_id, row);
}
