"""What the router is told and what it tells, as frozen dataclasses. No I/O, no bytes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """After how many seconds without a packet a flow is forgotten; the defaults are those of Linux's conntrack
    (Documentation/networking/nf_conntrack-sysctl.rst)."""

    udp_s: int = 30
    tcp_s: int = 5 * 24 * 3600
    tcp_closed_s: int = 120  # a connection that is closed, or was never answered


@dataclass(frozen=True, slots=True, kw_only=True)
class PodRow:
    """A pod's bridge, whose addresses are `localhost` to its guests. `owner`: a number for whoever adds it."""

    ifindex: int
    mac: bytes
    ipv4: IPv4Address
    ipv6: IPv6Address
    timeouts: Timeouts = Timeouts()
    owner: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class UplinkRow:
    """The link to the outside and the pod's addresses on it, at which guests' ports are reached too.

    `translates`: guests' own connections to the outside are translated in the pod's namespace, behind those addresses.
    Then a datagram that comes in may be an answer to one of theirs, and goes to a guest only by a port that is known.
    """

    ifindex: int
    ipv4: IPv4Address | None
    ipv6: IPv6Address | None
    translates: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRow:
    """A guest; `ifindex` is its TAP's. `ports` are those its user declared: ("tcp", 80). `rate_link`: the ifindex of a
    veth whose qdisc limits what the guest sends, `Router.shaped_fd` being attached to the TAP and the veth's peer.

    `seen_ipv4` and `seen_ipv6` are the router's to set: whether the guest has ever sent from its address.
    """

    index: int
    ifindex: int
    mac: bytes
    ipv4: IPv4Address
    ipv6: IPv6Address
    ports: tuple[tuple[str, int], ...] = ()
    mtu: int = 1500
    rate_link: int = 0
    seen_ipv4: bool = False
    seen_ipv6: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PortRow:
    """A guest serves a port: because its user said so, or because it was the first to answer for it."""

    protocol: str
    family: int  # 4 or 6
    number: int
    guest: int | None  # its index; None: it has left this moment
    declared: bool


class FlowState(StrEnum):
    ASKING = "asking"  # put to several guests, none of which has answered
    OPENING = "opening"  # sent, not answered
    OPEN = "open"
    CLOSING = "closing"  # one side has finished
    CLOSED = "closed"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """`guest` is a guest's index, or None: something in the pod's own namespace or, `outside`, beyond its uplink."""

    guest: int | None
    address: Address
    port: int
    outside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """`opener` dialled `dialled` and was sent to `server`, which sees it as `seen_as`."""

    protocol: str
    opener: Endpoint
    dialled: Endpoint
    server: Endpoint
    seen_as: Endpoint
    state: FlowState
    packets_sent: int  # by the opener
    bytes_sent: int
    packets_received: int
    bytes_received: int
    age_s: float
    idle_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Severed:
    """A TCP connection whose other end, a guest, is gone. `address` and `port` are the end that is left; `peer_*` the
    other one, as that end knows it."""

    address: Address
    port: int
    peer_address: Address
    peer_port: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A version of the router that is loaded, and how many pods it serves. `ours`: of these very sources."""

    directory: Path
    pods: int
    ours: bool


@dataclass(frozen=True, slots=True)
class Reason:
    """Why packets were counted: a drop reason of bpf/reasons.h, or one of the two totals below."""

    name: str
    text: str

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """A packet that was dropped. `guest`: the index of who sent it; None: it came from outside or, `on_loopback`, from
    a container. Addresses and protocol are None for what is not IP; `protocol` is a number as text if it is neither
    tcp nor udp; ports are 0 where there are none."""

    reason: Reason
    guest: int | None
    on_loopback: bool
    ethertype: int
    protocol: str | None
    source: Address | None
    source_port: int
    target: Address | None
    target_port: int


REDIRECTED = Reason("REDIRECTED", "sent along a flow")
PASSED = Reason("PASSED", "guests' frames left to the bridge")
