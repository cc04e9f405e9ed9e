/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One localhost for all of a pod's containers and guests.
 *
 * Theory of Operation
 * ===================
 *
 * One program serves every pod of the host, at three hooks, attached by clsact and cls_bpf in direct-action mode. The
 * filter's class id is the pod's id.
 *
 *      pod's network namespace
 *      +----------------------------------------------------------------+
 *      |  containers                                                    |
 *      |   |      ^                                                     |
 *      |   v      | redirect into lo                                    |
 *      |   lo ----+--------------------------------+                    |
 *      |   | egress: HERE                          |                    |
 *      |   |                                       |                    |
 *      |   |  redirect out of the TAP              |                    |
 *      |   +---------------------------> uktap2 ---+ ingress: HERE      |
 *      |                                  |   \                         |
 *      |            what is not ours      |    ukbr0 169.254.77.1       |
 *      |            goes on to the bridge |          fd00:77::1         |
 *      +----------------------------------|-----------------------------+
 *                                       guest: `localhost` is the bridge's address
 *
 * A packet is looked up in the pod's flow table by where it is met and by its addresses and ports. A hit says what it
 * becomes and where it goes: rewrite, redirect, done. Neither bridge, routing, ARP nor conntrack see it.
 *
 * A miss decides if the packet opens something (a TCP SYN, any UDP datagram) and is for the pod's localhost:
 *
 *      from a container, to 127.0.0.1:p, ::1:p or the bridge's address
 *          a socket of the pod has p           pass
 *          a guest serves p                    bridge:e -> guest:p, out of its TAP
 *          else                                pass, and the pod's stack refuses it at once
 *
 *      from a guest, to the bridge's address
 *          a socket has 127.0.0.1:p or ::1:p   127.0.0.1:x -> 127.0.0.1:p, into lo; x mostly from 61000 up
 *          a socket has bridge:p               pass
 *          a guest serves p, this one too      bridge:e -> guest:p, out of its TAP
 *          else                                pass, likewise
 *
 * Servers in containers thus see a loopback address as their peer, guests see what is `localhost` to them. "A guest
 * serves p" is for ports.h to say, and "guest" means one that has been heard in this family: guard.h.
 *
 * Any other miss on `lo` is traffic between containers and passes, after as little work as possible; any other miss on
 * a TAP has to get past the guard and goes on to the bridge. Errors by ICMP about flows go where the flow goes: icmp.h.
 *
 * What may go wrong, and what is done about it
 * --------------------------------------------
 * - An entry is evicted (LRU), or its guest leaves: packets of its flow miss. On `lo` the pod's stack answers a segment
 *   that it knows no connection for, with a RST.
 * - A SYN meets an entry: a repetition, or a new connection by an old name. Decided anew, since a container may have
 *   started or stopped listening; if it comes out the same, the entry is used on.
 * - Two flows would look the same to a server: the second is given another source port. See open_flow().
 *
 * Files: maps.h every map and struct, reasons.h why packets are dropped, parse.h frame to key, rewrite.h key to frame,
 * guard.h what guests may send, flows.h the table, ports.h and ask.h who serves a port, icmp.h errors.
 */
#include <linux/pkt_cls.h>

#include "ask.h"
#include "icmp.h"

/* cls_bpf hands its class id to the program: net/sched/cls_bpf.c, cls_bpf_classify(). BPF_PROG_TEST_RUN cannot set one,
 * so tests compile with -DPOD_ID_IN_MARK. */
#ifdef POD_ID_IN_MARK
#define POD_ID(skb) ((skb)->mark)
#else
#define POD_ID(skb) ((skb)->tc_classid)
#endif

/* What a TCP segment tells about its flow, beyond that it is alive. Most tell nothing. */
static inline void note_segment(struct packet *p, struct flow *f)
{
	if (!(p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)))
		return;
	if (f->role == FLOW_REVERSE && !(f->seen & SEEN_ANSWER) && p->key.ifindex != LO_IFINDEX) {
		if (p->tcp_flags & TCP_RST)
			forget_owner(p, f);
		else
			learn_owner(p, f);
	}
	if (p->tcp_flags & TCP_SYN)
		f->seen |= SEEN_ANSWER;
	if (p->tcp_flags & TCP_FIN)
		f->seen |= SEEN_FIN;
	if (p->tcp_flags & TCP_RST)
		f->seen |= SEEN_RST;
}

static inline void note_datagram(struct packet *p, struct flow *f)
{
	if (f->seen & SEEN_ANSWER)
		return;
	f->seen |= SEEN_ANSWER;
	if (f->role == FLOW_REVERSE && p->key.ifindex != LO_IFINDEX)
		learn_owner(p, f);
}

