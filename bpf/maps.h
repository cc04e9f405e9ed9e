/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Every map and struct of the router, and the only description of them. router/tables.py mirrors the bytes and
 * tests/bpf/test_layout.py compares the two field by field.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d, so that there is one path for both families (as in
 * passt's inany.h). Ports are in network order; everything else is in host order. Padding is explicit and zero: a
 * hash map compares keys byte by byte.
 */
#pragma once

#include "reasons.h"

#define LO_IFINDEX 1 /* in every network namespace: include/net/net_namespace.h, LOOPBACK_IFINDEX */

#define PODS_MAX 4096
#define GUESTS_MAX 16384     /* of all pods together */
#define GUESTS_PER_POD 64    /* the bound of the loop that asks them all */
#define PORTS_MAX 65536      /* of all pods together */
#define FLOWS_PER_POD 32768  /* entries; a flow has two */

struct addr {
	__u32 word[4];
};
_Static_assert(sizeof(struct addr) == 16, "addr");

/* --- pods ------------------------------------------------------------------------------------------------------ */

struct pod {
	struct addr ipv4; /* the bridge's, which is what `localhost` means to a guest */
	struct addr ipv6;
	__u32 ifindex; /* of the bridge */
	__u8 mac[6];
	__u16 guest_count;
	/* The pod's own addresses to the outside, and the link that has them; 0 and :: where there is none. */
	struct addr uplink_ipv4;
	struct addr uplink_ipv6;
	__u32 uplink;
	__u32 uplink_translates; /* guests' own connections to the outside, in this namespace: see find_server() */
	/* What is unused for so long is forgotten. UDP flows are decided anew by the program; of TCP's the table is swept by
	 * whoever looks into it (router/tables.py), and the oldest go when it is full. */
	__u32 udp_idle_s;
	__u32 tcp_idle_s;
	__u32 tcp_closed_s; /* a connection that is closed, or was never answered */
	__u32 owner; /* of those who share this router, who made it: only who made it removes it */
	__u32 taps[GUESTS_PER_POD]; /* ifindex of each guest's TAP; the first guest_count are valid */
};
_Static_assert(sizeof(struct pod) == 100 + 4 * GUESTS_PER_POD, "pod");

BPF_F_TABLE("hash", __u32, struct pod, pods, PODS_MAX, BPF_F_NO_PREALLOC);

/* --- guests ---------------------------------------------------------------------------------------------------- */

struct guest_key {
	__u32 pod;
	__u32 ifindex; /* of the guest's TAP */
};
_Static_assert(sizeof(struct guest_key) == 8, "guest_key");

struct guest {
	struct addr ipv4;
	struct addr ipv6;
	__u32 mtu; /* bytes from the IP header on */
	__u16 index;
	__u8 mac[6];
	/* Has the guest ever sent from its address? Until it has, nobody is sent to it: whoever dials while it boots, or
	 * dials ::1 and the guest knows no IPv6, is refused at once. Two bytes, for they are set without a lock. */
	__u8 seen_ipv4;
	__u8 seen_ipv6;
	__u8 pad[2];
	__u32 rate_link; /* ifindex of the link whose qdisc limits what it sends: see shaped() */
};
_Static_assert(sizeof(struct guest) == 52, "guest");

BPF_F_TABLE("hash", struct guest_key, struct guest, guests, GUESTS_MAX, BPF_F_NO_PREALLOC);

/* --- who serves a port ------------------------------------------------------------------------------------------ */

struct port_key {
	__u32 pod;
	__u16 port;  /* network order */
	__u8 family; /* 4 or 6 */
	__u8 proto;
};
_Static_assert(sizeof(struct port_key) == 8, "port_key");

struct port_owner {
	__u32 ifindex;  /* of the owner's TAP */
	__u32 declared; /* 1: by its user, and stays. 0: learned from an answer, and is forgotten at the first refusal. */
};
_Static_assert(sizeof(struct port_owner) == 8, "port_owner");

BPF_F_TABLE("hash", struct port_key, struct port_owner, ports, PORTS_MAX, BPF_F_NO_PREALLOC);

/* --- flows ------------------------------------------------------------------------------------------------------ */

struct flow_key {
	__u32 ifindex; /* where the packet is met: leaving `lo`, or coming in from a TAP */
	__u8 family;   /* 4 or 6 */
	__u8 proto;
	__u16 row; /* ROW_* */
	struct addr saddr;
	struct addr daddr;
	__u16 sport; /* network order */
	__u16 dport;
};
_Static_assert(sizeof(struct flow_key) == 44, "flow_key");

/* What a row is about. Packets match ROW_PACKETS; the other kinds live beside them, so that one eviction pool per pod
 * holds all that is remembered about its traffic. */
enum {
	ROW_PACKETS,
	ROW_ASKED,    /* a question put to several guests: how many were asked, how many refused */
	ROW_FRAGMENTS /* sport, dport = the IP identification: where a datagram's further fragments go */
};

enum {
	FLOW_FORWARD = 1, /* from who opened the flow */
	FLOW_REVERSE,     /* the answers to it */
	FLOW_CANDIDATE    /* the answers of one of several guests that were asked: no forward entry yet */
};

enum {
	SEEN_ANSWER = 1, /* TCP: SYN-ACK, UDP: anything, in this direction */
	SEEN_FIN = 2,
	SEEN_RST = 4,    /* TCP: RST; UDP: ICMP port unreachable */
	SEEN_REFUSAL = 8 /* of a candidate */
};

struct flow {
	struct addr saddr; /* what the packet is rewritten to; saddr and daddr are stored with one helper call */
	struct addr daddr;
	__u16 sport; /* network order */
	__u16 dport;
	__u8 dmac[6]; /* likewise together */
	__u8 smac[6];
	__u32 ifindex;  /* where the packet goes: into `lo` as received, out of a TAP as sent */
	__u32 csum_diff; /* new minus old addresses, one's complement: see bpf_csum_diff() */
	__u32 mtu;      /* of where it goes */
	__u8 role;      /* FLOW_* */
	__u8 seen;      /* SEEN_* */
	__u8 family;    /* of what the packet becomes: another than it was, for a guest that speaks one alone */
	__u8 pad;
	__u32 asked;   /* ROW_ASKED only; ROW_FRAGMENTS: the identification that the fragments get */
	__u32 refused; /* ROW_ASKED only; atomic */
	__u32 idle_s;  /* UDP: after so long it is decided anew */
	__u32 pad2;
	/* Plain adds: a flow's direction is one queue, and a count lost in a race is worth less than a locked add. */
	__u64 created_ns; /* CLOCK_MONOTONIC */
	__u64 last_ns;
	__u64 packets;
	__u64 bytes;
};
_Static_assert(sizeof(struct flow) == 112, "flow");

/* Pod id -> that pod's flows: an LRU each, so that one pod's load never evicts another's. router/tables.py makes the
 * inner maps; this one only tells the kernel and bcc what they look like. */
BPF_TABLE("lru_hash", struct flow_key, struct flow, flow_template, FLOWS_PER_POD);
BPF_HASH_OF_MAPS(flows, __u32, "flow_template", PODS_MAX);

/* To which ports has a flow of some pod's ever left `lo`: guests' that are served there, and those by which guests are
 * known to containers. What leaves `lo` for any other port is between containers, and the flow table need not be asked.
 * One byte a port, not a bit: bytes are set without a lock. Never cleared: a stale byte costs a lookup. */
struct served_ports {
	__u8 port[65536];
};

BPF_ARRAY(served_ports, struct served_ports, 1);

/* --- counters --------------------------------------------------------------------------------------------------- */

enum drop_reason {
#define REASON(name, text) DROP_##name,
	DROP_REASONS(REASON)
#undef REASON
	DROP_REASONS_COUNT
};
#define DROP_SLOTS 32
_Static_assert(DROP_REASONS_COUNT <= DROP_SLOTS, "more reasons than slots");

struct counters {
	__u64 dropped[DROP_SLOTS];
	__u64 redirected; /* packets sent along a flow */
	__u64 passed;     /* frames of guests left to the bridge; not counted on `lo`, where speed matters more */
};
_Static_assert(sizeof(struct counters) == 8 * (DROP_SLOTS + 2), "counters");

BPF_F_TABLE("percpu_hash", __u32, struct counters, pod_counters, PODS_MAX, BPF_F_NO_PREALLOC);

/* --- what is dropped -------------------------------------------------------------------------------------------- */

/* Pod id -> a ring for whoever watches that pod's drops (`uklaunch drops -f`): it is there while somebody does, and each
 * dropped packet's `struct packet` goes into it. One that does not fit is lost: the counters count it all the same. */
BPF_RINGBUF_OUTPUT(drops_template, 1);
BPF_HASH_OF_MAPS(drops, __u32, "drops_template", PODS_MAX);

/* --- scratch ---------------------------------------------------------------------------------------------------- */

/* What the parser says of a packet (parse.h); of a dropped one, also what those see who watch. */
struct packet {
	struct flow_key key;
	__u32 pod_id;
	__u32 l4;        /* offset of the TCP, UDP or ICMP header */
	__u32 csum;      /* offset of the TCP or UDP checksum */
	__u32 ip_id;     /* of a fragment: its identification; network order */
	__u16 ethertype; /* network order */
	__u16 ip_csum;   /* IPv4's, as it stands in the header */
	__u8 kind;       /* KIND_* */
	__u8 fragment;   /* FRAGMENT_* */
	__u8 tcp_flags;
	__u8 reason;     /* DROP_*, once dropped */
};
_Static_assert(sizeof(struct packet) == 68, "packet");

/* Entries under construction: the stack's 512 bytes do not hold them. And what a loop computes: to the verifier, memory
 * in a map has no known value, so that it sees the states of a loop's end as one and not as one per way through it.
 * Per CPU, and used with softirqs off: nothing of ours comes in between. */
struct scratch {
	struct flow fwd;
	struct flow rev;
	struct flow_key asked;   /* what several guests are asked, as its sender wrote it */
	struct flow_key current; /* the copy of it that was sent last */
	struct flow_key key;
	struct flow_key twin;
	struct bpf_sock_tuple sockets;
	__u32 candidates; /* guests that may serve the port */
	__u32 candidate;  /* the TAP of one of them */
	struct packet packet; /* for the program that a tail call leads to */
	__u32 next;           /* which of the pod's guests it is to ask */
	__u8 neighbour[6];    /* MAC addresses of a packet from outside: whom it came from */
	__u8 uplink[6];       /* and to */
	__u32 fragments_id;   /* what the fragments of the datagram in hand are marked with */
	__u8 bytes[96];       /* headers being read or built; the largest: IPv6, ICMPv6, IPv6, UDP */
};

BPF_PERCPU_ARRAY(scratch, struct scratch, 1);

/* --- programs --------------------------------------------------------------------------------------------------- */

enum {
	PROGRAM_DECIDE,
	PROGRAM_ASK,
	PROGRAM_LOCALHOST,
	PROGRAMS
};

BPF_PROG_ARRAY(programs, PROGRAMS);
