"""A pod's uplink: how its containers and guests reach the outside, and the outside what they publish.

    nat       a pair of links of our own, masqueraded on the host; the default for pods that we make
    cni:NAME  a CNI network's
    own       what an adopted namespace has
    none      none

       host                        uk-POD.nat                           uk-POD
    ┌───────────────────┐      ┌────────────────────┐      ┌─────────────────────────────────┐
    │ eth0 ◄─ NAT ── ukID ════ outside ◄ NAT ─ inside ════ eth0 ── ukbr0 ── uktapN ── guest N │
    └───────────────────┘      └────────────────────┘      └─────────────────────────────────┘

The namespace between is there because guests' addresses are the same in every pod and must be translated, and because
who translates tracks connections: in the pod's own namespace that costs every packet of its localhost (a byte by UDP:
1.29 µs become 1.60; 60 kB by TCP: 4.5 become 5.0). An adopted namespace, and one with a CNI's uplink, does it itself.

Whatever the uplink is, guests go out behind the pod's address on it. What is done here is undone by `close`, which is
idempotent and needs nothing but the pod's record. `firewall` has the rules.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network, ip_address
from pathlib import Path
from typing import cast

import router

from . import cni, firewall, net, resolver, rootless, state
from .errors import UklaunchError, UsageError
from .firewall import HOST
from .model import AddressPlan
from .publish import Publish, check_free
from .timeline import mark

NAT, CNI, OWN, NONE = "nat", "cni:", "own", "none"
POD_LINK = "eth0"
NAT_SUFFIX = ".nat"
OUTSIDE_LINK, INSIDE_LINK = "outside", "inside"
# Between a pod and its NAT: the same everywhere, like the pod's own addresses.
INSIDE = (IPv4Interface("169.254.76.0/31"), IPv6Interface("fd00:76::1/64"))
INSIDE_POD = (IPv4Interface("169.254.76.1/31"), IPv6Interface("fd00:76::2/64"))
HOST_LINK_PREFIX = "uk"  # and the pod's id
_IPV6_FORWARDING = "net/ipv6/conf/all/forwarding"
_FORWARDING = {"net/ipv4/ip_forward": "1", _IPV6_FORWARDING: "1"}  # in a namespace of ours

DEFAULT = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))

# Where the pairs of addresses come from: pod ID gets the ID-th pair of the first range in which the host has no route
# to it. 198.18.0.0/15 is set aside for benchmarks (RFC 2544), so that nobody is there, and has a /31 (RFC 3021) for
# each of 65,536 pods; the IPv6 prefixes were drawn by chance (RFC 4193), and have a /64 for each.
RANGES = (
    (IPv4Network("198.18.0.0/15"), IPv6Network("fd5c:3a9e:71b4::/48")),
    (IPv4Network("10.118.0.0/15"), IPv6Network("fd1d:c4f0:8a26::/48")),
    (IPv4Network("172.30.0.0/15"), IPv6Network("fd92:07eb:d35c::/48")),
)


def parse(text: str) -> str:
    """`nat`, `none` or `cni:NAME`. Raises UsageError; for a CNI network also if it, or a plugin of it, is missing."""
    if text.startswith(CNI):
        cni.find(text.removeprefix(CNI))
    elif text not in (NAT, NONE):
        raise UsageError(f"--uplink {text!r} is not one that there is", "write nat, none or cni:NAME")
    return text


def choose(text: str | None, netns: Path | None) -> str:
    """The uplink of a new pod. An adopted namespace keeps its own, or none of it is used. Raises UsageError."""
    if netns is None and rootless.is_active():
        return _choose_rootless(text)
    if netns is None:
        return parse(NAT if text is None else text)
    if text not in (None, NONE):
        raise UsageError(f"--uplink {text}: a namespace that is adopted has its own uplink", "leave out --uplink")
    return OWN if text is None else text


def _choose_rootless(text: str | None) -> str:
    """The host is the user's own namespace, which pasta has joined to the real one, or has not."""
    if text is not None and text.startswith(CNI):
        raise UsageError(f"--uplink {text} needs root", "use --uplink nat, or none")
    is_joined = net.find_uplink(HOST)[0] != ""
    if text == NAT and not is_joined:
        raise UsageError("--uplink nat without root needs pasta", "apt-get install passt, on a host with a route out")
    return NAT if is_joined and text != NONE else NONE


def addresses(record: state.PodRecord) -> tuple[IPv4Address | IPv6Address, ...]:
    """The pod's own, as the outside, or the host, dials them."""
    return tuple(ip_address(text) for text in (record.uplink_ipv4, record.uplink_ipv6) if text)


