/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The flow table: entries in pairs, and what becomes of them.
 *
 *        who opens                                             who serves
 *     s:sport -> d:dport    --- FORWARD --->    s':sport' -> d':dport'
 *     d:dport -> s:sport    <-- REVERSE ----    d':dport' -> s':sport'
 *
 * Either entry's action, turned round, is the other's key: neither needs to store where its twin is. The reverse entry
 * goes in first and only if its key is free (BPF_NOEXIST): that it went in is what reserves s':sport'. The forward
 * entry follows; if it cannot, the reverse one is taken back (as in cilium's bpf/lib/nat.h).
 */
#pragma once

#include "guard.h"
#include "rewrite.h"

/* Source ports for flows whose own is taken: above the kernel's default range for outgoing connections, so that they
 * hardly ever meet a container's own (net->ipv4.ip_local_port_range, 32768-60999). */
#define PORT_MIN 61000
#define PORT_COUNT 4536
#define OWN_PORTS_APART 71 /* so that guests which call from the same port seldom meet */
/* And when those are used up, below it. */
#define LOW_PORT_MIN 10240
#define LOW_PORT_COUNT 22528
#define PORT_ATTEMPTS 8

#define LO_MTU 65535 /* what it takes; it says 65536 */

#define SECOND_NS 1000000000ULL
/* So long a guest that was asked may take to answer before its place is given away. */
#define ASK_NS (5 * SECOND_NS)

struct hook {
	struct __sk_buff *skb;
	struct packet *p;
	void *flows; /* the pod's */
	struct pod *pod;
	struct guest *self; /* who sends: NULL on `lo` */
	struct scratch *scratch;
};

static inline void reverse_key(struct flow_key *key, const struct flow_key *of, const struct flow *f)
{
	key->ifindex = f->ifindex;
	key->family = f->family;
	key->proto = of->proto;
	key->row = ROW_PACKETS;
	key->saddr = f->daddr;
	key->daddr = f->saddr;
	key->sport = f->dport;
	key->dport = f->sport;
}

static inline void set_loopback(struct addr *a, __u8 family)
{
	if (family == 4) {
		set_ipv4(a, be32(0x7f000001));
	} else {
		a->word[0] = 0;
		a->word[1] = 0;
		a->word[2] = 0;
		a->word[3] = be32(1);
	}
}

static inline struct addr *bridge_addr(struct pod *pod, __u8 family)
{
	return family == 4 ? &pod->ipv4 : &pod->ipv6;
}

static inline struct addr *uplink_addr(struct pod *pod, __u8 family)
{
	return family == 4 ? &pod->uplink_ipv4 : &pod->uplink_ipv6;
}

static inline int is_from_outside(struct hook *h)
{
	return h->p->key.ifindex == h->pod->uplink;
}

/* In which family a guest is spoken to by those who speak `family`: in the same, or, for guests like OSv that have IPv4
 * alone, in the other. 0: in neither. Until it has sent something from its address nobody is sent to a guest, so that
 * whoever dials while it boots is refused at once. */
static inline __u8 spoken_family(const struct guest *g, __u8 family)
{
	if (family == 4 ? g->seen_ipv4 : g->seen_ipv6)
		return family;
	if (family == 4 ? g->seen_ipv6 : g->seen_ipv4)
		return family == 4 ? 6 : 4;
	return 0;
}

/* --- sockets ---------------------------------------------------------------------------------------------------- */

#define TCP_TIME_WAIT 6 /* include/net/tcp_states.h */
#define TCP_LISTEN 10
#define UDP_SOCKET 255

/* The state of the socket of the pod's own stack that this packet would reach; 0: there is none. A TCP source port of
 * 0 asks for listeners alone: no connection has it, while one in TIME_WAIT would hide its listener. */
static inline __u32 find_socket(struct hook *h, __u8 family, const struct addr *saddr, __u16 sport,
				const struct addr *daddr, __u16 dport)
{
	struct bpf_sock_tuple *t = &h->scratch->sockets;
	struct bpf_sock *sk;
	__u32 size, state;

	if (family == 4) {
		t->ipv4.saddr = saddr->word[3];
		t->ipv4.daddr = daddr->word[3];
		t->ipv4.sport = sport;
		t->ipv4.dport = dport;
		size = sizeof(t->ipv4);
	} else {
		__builtin_memcpy(t->ipv6.saddr, saddr, sizeof(*saddr));
		__builtin_memcpy(t->ipv6.daddr, daddr, sizeof(*daddr));
		t->ipv6.sport = sport;
		t->ipv6.dport = dport;
		size = sizeof(t->ipv6);
	}
	/* No state is read of a UDP socket: the two lookups return different types, which one load cannot serve. */
	if (h->p->key.proto == IPPROTO_UDP) {
		sk = bpf_sk_lookup_udp(h->skb, t, size, BPF_F_CURRENT_NETNS, 0);
		if (!sk)
			return 0;
		bpf_sk_release(sk);
		return UDP_SOCKET;
	}
	sk = bpf_skc_lookup_tcp(h->skb, t, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return 0;
	state = sk->state;
	bpf_sk_release(sk);
	return state;
}

/* A guest that dials its own port from that port: the answers would look like the question. */
static inline int answers_itself(const struct flow_key *key, const struct flow *fwd)
{
	return fwd->ifindex == key->ifindex && key->sport == key->dport && fwd->sport == key->dport;
}

/* The server's side waits in TIME_WAIT, of a connection by the same guest from the same port: the next one may have the
 * port at once, for its timestamps go on from there (RFC 6191; net/ipv4/tcp_minisocks.c, tcp_timewait_state_process), as
 * they do not from port to port (net/core/secure_seq.c). `any`: from another port too, rather than not at all: it may take
 * the guest a second attempt, after some milliseconds. Without this a server that closes first could be called 75 times
 * a second. */
static inline int is_own_remnant(struct hook *h, const struct flow *fwd, __u32 state, int any)
{
	struct flow *old;

	if (state != TCP_TIME_WAIT || !h->self)
		return 0;
	reverse_key(&h->scratch->key, &h->p->key, fwd);
	old = bpf_map_lookup_elem(h->flows, &h->scratch->key);
	return old && old->ifindex == h->p->key.ifindex && (any || old->dport == h->p->key.sport);
}

/* Would the new flow, as the far side sees it, be mistaken for a conversation that the pod's stack has already? */
static inline int port_is_taken(struct hook *h, struct flow *fwd, int attempt)
{
	const struct flow_key *key = &h->p->key;
	__u32 state;

	if (answers_itself(key, fwd))
		return 1;
	if (fwd->ifindex != LO_IFINDEX && key->proto == IPPROTO_UDP)
		return 0; /* a socket that sends from this port to localhost and to the guest's address: it is one peer */
	if (find_socket(h, fwd->family, &fwd->daddr, fwd->dport, &fwd->saddr, fwd->sport))
		return 1;
	if (fwd->ifindex != LO_IFINDEX || key->proto == IPPROTO_UDP)
		return 0;
	/* TIME_WAIT on the server's side, of an earlier connection that the table has forgotten */
	state = find_socket(h, fwd->family, &fwd->saddr, fwd->sport, &fwd->daddr, fwd->dport);
	return state && state != TCP_LISTEN && !is_own_remnant(h, fwd, state, attempt == PORT_ATTEMPTS - 1);
}

/* A source port to try: first those that belong to the opener's own, so that it is known by the same one when it calls from
 * there again; then any. */
static inline __u16 pick_port(struct hook *h, int attempt)
{
	__u32 own = be16(h->p->key.sport) + (h->self ? h->self->index * OWN_PORTS_APART : 0);

	if (attempt < 2)
		return attempt == 0 ? PORT_MIN + own % PORT_COUNT : LOW_PORT_MIN + own % LOW_PORT_COUNT;
	own = bpf_get_prandom_u32();
	return attempt & 1 ? PORT_MIN + own % PORT_COUNT : LOW_PORT_MIN + own % LOW_PORT_COUNT;
}

/* --- entries ---------------------------------------------------------------------------------------------------- */

static inline int is_over(const struct flow *f, const struct flow *twin, __u8 proto, __u64 now)
{
	__u8 seen = f->seen | twin->seen;

	if (proto == IPPROTO_UDP)
		return seen & SEEN_RST || (now - f->last_ns > f->idle_s * SECOND_NS &&
					   now - twin->last_ns > f->idle_s * SECOND_NS);
	return seen & SEEN_RST || (f->seen & twin->seen & SEEN_FIN);
}

/* What the answers to a flow become, and, for a flow into a guest, what the guest gets. */
static inline void fill_reverse(struct hook *h, const struct flow_key *key, const struct flow *fwd, struct flow *rev,
				__u64 now)
{
	*rev = (struct flow){};
	rev->saddr = key->daddr;
	rev->daddr = key->saddr;
	rev->sport = key->dport;
	rev->dport = key->sport;
	rev->ifindex = key->ifindex;
	rev->csum_diff = ~fwd->csum_diff;
	rev->role = FLOW_REVERSE;
	rev->family = key->family;
	rev->idle_s = fwd->idle_s;
	rev->created_ns = now;
	rev->last_ns = now;
	rev->mtu = LO_MTU;
	if (h->self) {
		__builtin_memcpy(rev->dmac, h->self->mac, ETH_ALEN);
		__builtin_memcpy(rev->smac, h->pod->mac, ETH_ALEN);
		rev->mtu = h->self->mtu;
	} else if (is_from_outside(h)) {
		__builtin_memcpy(rev->dmac, h->scratch->neighbour, ETH_ALEN);
		__builtin_memcpy(rev->smac, h->scratch->uplink, ETH_ALEN);
	} /* else MACs stay zero, as `lo`'s own is */
}

/* `to`: the guest that serves; NULL: a container does. `family`: theirs. */
static inline void fill_forward(struct hook *h, const struct flow_key *key, struct flow *fwd, __u32 ifindex,
				struct guest *to, __u8 family, __u64 now)
{
	*fwd = (struct flow){};
	fwd->family = family;
	if (to) {
		/* Who comes from outside is shown as who it is, if the guest can speak to it. */
		fwd->saddr = is_from_outside(h) && family == key->family ? key->saddr : *bridge_addr(h->pod, family);
		fwd->daddr = family == 4 ? to->ipv4 : to->ipv6;
		__builtin_memcpy(fwd->dmac, to->mac, ETH_ALEN);
		__builtin_memcpy(fwd->smac, h->pod->mac, ETH_ALEN);
		fwd->mtu = to->mtu;
	} else {
		set_loopback(&fwd->saddr, family);
		fwd->daddr = fwd->saddr;
		fwd->mtu = LO_MTU;
	}
	fwd->sport = key->sport;
	fwd->dport = key->dport;
	fwd->ifindex = ifindex;
	fwd->csum_diff = addrs_diff((struct addr *)&key->saddr, &fwd->saddr);
	fwd->role = FLOW_FORWARD;
	fwd->idle_s = h->pod->udp_idle_s;
	fwd->created_ns = now;
	fwd->last_ns = now;
}

/* Put `rev` in under the key that `fwd` implies. If that key is taken by a flow that is over, that flow goes. */
static inline int reserve(struct hook *h, const struct flow *fwd, struct flow *rev, __u64 now)
{
	struct flow_key *key = &h->scratch->key, *twin_key = &h->scratch->twin;
	struct flow *old, *twin;

	reverse_key(key, &h->p->key, fwd);
	if (!bpf_map_update_elem(h->flows, key, rev, BPF_NOEXIST))
		return 0;
	old = bpf_map_lookup_elem(h->flows, key);
	if (!old)
		return -1; /* the table takes nothing, or it went this moment */
	reverse_key(twin_key, key, old);
	twin = bpf_map_lookup_elem(h->flows, twin_key);
	if (old->role == FLOW_FORWARD || (twin && !is_over(old, twin, key->proto, now)))
		return -1;
	if (old->role == FLOW_CANDIDATE && now - old->last_ns < ASK_NS)
		return -1;
	bpf_map_delete_elem(h->flows, twin_key);
	return bpf_map_update_elem(h->flows, key, rev, BPF_ANY);
}

/* The packet's own flow, both entries. */
static inline void forget_flow(struct hook *h, struct flow *f)
{
	reverse_key(&h->scratch->twin, &h->p->key, f);
	bpf_map_delete_elem(h->flows, &h->scratch->twin);
	bpf_map_delete_elem(h->flows, &h->p->key);
}

static inline void note_served(__u16 port)
{
	struct served_ports *served;
	int zero = 0;

	served = served_ports.lookup(&zero);
	if (served && !served->port[port])
		served->port[port] = 1;
}

/* A new flow to a guest, or to a container (`to` is NULL). NULL: to be counted under *reason. */
static inline struct flow *open_flow(struct hook *h, __u32 ifindex, struct guest *to, __u8 family, __u32 *reason)
{
	__u64 now = bpf_ktime_get_ns();
	struct flow *fwd = &h->scratch->fwd, *rev = &h->scratch->rev;
	int i;

	fill_forward(h, &h->p->key, fwd, ifindex, to, family, now);
	fill_reverse(h, &h->p->key, fwd, rev, now);
	*reason = DROP_NO_PORT;
#pragma nounroll
	for (i = 0; i < PORT_ATTEMPTS; i++) {
		/* A guest is shown the opener's own port if it is free; a container never: the port is another container's
		 * to connect from. */
		if (i > 0 || !to)
			fwd->sport = be16(pick_port(h, i));
		if (!port_is_taken(h, fwd, i) && !reserve(h, fwd, rev, now))
			goto reserved;
	}
	return NULL;
reserved:
	if (ifindex == LO_IFINDEX)
		note_served(fwd->sport); /* a server's answers leave `lo` for it */
	*reason = DROP_TABLE_FULL;
	if (bpf_map_update_elem(h->flows, &h->p->key, fwd, BPF_ANY)) {
		bpf_map_delete_elem(h->flows, &h->scratch->key); /* the one just reserved */
		return NULL;
	}
	return bpf_map_lookup_elem(h->flows, &h->p->key);
}