static inline int fits(struct __sk_buff *skb, struct packet *p, struct flow *f)
{
	__u32 length = skb->len - L3;

	if (f->family != p->key.family)
		length += f->family == 6 ? sizeof(struct ipv6hdr) - sizeof(struct iphdr) :
					   sizeof(struct iphdr) - sizeof(struct ipv6hdr);
	return length <= f->mtu || skb->gso_size;
}

/* The table evicts what has not been looked up for longest, while the answers of a flow may take long: now and then, the
 * entry for them is looked up as well. */
#define KEPT_FOR_NS_LOG2 26 /* 67 ms */

static inline void keep_twin(void *table, struct packet *p, struct flow *f)
{
	struct flow_key twin;

	reverse_key(&twin, &p->key, f);
	bpf_map_lookup_elem(table, &twin);
}

/* A packet is about to go along its flow. */
static inline void note(struct __sk_buff *skb, void *table, struct packet *p, struct flow *f)
{
	__u64 now = bpf_ktime_get_ns();

	if (p->key.proto == IPPROTO_TCP)
		note_segment(p, f);
	else
		note_datagram(p, f);
	if ((now ^ f->last_ns) >> KEPT_FOR_NS_LOG2)
		keep_twin(table, p, f);
	f->last_ns = now;
	f->packets++;
	f->bytes += skb->len;
}

static inline int is_opening(struct packet *p)
{
	return p->key.proto == IPPROTO_UDP || (p->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
}

/* Does the entry tell what to do with the packet, or is it to be decided anew? */
static inline int is_settled(struct packet *p, struct flow *f)
{
	if (f->role == FLOW_CANDIDATE)
		return 0;
	if (p->key.proto == IPPROTO_TCP)
		return !is_opening(p);
	return f->role != FLOW_FORWARD ||
	       (!(f->seen & SEEN_RST) && bpf_ktime_get_ns() - f->last_ns < f->idle_s * SECOND_NS);
}

/* --- the long way: what the table does not settle ---------------------------------------------------------------- */

static inline int is_localhost(struct hook *h)
{
	struct addr *to = &h->p->key.daddr;
	struct addr loopback;

	if (h->pod->uplink && same_addr(to, uplink_addr(h->pod, h->p->key.family)))
		return 1;
	if (is_from_outside(h))
		return 0;
	set_loopback(&loopback, h->p->key.family);
	if (same_addr(to, bridge_addr(h->pod, h->p->key.family)))
		return 1;
	return !h->self && same_addr(to, &loopback);
}

/* PASS: leave it to the pod's own stack */
#define DECIDED_PASS 0

/* Where does a new flow go? LO_IFINDEX, a TAP's ifindex, or DECIDED_PASS; 0 with scratch->candidates: ask them. *family:
 * that of who serves. */
static inline __u32 decide_server(struct hook *h, __u8 *family)
{
	struct packet *p = h->p;
	struct addr loopback;
	struct guest *to;
	__u16 sport = p->key.proto == IPPROTO_TCP ? 0 : p->key.sport;
	__u8 other = p->key.family == 4 ? 6 : 4;
	int by_bridge = h->self && same_addr(&p->key.daddr, bridge_addr(h->pod, p->key.family));
	__u32 ifindex, i;

	h->scratch->candidates = 0;
	h->scratch->candidate = 0;
	/* A container's socket: on the loopback address, for a guest that dials the bridge's; by the packet as it is; and
	 * for a guest that speaks one IP version alone, on the other's loopback address. One loop, for the helper call and
	 * what leads to it are long. */
#pragma nounroll
	for (i = 0; i < 3; i++) {
		if (i != 1 && (!by_bridge || (i == 2 && spoken_family(h->self, other) == other)))
			continue;
		*family = i == 2 ? other : p->key.family;
		set_loopback(&loopback, *family);
		if (find_socket(h, *family, i == 1 ? &p->key.saddr : &loopback, i == 1 ? sport : 0,
				i == 1 ? &p->key.daddr : &loopback, p->key.dport))
			return i == 1 ? DECIDED_PASS : LO_IFINDEX;
	}
	*family = p->key.family;
	ifindex = find_server(h);
	to = ifindex ? find_guest(p->pod_id, ifindex) : NULL;
	if (to)
		*family = spoken_family(to, p->key.family);
	return ifindex;
}

/* The first packet of a flow, or one that has to be decided anew: the entry to send it along, or NULL and a verdict. */
static inline struct flow *open(struct hook *h, struct flow *old, int *verdict)
{
	struct packet *p = h->p;
	struct guest *to = NULL;
	__u32 ifindex, reason;
	__u8 family;

	*verdict = TC_ACT_UNSPEC;
	ifindex = decide_server(h, &family);
	if (old && old->role == FLOW_FORWARD && ifindex && old->ifindex == ifindex && old->family == family) {
		old->seen = 0;
		return old;
	}
	if (old)
		forget_flow(h, old);
	if (p->key.ifindex == LO_IFINDEX && (ifindex || h->scratch->candidates))
		note_served(p->key.dport);
	if (h->scratch->candidates) {
		*verdict = ask_all(h);
		return NULL;
	}
	if (ifindex == DECIDED_PASS)
		return NULL;
	if (ifindex != LO_IFINDEX) {
		to = find_guest(p->pod_id, ifindex);
		if (!to)
			return NULL;
	}
	old = open_flow(h, ifindex, to, family, &reason);
	if (!old)
		*verdict = count_drop(p, reason);
	return old;
}

/* May the packet be changed into the flow's IP version? A drop reason, or -1. */
static inline int check_translation(struct hook *h, struct flow *f)
{
	struct packet *p = h->p;
	__u16 csum;

	if (f->family == p->key.family)
		return -1;
	if (p->fragment)
		return DROP_FRAGMENT;
	if (p->l4 != L3 + (p->key.family == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr)))
		return DROP_EXTENSION;
	if (p->key.proto == IPPROTO_UDP && f->family == 6 &&
	    (bpf_skb_load_bytes(h->skb, p->csum, &csum, sizeof(csum)) < 0 || !csum))
		return DROP_NO_CHECKSUM;
	return -1;
}