def inner_addresses(record: state.PodRecord) -> tuple[IPv4Address | IPv6Address, ...]:
    """The same as they are on the pod's end of the uplink: what packets that come in there are for."""
    return tuple(address.ip for address in INSIDE_POD) if record.uplink == NAT else addresses(record)


def row(record: state.PodRecord, ifindex: int) -> router.UplinkRow:
    """What the router is to know. In a namespace of ours, guests are translated elsewhere."""
    found = {address.version: address for address in inner_addresses(record)}
    return router.UplinkRow(
        ifindex=ifindex,
        ipv4=cast("IPv4Address | None", found.get(4)),
        ipv6=cast("IPv6Address | None", found.get(6)),
        translates=record.uplink != NAT,
    )


# --- open and close ---


@contextlib.contextmanager
def opening(record: state.PodRecord) -> Iterator[list[state.PodRecord]]:
    """Make the pod's uplink beside the block, which makes its bridge. Under the pod's lock.

    Behind the block there is one record in the list: it knows the uplink's addresses, and has yet to be written.
    """
    opened: list[state.PodRecord] = []
    with _beside(lambda: opened.append(_open(record))):
        yield opened


@contextlib.contextmanager
def _beside(work: Callable[[], None]) -> Iterator[None]:
    """Do the work in a thread beside the block; both are over at its end."""
    failure: list[Exception] = []

    def body() -> None:
        try:
            work()
        except Exception as exc:
            failure.append(exc)

    thread = threading.Thread(target=body, name="uplink")
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failure:
        raise failure[0]


def _open(record: state.PodRecord) -> state.PodRecord:
    """What needs no bridge: all of it, but for an adopted namespace's own uplink."""
    netns = Path(record.netns)
    if record.uplink == NONE:
        return record
    if not record.adopted:
        net.write_sysctls(netns, _FORWARDING)
    if record.uplink == NAT:
        record = _open_nat(record)
    else:
        firewall.open_pod(netns, net.BRIDGE)
    mark("uplink")
    return record


def join_own(record: state.PodRecord) -> state.PodRecord:
    """Let guests use the uplink of an adopted namespace, whose bridge is there. Returns the record, written."""
    if record.uplink != OWN:
        return record
    netns = Path(record.netns)
    link, found = net.find_uplink(netns)
    saved = net.write_sysctls(netns, _forwarding_sysctls(netns))
    record = _with_addresses(record, link, found)
    record = replace(record, saved_sysctls={**record.saved_sysctls, **saved})
    state.write_pod(record)
    return record


def open_cni(record: state.PodRecord) -> state.PodRecord:
    """Run a CNI network's ADD, which must be over before guests are told whom to ask for names."""
    if not record.uplink.startswith(CNI):
        return record
    given = cni.add(record.name, Path(record.netns), cni.find(record.uplink.removeprefix(CNI)))
    record = _with_addresses(record, cni.IFNAME, [address.ip for address in given.addresses])
    state.write_pod(record)
    return record


def close(record: state.PodRecord) -> None:
    """Take back what `opening` and `publish` did on the host, and in an adopted namespace. Idempotent.

    Called while the namespace is still there, if it is. Does all that it can, then raises UklaunchError if a part of it
    failed, such as a CNI plugin.
    """
    netns = Path(record.netns)
    with contextlib.ExitStack() as each:
        if record.uplink != NONE:
            each.enter_context(_beside(partial(firewall.disconnect, record.name)))
        if record.uplink.startswith(CNI):
            each.callback(cni.delete, record.name, netns)
        if record.uplink == NAT:
            each.callback(net.delete_netns, _nat_netns(record))
            each.callback(net.delete_links, HOST, [_host_link(record)])
        if record.adopted and netns.exists():
            each.callback(firewall.close_pod, netns)


def _with_addresses(record: state.PodRecord, link: str, found: Iterable[IPv4Address | IPv6Address]) -> state.PodRecord:
    by_version: dict[int, str] = {}
    for address in found:
        by_version.setdefault(address.version, str(address))
    return replace(record, uplink_link=link, uplink_ipv4=by_version.get(4, ""), uplink_ipv6=by_version.get(6, ""))


# --- nat ---


def _nat_netns(record: state.PodRecord) -> Path:
    return state.NETNS_DIR / (Path(record.netns).name + NAT_SUFFIX)


def _translating_netns(record: state.PodRecord) -> Path:
    """Where the pod's guests are translated."""
    return _nat_netns(record) if record.uplink == NAT else Path(record.netns)


def _host_link(record: state.PodRecord) -> str:
    return f"{HOST_LINK_PREFIX}{record.id}"


