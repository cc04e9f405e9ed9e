/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Why the router dropped a packet: one list, for the program that counts and for Python, which reads this file. A
 * reason's place in the list is its index in `struct counters`; append only, or bump nothing: the pin path carries a
 * hash of this file.
 */
#define DROP_REASONS(X)                                                                            \
	X(MALFORMED, "frame cut short, or lengths in it that contradict each other")               \
	X(UNKNOWN_GUEST, "came from a TAP that no guest of the pod is registered for")             \
	X(SPOOFED_MAC, "source MAC address is not the guest's")                                    \
	X(SPOOFED_IPV4, "IPv4 source address is not the guest's")                                  \
	X(SPOOFED_IPV6, "IPv6 source address is not the guest's")                                  \
	X(SPOOFED_ARP, "ARP speaks for another's address")                                         \
	X(SPOOFED_ND, "neighbour advertisement speaks for another's address")                      \
	X(ROUTER_ND, "router advertisement or redirect from a guest")                              \
	X(MARTIAN, "destination is a loopback or IPv4-mapped address")                             \
	X(RESERVED_GROUP, "destination is an IEEE 802.1D reserved group address")                  \
	X(VLAN, "VLAN-tagged frame")                                                               \
	X(ETHERTYPE, "neither ARP nor IP")                                                         \
	X(FRAGMENT, "fragment for the pod's localhost, without the first one known")               \
	X(EXTENSION, "IPv6 extension headers, or IPv4 options where IPv6 is to come of it")        \
	X(TOO_BIG, "larger than the guest's MTU: a UDP sender was told")                             \
	X(NO_PORT, "no free source port for a new flow")                                           \
	X(TABLE_FULL, "the flow table took no new entry")                                          \
	X(REWRITE_FAILED, "the kernel refused to change the packet")                               \
	X(REFUSED_BY_SOME, "refusal held back: other guests may still serve the port")             \
	X(LATE_ANSWER, "answer of a guest that was not the first to serve the port")               \
	X(PATH_MTU, "a guest's word on path MTU, which would shrink the pod's whole loopback")     \
	X(NO_CHECKSUM, "IPv4 datagram without a checksum, which IPv6 does not allow")              \
	X(UNTRANSLATABLE, "ICMP error that the other IP version does not have")
