"""Published ports, as a user writes them: `-p [IP:]HOST:GUEST[/udp]`. Parsing and conflicts; no packet is touched here.

Source: the form is docker's and podman's (`podman run --publish`), without ranges.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from .errors import UklaunchError, UsageError
from .model import Port

_FORM = re.compile(r"(?:(?:\[(?P<ipv6>[^\]]*)\]|(?P<ipv4>[^:\[\]]*)):)?(?P<host>[^:/]*):(?P<guest>[^:]*)")
_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
_ANY: dict[int, IPv4Address | IPv6Address] = {4: IPv4Address("0.0.0.0"), 6: IPv6Address("::")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """A port of the host's that leads to a port of a pod's. `address` None: every address of the host's."""

    address: IPv4Address | IPv6Address | None = None
    host: int
    guest: Port

    def __str__(self) -> str:
        shown = f"[{self.address}]" if self.address and self.address.version == 6 else self.address
        return f"{shown}:{self.host}:{self.guest}" if shown else f"{self.host}:{self.guest}"

    @classmethod
    def parse(cls, text: str) -> Publish:
        """`8080:80`, `127.0.0.1:8080:80`, `[::1]:5353:53/udp`. Raises UsageError."""
        hint = "write it as 8080:80, 127.0.0.1:8080:80 or [::1]:5353:53/udp"
        match = _FORM.fullmatch(text)
        if match is None:
            raise UsageError(f"-p {text!r} is not [IP:]HOST:GUEST[/udp]", hint)
        try:
            guest = Port.parse(match["guest"])
            host = Port.parse(match["host"]).number
        except UsageError as exc:
            raise UsageError(f"-p {text!r}: {exc.message}", hint) from None
        given = match["ipv4"] if match["ipv6"] is None else match["ipv6"]
        if given is None:
            return cls(host=host, guest=guest)
        try:
            address = ip_address(given)
        except ValueError:
            address = None
        if address is None or address.version != (4 if match["ipv6"] is None else 6) or "%" in given:
            raise UsageError(f"-p {text!r}: {given!r} is not an address of this host", hint)
        return cls(address=None if address.is_unspecified else address, host=host, guest=guest)

    @property
    def addresses(self) -> tuple[IPv4Address | IPv6Address, ...]:
        """One for each family that it is published in; unspecified: all of the host's."""
        return (self.address,) if self.address is not None else tuple(_ANY.values())


def check_free(published: Iterable[Publish]) -> None:
    """Raises UsageError if a socket of this host listens on one of the ports, or two of them are the same.

    The kernel is asked by binding: it knows of sockets in every state and of addresses that are not this host's.
    """
    seen: list[Publish] = []
    for item in published:
        for other in seen:
            if (item.host, item.guest.protocol) == (other.host, other.guest.protocol) and (
                None in (item.address, other.address) or item.address == other.address
            ):
                raise UsageError(f"-p {item} and -p {other} want the same port", "publish one of them on another")
        seen.append(item)
        for address in item.addresses:
            _check_bind(item, address)


def _check_bind(item: Publish, address: IPv4Address | IPv6Address) -> None:
    protocol = item.guest.protocol.value
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, _KINDS[protocol]) as sock:
            if protocol == "tcp":  # connections that are over hold no port, listening sockets do
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((str(address), item.host))
    except OSError as exc:
        if address.is_unspecified and exc.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return  # no IPv6 here
        if exc.errno == errno.EADDRINUSE:
            raise UsageError(
                f"-p {item}: port {item.host}/{protocol} of this host is taken: a socket listens on it",
                f"see which: ss -lnp sport = :{item.host}",
            ) from None
        if exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise UsageError(f"-p {item}: {address} is not an address of this host", "see: ip address") from None
        raise UklaunchError(f"-p {item}: cannot use the port: {exc.strerror}") from exc