def _open_nat(record: state.PodRecord) -> state.PodRecord:
    link, middle = _host_link(record), _nat_netns(record)
    net.create_netns(middle)
    net.write_sysctls(middle, _FORWARDING)
    net.write_sysctls(HOST, _host_sysctls())
    firewall.open_pod(middle, INSIDE_LINK, (INSIDE_POD[0].ip, INSIDE_POD[1].ip))
    with net.netlink(HOST, f"make link {link}") as ip:
        pair = net.first_free(ip, _pairs(record.id))
        if pair is None:
            ranges = ", ".join(str(ipv4) for ipv4, _ in RANGES)
            raise UklaunchError(
                f"this host has routes into every range of addresses for uplinks: {ranges}",
                "use another uplink: --uplink cni:NAME, or none",
            )
        host, pod = pair[:2], pair[2:]
        net.add_veth(ip, link, middle, OUTSIDE_LINK)
        net.set_up_link(ip, link, alias=state.marked(record.name), addresses=host)
    guests = (IPv4Interface(record.ipv4).network, IPv6Interface(record.ipv6).network)
    with net.netlink(middle, f"make link {INSIDE_LINK}") as ip:
        out, inward = _via(DEFAULT, host), _via(guests, INSIDE_POD)
        net.set_up_link(ip, OUTSIDE_LINK, alias=state.marked(record.name), addresses=pod, routes=out)
        net.add_veth(ip, INSIDE_LINK, Path(record.netns), POD_LINK)
        net.set_up_link(ip, INSIDE_LINK, alias=state.marked(record.name), addresses=INSIDE, routes=inward)
    with net.netlink(Path(record.netns), f"set up link {POD_LINK}") as ip:
        out = _via(DEFAULT, INSIDE)
        net.set_up_link(ip, POD_LINK, alias=state.marked(record.name), addresses=INSIDE_POD, routes=out)
    record = _with_addresses(record, POD_LINK, [address.ip for address in pod])
    mark("veth")
    net.write_sysctls(HOST, {f"net/ipv6/conf/{link}/accept_ra": "0"})  # a pod is no router of the host's
    firewall.connect(record.name, link)
    return record


def _via(
    networks: tuple[IPv4Network, IPv6Network], gateways: tuple[IPv4Interface, IPv6Interface]
) -> list[tuple[IPv4Network | IPv6Network, IPv4Address | IPv6Address]]:
    return [(networks[0], gateways[0].ip), (networks[1], gateways[1].ip)]


def _pairs(pod_id: int) -> Iterator[tuple[IPv4Interface, IPv6Interface, IPv4Interface, IPv6Interface]]:
    """The addresses that the uplink's ends could have: the host's, the pod's."""
    for ipv4, ipv6 in RANGES:
        subnet = ipv6[pod_id << 64]
        yield (
            IPv4Interface((ipv4[2 * pod_id], 31)),
            IPv6Interface((subnet + 1, 64)),
            IPv4Interface((ipv4[2 * pod_id + 1], 31)),
            IPv6Interface((subnet + 2, 64)),
        )


def _host_sysctls() -> dict[str, str]:
    """What lets the host forward. Where that is off, it goes on taking routers' advertisements as before."""
    values = {"net/ipv4/ip_forward": "1"}
    if net.match_sysctls(HOST, _IPV6_FORWARDING) == {_IPV6_FORWARDING: "0"}:
        accepting = net.match_sysctls(HOST, "net/ipv6/conf/*/accept_ra")
        values |= {name: "2" for name, value in accepting.items() if value == "1" and not _is_template(name)}
        values[_IPV6_FORWARDING] = "1"
    return values


def _is_template(sysctl: str) -> bool:
    """Not of one link, but of all, or of those to come."""
    return sysctl.split("/")[3] in ("all", "default")


def _forwarding_sysctls(netns: Path) -> dict[str, str]:
    """What lets an adopted namespace forward: IPv4 by link, IPv6 as a whole. In the order in which they are to be set.

    IPv6's each by itself before all together, so that what each was is known.
    """
    links = [name for name in net.link_indexes(netns) if name != "lo" and not name.startswith("uktap")]
    values = {f"net/ipv4/conf/{name}/forwarding": "1" for name in links}
    accepting = net.match_sysctls(netns, "net/ipv6/conf/*/accept_ra")
    values |= {name: "2" for name, value in accepting.items() if value == "1" and not _is_template(name)}
    values |= dict.fromkeys(net.match_sysctls(netns, "net/ipv6/conf/*/forwarding"), "1")
    if values.pop(_IPV6_FORWARDING, None):
        values[_IPV6_FORWARDING] = "1"
    return values


# --- ports ---


def check_publish(items: Sequence[Publish], uplink: str) -> None:
    """Before anything is made. Raises UsageError if one of the ports cannot be had."""
    if items and rootless.is_active():
        raise UsageError("-p needs root", "from inside the pod: uklaunch pod exec POD -- COMMAND")
    if items and uplink == NONE:
        raise UsageError("-p needs an uplink, and the pod has none", "leave out --uplink none")
    check_free(items)
    if items:
        firewall.check_unpublished(items)


