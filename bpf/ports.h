/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Who serves a port? Declared by its user; else the only guest there is; else learned: every guest is asked, and the
 * first answer makes its sender the owner.
 *
 *     caller                router                       guests
 *       | --- SYN ------------> | --- SYN, a copy each ----> A, B, C     ROW_ASKED: 3 asked; 3 candidate entries
 *       |                       | <-- RST ------------------ A           1 refused: held back
 *       | <-- SYN-ACK --------- | <-- SYN-ACK -------------- B           B owns the port; the forward entry goes in
 *       |                       | <-- SYN-ACK -------------- C           late: the pod's stack knows no such
 *       | --- ACK ------------> | --- ACK -----------------> B           connection and resets it
 *
 * While nobody has answered there is no forward entry, so that a repeated SYN asks again. Who gets to insert it
 * (BPF_NOEXIST) is the first: nothing else decides between two answers on two CPUs. UDP is the same with any
 * datagram for a SYN-ACK, and ICMP "port unreachable" for a RST.
 */
#pragma once

#include "flows.h"

static inline struct guest *find_guest(__u32 pod_id, __u32 ifindex)
{
	struct guest_key key = {.pod = pod_id, .ifindex = ifindex};

	return guests.lookup(&key);
}

/* `family` is the callers': a guest may serve them in the other one. */
static inline void set_port_key(struct port_key *key, const struct packet *p, __u8 family, __u16 port)
{
	key->pod = p->pod_id;
	key->port = port;
	key->family = family;
	key->proto = p->key.proto;
}

/* The TAP of the guest that serves the packet's port, or 0: nobody does, or scratch->candidates are to be asked. */
static inline __u32 find_server(struct hook *h)
{
	struct scratch *s = h->scratch;
	const struct packet *p = h->p;
	struct port_key key = {};
	struct port_owner *owner;
	struct guest *g;
	int i;

	set_port_key(&key, p, p->key.family, p->key.dport);
	owner = ports.lookup(&key);
	if (owner) {
		g = find_guest(p->pod_id, owner->ifindex);
		if (g && spoken_family(g, p->key.family))
			return owner->ifindex;
		if (owner->declared)
			return 0;
	}
	/* This may be an answer to a guest's own question to the outside, which somebody else translates back. */
	if (h->pod->uplink_translates && is_from_outside(h) && p->key.proto == IPPROTO_UDP)
		return 0;
#pragma nounroll
	for (i = 0; i < GUESTS_PER_POD; i++) {
		if (i >= h->pod->guest_count)
			break;
		g = find_guest(p->pod_id, h->pod->taps[i]);
		if (g && spoken_family(g, p->key.family)) {
			s->candidate = h->pod->taps[i];
			s->candidates++;
		}
	}
	if (s->candidates > 1)
		return 0;
	s->candidates = 0;
	return s->candidate;
}

/* A guest has answered for the port: it owns it, unless somebody does already. `f`: the entry of its answers. */
static inline void learn_owner(const struct packet *p, const struct flow *f)
{
	struct port_owner owner = {.ifindex = p->key.ifindex};
	struct port_key key = {};

	set_port_key(&key, p, f->family, p->key.sport);
	ports.insert(&key, &owner);
}

/* The owner has refused: the next caller asks everybody again. */
static inline void forget_owner(const struct packet *p, const struct flow *f)
{
	struct port_owner *owner;
	struct port_key key = {};

	set_port_key(&key, p, f->family, p->key.sport);
	owner = ports.lookup(&key);
	if (owner && !owner->declared && owner->ifindex == p->key.ifindex)
		ports.delete(&key);
}

/* --- being answered --------------------------------------------------------------------------------------------- */

/* One candidate refuses. 1: it was the last, and the caller is to hear it. */
static inline int is_last_refusal(struct hook *h, struct flow *row)
{
	struct flow_key *key = &h->scratch->key;
	struct flow *question;

	if (row->seen & SEEN_REFUSAL)
		return 0;
	row->seen |= SEEN_REFUSAL;
	reverse_key(key, &h->p->key, row);
	key->row = ROW_ASKED;
	question = bpf_map_lookup_elem(h->flows, key);
	if (!question)
		return 0; /* somebody has answered */
	/* The add is a full barrier: of two that refuse on two CPUs at least one sees both. */
	__sync_fetch_and_add(&question->refused, 1);
	if (question->refused < question->asked)
		return 0;
	bpf_map_delete_elem(h->flows, key);
	return 1;
}

/* One candidate answers. 1: it is the first, and now a flow like any other. */
static inline int is_first_answer(struct hook *h, struct flow *row)
{
	struct guest *g = find_guest(h->p->pod_id, h->p->key.ifindex);
	__u64 now = bpf_ktime_get_ns();
	struct flow_key *key = &h->scratch->key;
	struct flow *fwd = &h->scratch->fwd, *winner;

	if (!g)
		return 0;
	reverse_key(key, &h->p->key, row);
	*fwd = (struct flow){};
	fwd->saddr = h->p->key.daddr;
	fwd->daddr = h->p->key.saddr;
	fwd->sport = h->p->key.dport;
	fwd->dport = h->p->key.sport;
	__builtin_memcpy(fwd->dmac, g->mac, ETH_ALEN);
	__builtin_memcpy(fwd->smac, h->pod->mac, ETH_ALEN);
	fwd->ifindex = h->p->key.ifindex;
	fwd->csum_diff = ~row->csum_diff;
	fwd->mtu = g->mtu;
	fwd->role = FLOW_FORWARD;
	fwd->family = h->p->key.family;
	fwd->idle_s = row->idle_s;
	fwd->created_ns = row->created_ns;
	fwd->last_ns = now;
	fwd->packets = 1; /* the question */
	if (bpf_map_update_elem(h->flows, key, fwd, BPF_NOEXIST)) {
		winner = bpf_map_lookup_elem(h->flows, key);
		if (!winner || winner->ifindex != h->p->key.ifindex)
			return 0;
	}
	row->role = FLOW_REVERSE;
	key->row = ROW_ASKED;
	bpf_map_delete_elem(h->flows, key);
	return 1;
}

/* A packet from a guest that was asked: SEND_ALONG its entry, or the verdict. */
#define SEND_ALONG (-2)

static inline int from_candidate(struct hook *h, struct flow *row)
{
	struct packet *p = h->p;
	int tcp = p->key.proto == IPPROTO_TCP;

	if (tcp && p->tcp_flags & TCP_RST) {
		if (is_last_refusal(h, row))
			return SEND_ALONG;
		return count_drop(p, DROP_REFUSED_BY_SOME);
	}
	if (tcp && (p->tcp_flags & (TCP_SYN | TCP_ACK)) != (TCP_SYN | TCP_ACK))
		return TC_ACT_UNSPEC; /* the tail of something older: the pod's stack resets it */
	if (is_first_answer(h, row))
		return SEND_ALONG;
	bpf_map_delete_elem(h->flows, &p->key);
	if (tcp)
		return TC_ACT_UNSPEC; /* likewise */
	return count_drop(p, DROP_LATE_ANSWER);
}
