/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Putting a question (a TCP SYN, a UDP datagram) to every guest of a pod: see ports.h for what comes back.
 *
 * The loop over guests is a program that tail-calls itself, two guests a turn. As a loop inside the other program it
 * would be verified 64 times over, which takes longer than all the rest of loading; a tail call chain may be 33 long
 * (MAX_TAIL_CALL_CNT, include/linux/bpf.h) on every kernel, where bpf_loop() needs 5.17 and a newer bcc.
 */
#pragma once

#include "ports.h"

#define ASKED_PER_TURN 2
_Static_assert(GUESTS_PER_POD / ASKED_PER_TURN <= 32, "tail calls");

/* Enter one candidate's answers. A candidate that was asked the same before keeps its entry. */
static inline int enter_candidate(struct hook *h, struct flow *fwd, struct flow *rev)
{
	struct flow_key *key = &h->scratch->key;
	struct flow *old;

	if (answers_itself(&h->scratch->asked, fwd))
		return -1;
	reverse_key(key, &h->scratch->asked, fwd);
	if (!bpf_map_update_elem(h->flows, key, rev, BPF_NOEXIST))
		return 0;
	old = bpf_map_lookup_elem(h->flows, key);
	if (!old || old->role == FLOW_FORWARD || old->ifindex != rev->ifindex || old->dport != rev->dport ||
	    !same_addr(&old->daddr, &rev->daddr))
		return -1;
	return bpf_map_update_elem(h->flows, key, rev, BPF_ANY);
}

/* Send one guest a copy of the question. 0: on its way. */
static inline int ask_one(struct hook *h, __u32 tap, struct guest *to)
{
	struct flow *fwd = &h->scratch->fwd, *rev = &h->scratch->rev;
	__u64 now = bpf_ktime_get_ns();

	fill_forward(h, &h->scratch->asked, fwd, tap, to, spoken_family(to, h->scratch->asked.family), now);
	fill_reverse(h, &h->scratch->asked, fwd, rev, now);
	rev->role = FLOW_CANDIDATE;
	/* Another flow to this guest has the port: any other will do. */
	if (enter_candidate(h, fwd, rev)) {
		fwd->sport = be16(PORT_MIN + bpf_get_prandom_u32() % PORT_COUNT);
		if (enter_candidate(h, fwd, rev))
			return -1;
	}
	/* The packet is now what the last guest was asked. */
	fwd->csum_diff = addrs_diff(&h->p->key.saddr, &fwd->saddr);
	if (rewrite(h->skb, h->p, fwd))
		return -1;
	return bpf_clone_redirect(h->skb, tap, 0);
}

static inline void set_question_key(struct hook *h)
{
	h->scratch->twin = h->scratch->asked;
	h->scratch->twin.row = ROW_ASKED;
}

static inline void ask_next(struct hook *h)
{
	__u32 slot = h->scratch->next;
	struct flow *question;
	struct guest *g;
	__u32 tap;

	if (slot >= h->pod->guest_count || slot >= GUESTS_PER_POD)
		return;
	h->scratch->next = slot + 1;
	tap = h->pod->taps[slot];
	g = find_guest(h->p->pod_id, tap);
	if (!g || !spoken_family(g, h->scratch->asked.family) || !ask_one(h, tap, g))
		return;
	set_question_key(h);
	question = bpf_map_lookup_elem(h->flows, &h->scratch->twin);
	if (question)
		__sync_fetch_and_add(&question->refused, 1);
}

/* Begin: the rest is done by ask(), which this becomes. */
static inline int ask_all(struct hook *h)
{
	struct flow *question = &h->scratch->fwd;
	__u64 now = bpf_ktime_get_ns();

	h->scratch->asked = h->p->key;
	h->scratch->packet = *h->p;
	h->scratch->next = 0;
	*question = (struct flow){.asked = h->scratch->candidates, .created_ns = now, .last_ns = now};
	set_question_key(h);
	if (bpf_map_update_elem(h->flows, &h->scratch->twin, question, BPF_ANY))
		return count_drop(h->p, DROP_TABLE_FULL);
	programs.call(h->skb, PROGRAM_ASK);
	return count_drop(h->p, DROP_TABLE_FULL); /* not reached: the program is loaded before this one */
}
