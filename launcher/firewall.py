"""nftables: masquerading, published ports, and what keeps strangers out. The only importer of libnftables' binding.

Three tables: `uklaunch` on the host, for all of its pods; `uklaunch-pod` for a pod's guests; `uklaunch-resolver` in a
pod that needs it. Their rules are in rules/*.nft and the same for everybody; what differs are the elements of their
sets and maps. An element's comment says whose it is, so that what is somebody's can be taken out without knowing what
it was.

Rules and elements go in as text: libnftables 1.0.6 (Debian 12's) crashes on a `dnat` to a concatenated map in JSON.
Sources: nft(8), libnftables-json(5).
"""

from __future__ import annotations

import contextlib
import importlib.resources
import importlib.util
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from pathlib import Path
from typing import Any

from . import net, state
from .errors import UklaunchError, UsageError
from .publish import Publish

HOST = Path("/proc/self/ns/net")  # the namespace that uklaunch was called in
# Where guests ask for names if the pod's resolver has a loopback address of its own. Link-local and of none of the
# pod's networks: a guest sends it to its gateway, where it is translated.
RESOLVER = IPv4Address("169.254.53.53")
_HOST_TABLE = "inet uklaunch"
_POD_TABLE = "inet uklaunch-pod"  # a pod may be the namespace that uklaunch was called in
_RESOLVER_TABLE = "inet uklaunch-resolver"
DNS_PORT = 53


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A published port as it is in the host's table."""

    owner: str
    protocol: str
    network: IPv4Network | IPv6Network
    number: int


def owner_of(pod: str, guest: str | None = None) -> str:
    return state.marked(f"{pod}/{guest}" if guest else pod)


def _pod_of(owner: str) -> str | None:
    """None: it is of another state directory's."""
    name = state.unmarked(owner)
    return None if name is None else name.partition("/")[0]


# --- the host's table ---


def connect(pod: str, link: str) -> None:
    """Let the pod out over its link. Makes the table if need be, and mends it if somebody changed its rules."""
    with _host_table():
        _run(HOST, _rules("host") + f'add element {_HOST_TABLE} links {{ "{link}" comment "{owner_of(pod)}" }}\n')


def publish(owner: str, ports: Iterable[Publish], to: Iterable[IPv4Address | IPv6Address]) -> None:
    """Lead ports of the host to the pod's addresses, each to the one of its family.

    Raises UsageError if one of them has been published by somebody else.
    """
    targets = {address.version: address for address in to}
    ports = tuple(ports)
    with _host_table():
        check_unpublished(ports)
        elements = "".join(
            f"add element {_HOST_TABLE} ports{address.version}"
            f" {{ {item.guest.protocol} . {_network(address)} . {item.host}"
            f' comment "{owner}" : {targets[address.version]} . {item.guest.number} }}\n'
            for item in ports
            for address in item.addresses
            if address.version in targets
        )
        _run(HOST, _rules("host") + elements)


def check_unpublished(ports: Iterable[Publish]) -> None:
    """Raises UsageError if one of the ports has been published."""
    taken = list(published())
    for item in ports:
        for other in taken:
            if (item.guest.protocol, item.host) == (other.protocol, other.number) and any(
                _network(address).overlaps(other.network)
                for address in item.addresses
                if address.version == other.network.version
            ):
                raise UsageError(
                    f"-p {item}: port {other.number}/{other.protocol} of this host is published already, "
                    f"by {other.owner}",
                    "publish it on another port",
                )


def published() -> Iterator[Published]:
    """Every published port of the host."""
    for name, element, owner in _elements(HOST, _HOST_TABLE):
        if name.startswith("ports"):
            protocol, address, number = element["concat"]
            if isinstance(address, dict):
                address = f"{address['prefix']['addr']}/{address['prefix']['len']}"
            yield Published(owner=owner, protocol=protocol, network=ip_network(address), number=number)


def disconnect(pod: str) -> None:
    """Take out what is the pod's and its guests'. Idempotent."""
    with _host_table():
        _forget(HOST, _HOST_TABLE, lambda owner: _pod_of(owner) == pod)


def unpublish(pod: str, running: Collection[str]) -> None:
    """Take out the ports of the pod's guests, but not of those that run. Idempotent."""
    keep = {owner_of(pod), *(owner_of(pod, guest) for guest in running)}
    with _host_table():
        _forget(HOST, _HOST_TABLE, lambda owner: _pod_of(owner) == pod and owner not in keep)


def forget_unknown(pods: Callable[[], Collection[str]]) -> list[str]:
    """Take out what is of none of the pods, which are asked for last. Returns the names of those whose it was."""
    if importlib.util.find_spec("nftables") is None:
        return []  # then there is nothing of ours either
    with _host_table():
        present = [owner for _, _, owner in _elements(HOST, _HOST_TABLE)]
        if not present:
            return []
        known = {None, *pods()}
        gone = _forget(HOST, _HOST_TABLE, lambda owner: owner in present and _pod_of(owner) not in known)
        return [pod for owner in gone if (pod := _pod_of(owner)) is not None]