/* A packet with an entry, fragments and all. */
static inline int forward_carefully(struct hook *h, struct flow *f)
{
	struct packet *p = h->p;
	int reason = check_translation(h, f);

	if (reason >= 0)
		return count_drop(p, reason);
	if (!fits(h->skb, p, f))
		return too_big(h, f);
	if (p->fragment && remember_fragments(h, f))
		return count_drop(p, DROP_TABLE_FULL);
	note(h->skb, h->flows, p, f);
	if (rewrite(h->skb, p, f) ||
	    (p->fragment && store_identification(h->skb, p, h->scratch->fragments_id)))
		return count_drop(p, DROP_REWRITE_FAILED);
	return redirect(p->pod_id, f);
}

/* A packet that no entry is for: a verdict, or SEND_ALONG the one that *f now is. */
static inline int consider(struct hook *h, struct flow **f)
{
	struct packet *p = h->p;
	int verdict = TC_ACT_UNSPEC;

	if (p->kind == KIND_ICMP)
		return forward_error(h);
	if (!is_localhost(h))
		return TC_ACT_UNSPEC;
	if (p->kind == KIND_FRAGMENT) {
		if (p->key.proto != IPPROTO_TCP && p->key.proto != IPPROTO_UDP)
			return TC_ACT_UNSPEC;
		return forward_fragment(h);
	}
	if (p->kind == KIND_EXTENSION)
		return count_drop(p, DROP_EXTENSION);
	if (p->kind != KIND_FLOW || !is_opening(p))
		return TC_ACT_UNSPEC;
	*f = open(h, *f, &verdict);
	if (*f)
		return SEND_ALONG;
	if (verdict == TC_ACT_UNSPEC && p->fragment)
		remember_fragments(h, NULL);
	return verdict;
}

/* Reached by a tail call only: see PROGRAM_DECIDE. */
int decide(struct __sk_buff *skb)
{
	struct packet p;
	struct hook h = {.skb = skb, .p = &p};
	struct flow *f = NULL;
	int zero = 0, verdict, reason;

	h.scratch = scratch.lookup(&zero);
	if (!h.scratch)
		return TC_ACT_SHOT;
	p = h.scratch->packet;
	h.flows = flows.lookup(&p.pod_id);
	h.pod = pods.lookup(&p.pod_id);
	if (!h.flows || !h.pod) /* the pod is going away */
		return p.key.ifindex == LO_IFINDEX ? TC_ACT_UNSPEC : TC_ACT_SHOT;
	if (is_from_outside(&h)) {
		if (bpf_skb_load_bytes(skb, 0, h.scratch->uplink, ETH_ALEN) < 0 ||
		    bpf_skb_load_bytes(skb, ETH_ALEN, h.scratch->neighbour, ETH_ALEN) < 0)
			return TC_ACT_UNSPEC;
	} else if (p.key.ifindex != LO_IFINDEX) {
		h.self = find_guest(p.pod_id, p.key.ifindex);
		if (!h.self)
			return count_drop(&p, DROP_UNKNOWN_GUEST);
	}
	if (p.kind == KIND_FLOW && !skb->vlan_present)
		f = bpf_map_lookup_elem(h.flows, &p.key);
	verdict = SEND_ALONG;
	if (f && f->role == FLOW_CANDIDATE) {
		verdict = from_candidate(&h, f);
	} else if (!f || !is_settled(&p, f)) {
		if (h.self) {
			reason = check_guest(skb, &p, h.self);
			if (reason >= 0)
				return count_drop(&p, reason);
		}
		verdict = consider(&h, &f);
	}
	if (verdict == SEND_ALONG && f)
		return forward_carefully(&h, f);
	if (verdict == TC_ACT_UNSPEC && h.self)
		count_passed(p.pod_id);
	return verdict;
}