def publish(record: state.PodRecord, items: Sequence[Publish], guest: str | None = None) -> None:
    """Lead ports of the host to the pod's own address, for the pod or for one of its guests.

    Raises UsageError if one of them cannot be had.
    """
    if not items:
        return
    if Path(record.netns).samefile(HOST):
        raise UsageError(
            "-p leads into a pod, and this pod is the very namespace that uklaunch was called in",
            "its guests' ports are at its own addresses: --expose",
        )
    there = addresses(record)
    for item in items:
        if item.address is not None and item.address.version not in {address.version for address in there}:
            raise UsageError(f"-p {item}: pod {record.name!r} has no IPv{item.address.version} address outside")
        if item.address is not None and item.address.is_loopback and record.uplink != NAT:
            raise UsageError(
                f"-p {item}: from the host's own localhost only pods with --uplink nat can be reached",
                "publish it on another address of the host",
            )
    firewall.publish(firewall.owner_of(record.name, guest), items, there)
    if record.uplink == NAT and any(item.address is None or item.address.is_loopback for item in items):
        # Both concern our own link alone. Packets from 127.0.0.1 may then leave by it; the host's chain `raw` sees to
        # it that none come in. Answers to ::1 are taken only on a link that ::1 is local to: rt6_need_strict().
        link = _host_link(record)
        net.write_sysctls(HOST, {f"net/ipv4/conf/{link}/route_localnet": "1"})
        net.add_local_route(HOST, link, IPv6Address("::1"), metric=record.id)


def forget_guests(record: state.PodRecord, running: Collection[str]) -> None:
    """Take back what `publish` did for guests that no longer run. Idempotent."""
    if record.uplink == NONE:
        return
    firewall.unpublish(record.name, running)


# --- names ---


def resolve(record: state.PodRecord, plan: AddressPlan) -> resolver.Resolver:
    """What guests' resolv.conf is to say."""
    given = cni.attachment(record.name) if record.uplink.startswith(CNI) else None
    return resolver.find(record, plan, given.dns if given else None)


def lead_to_resolver(record: state.PodRecord, found: resolver.Resolver) -> None:
    """Make the pod's resolver answer guests, if it has a loopback address that the router knows no way to."""
    if found.behind is None:
        return
    netns = Path(record.netns)
    net.write_sysctls(netns, {f"net/ipv4/conf/{net.BRIDGE}/route_localnet": "1"})
    firewall.lead_to_resolver(netns, found.behind, found.ports, ours=not record.adopted)


# --- after a crash ---


def forget_unknown(pods: Callable[[], Collection[str]]) -> list[str]:
    """Take out of the host what is of none of its pods: elements, links, CNI attachments. Returns whose it was.

    Asked for the pods only when it has seen what there is: a pod's record comes before all else of it.
    """
    unknown = set(firewall.forget_unknown(pods))
    ours = re.compile(HOST_LINK_PREFIX + r"\d+")
    links = _owners(HOST, filter(ours.fullmatch, net.link_indexes(HOST)))
    middles = {path: path.name[len("uk-") : -len(NAT_SUFFIX)] for path in state.NETNS_DIR.glob(f"uk-*{NAT_SUFFIX}")}
    attached = cni.pods()
    known = pods()
    stray = {name: pod for name, pod in links.items() if pod not in known}
    abandoned = {path: pod for path, pod in middles.items() if pod not in known and _is_abandoned(path)}
    net.delete_links(HOST, stray)
    for path, pod in abandoned.items():
        net.delete_netns(path)
        unknown.add(pod)
    for pod in set(attached) - set(known):
        cni.delete(pod, state.NETNS_DIR / "gone")
        unknown.add(pod)
    return sorted({*unknown, *stray.values()})


def _is_abandoned(middle: Path) -> bool:
    """Is the namespace in the middle ours, or are there no longer two that it could lie between?"""
    if not middle.with_name(middle.name.removesuffix(NAT_SUFFIX)).exists():
        return True
    with contextlib.suppress(FileNotFoundError, UklaunchError):  # gone, or not yet complete
        return bool(_owners(middle, [OUTSIDE_LINK]))
    return False


def _owners(netns: Path, links: Iterable[str]) -> dict[str, str]:
    """Which pod of ours each of the links is of."""
    prefix = f"{state.TAG}:"
    aliases = net.link_aliases(netns, links).items()
    found = {name: state.unmarked(alias.removeprefix(prefix)) for name, alias in aliases if alias.startswith(prefix)}
    return {name: pod for name, pod in found.items() if pod is not None}