# --- a pod's table ---


def open_pod(netns: Path, inside: str, to: tuple[IPv4Address, IPv6Address] | None = None) -> None:
    """Masquerade what comes from the link `inside`. `to`: whom to send what comes in; None: it is there already."""
    text = f'define inside = "{inside}"\n' + _rules("pod")
    if to is not None:
        text += f"define pod_ipv4 = {to[0]}\ndefine pod_ipv6 = {to[1]}\n" + _rules("pod-inwards")
    _run(netns, text)


def close_pod(netns: Path) -> None:
    """Idempotent."""
    if importlib.util.find_spec("nftables") is None:
        return  # then there is nothing of ours
    _run(netns, "".join(f"add table {table}\ndelete table {table}\n" for table in (_POD_TABLE, _RESOLVER_TABLE)))


def lead_to_resolver(netns: Path, address: IPv4Address, ports: Mapping[str, int], *, ours: bool) -> None:
    """Lead what guests send to RESOLVER to a loopback address of the pod; `ports`: protocol to port there.

    `ours` False: the namespace is used by others, who may translate what stays on `lo`, as Docker does.
    """
    defines = {
        "inside": f'"{net.BRIDGE}"',
        "asked": RESOLVER,
        "server": address,
        "udp_port": ports.get("udp", DNS_PORT),
        "tcp_port": ports.get("tcp", DNS_PORT),
    }
    text = "".join(f"define {name} = {value}\n" for name, value in defines.items()) + _rules("resolver")
    _run(netns, text + (_rules("resolver-untracked") if ours else ""))


# --- libnftables ---


@contextlib.contextmanager
def _host_table() -> Iterator[None]:
    """One at a time: who takes out the last element removes the table."""
    with state.lock(state.root() / "firewall.lock"):
        yield


def _rules(name: str) -> str:
    return (importlib.resources.files("launcher.rules") / f"{name}.nft").read_text()


def _network(address: IPv4Address | IPv6Address) -> IPv4Network | IPv6Network:
    return ip_network(f"{address}/0" if address.is_unspecified else str(address))


def _run(netns: Path, text: str) -> Any:
    """Carry out the commands in the namespace, all or none; what `list` prints, as JSON."""

    def body() -> tuple[int, str, str]:
        try:
            from nftables import Nftables  # Debian's, of libnftables: loads the library
        except (ImportError, OSError):
            raise UklaunchError(
                "the Python binding of nftables is missing, which an uplink needs",
                "apt-get install python3-nftables, or do without: --uplink none",
            ) from None
        nft = Nftables()  # opens a socket in the namespace of this thread
        nft.set_json_output(True)
        code, out, said = nft.cmd(text)
        return code, out, said

    if not text:
        return {}
    code, out, said = net.in_netns(netns, body)
    if code != 0:
        why = said.strip().splitlines() or ["no reason given"]
        raise UklaunchError(
            f"cannot set up nftables: {why[0].removeprefix('Error: ')}",
            "see: uklaunch doctor; or do without: --uplink none",
            said,
        )
    return json.loads(out) if out else {}


def _elements(netns: Path, table: str) -> Iterator[tuple[str, Any, str]]:
    """(set or map, key, owner) of every element that has an owner; none if there is no table."""
    tables = _run(netns, "list tables\n")["nftables"]
    if not any("inet {name}".format(**item.get("table", {"name": ""})) == table for item in tables):
        return
    for item in _run(netns, f"list table {table}\n")["nftables"]:
        holder = item.get("set") or item.get("map") or {}
        for element in holder.get("elem", ()):
            key = element[0] if "map" in item else element
            if isinstance(key, dict) and "elem" in key:
                yield holder["name"], key["elem"]["val"], key["elem"].get("comment", "")


def _forget(netns: Path, table: str, is_theirs: Callable[[str], bool]) -> list[str]:
    """Take out elements by their owners, and the host's table with its last one. Returns whose they were."""
    elements = list(_elements(netns, table))
    if not elements:
        return []
    theirs = [(name, key, owner) for name, key, owner in elements if is_theirs(owner)]
    if table == _HOST_TABLE and len(theirs) == len(elements):
        _run(netns, f"delete table {table}\n")
    else:
        _run(netns, "".join(f"delete element {table} {name} {{ {_text(key)} }}\n" for name, key, _ in theirs))
    return sorted({owner for _, _, owner in theirs})


def _text(key: Any) -> str:
    """A key as it is written, from how it is listed."""
    if isinstance(key, dict):
        if "concat" in key:
            return " . ".join(_text(part) for part in key["concat"])
        return f"{key['prefix']['addr']}/{key['prefix']['len']}"
    return f'"{key}"' if isinstance(key, str) and key.startswith("uk") else str(key)