/* Reached by a tail call only: see ask.h. */
int ask(struct __sk_buff *skb)
{
	struct packet p;
	struct hook h = {.skb = skb, .p = &p};
	int zero = 0, i;

	h.scratch = scratch.lookup(&zero);
	if (!h.scratch)
		return TC_ACT_SHOT;
	p = h.scratch->packet;
	h.flows = flows.lookup(&p.pod_id);
	h.pod = pods.lookup(&p.pod_id);
	if (!h.flows || !h.pod)
		return TC_ACT_SHOT;
	if (p.key.ifindex != LO_IFINDEX && !is_from_outside(&h)) {
		h.self = find_guest(p.pod_id, p.key.ifindex);
		if (!h.self)
			return TC_ACT_SHOT;
	}
	for (i = 0; i < ASKED_PER_TURN; i++)
		ask_next(&h);
	if (h.scratch->next < h.pod->guest_count) {
		h.scratch->packet = p;
		programs.call(skb, PROGRAM_ASK);
	}
	return TC_ACT_STOLEN; /* a drop on `lo` would be the sender's congestion: net/ipv4/tcp_output.c, tcp_enter_cwr */
}

/* --- the short way: what is attached ----------------------------------------------------------------------------- */

/* The shortest way out, for what is most of the traffic on `lo` and none of ours. It costs parsing and one byte. */
static inline int is_among_containers(struct packet *p)
{
	struct served_ports *served;
	int zero = 0;

	if (p->kind != KIND_FLOW)
		return p->kind != KIND_ICMP && p->kind != KIND_FRAGMENT;
	if (is_opening(p))
		return 0;
	served = served_ports.lookup(&zero);
	return served && !served->port[p->key.dport];
}

int localhost(struct __sk_buff *skb)
{
	struct packet p = {};
	struct scratch *s;
	struct flow *f = NULL;
	void *table;
	int zero = 0, on_lo;

	p.key.ifindex = skb->ifindex;
	on_lo = p.key.ifindex == LO_IFINDEX;
	parse(skb, &p);
	if (on_lo && is_among_containers(&p))
		return TC_ACT_UNSPEC;
	p.pod_id = POD_ID(skb);
	table = flows.lookup(&p.pod_id);
	if (!table)
		return on_lo ? TC_ACT_UNSPEC : TC_ACT_SHOT;
	if (p.kind == KIND_FLOW && !p.fragment && !skb->vlan_present) {
		f = bpf_map_lookup_elem(table, &p.key);
		if (f && f->family == p.key.family && is_settled(&p, f) && fits(skb, &p, f)) {
			note(skb, table, &p, f);
			if (rewrite_l4(skb, &p, f) || store_addrs(skb, &p, f))
				return count_drop(&p, DROP_REWRITE_FAILED);
			return redirect(p.pod_id, f);
		}
		if (!f && on_lo && !is_opening(&p))
			return TC_ACT_UNSPEC;
	}
	s = scratch.lookup(&zero);
	if (!s)
		return TC_ACT_SHOT;
	s->packet = p;
	programs.call(skb, PROGRAM_DECIDE);
	return TC_ACT_SHOT; /* not reached: the program is loaded before this one */
}

/* In `localhost`'s place on the TAP of a guest whose sending is limited. What comes in has no queue to wait in, and TCP
 * does not find a rate by losses alone where a round trip takes microseconds: so a packet makes a detour through a link
 * that has a queue, a veth pair, and comes back.
 *
 *      guest ---> uktap2 ---1---> ukrate2 [tbf] ===> ukrate2b ---2---> uktap2 ---3---> localhost()
 *
 * The mark, which nothing that comes from a TAP has, says how far it is. This program sits at both ends. Who has no limit
 * pays nothing for those who do. */
int shaped(struct __sk_buff *skb)
{
	__u32 pod_id = POD_ID(skb);
	struct guest *g;

	if (skb->mark == skb->ifindex) {
		skb->mark = 0; /* 3 */
	} else if (skb->mark) {
		return bpf_redirect(skb->mark, BPF_F_INGRESS); /* 2 */
	} else {
		g = find_guest(pod_id, skb->ifindex);
		if (g && g->rate_link) {
			skb->mark = skb->ifindex; /* 1 */
			return bpf_redirect(g->rate_link, 0);
		}
	}
	programs.call(skb, PROGRAM_LOCALHOST);
	return TC_ACT_SHOT; /* not reached: the program is loaded before this one */
}
