"""The files by which a guest takes `localhost` for the bridge."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from ..model import Nic


def hosts(name: str, nic: Nic, *, ipv6: bool = True) -> str:
    """/etc/hosts. IPv4 first, always: OSv takes the first line that has the name, whatever family was asked for.

    It ends in a newline: OSv overlooks a name at the very end of the file.
    """
    lines = [f"{nic.gateway_ipv4} localhost localhost.localdomain"]
    if ipv6:
        lines.append(f"{nic.gateway_ipv6} localhost localhost.localdomain ip6-localhost ip6-loopback")
    lines.append(f"{nic.ipv4.ip} {name}")
    if ipv6:
        lines.append(f"{nic.ipv6.ip} {name}")
    return "\n".join(lines) + "\n"


def resolv_conf(nameservers: Iterable[IPv4Address | IPv6Address]) -> str:
    return "".join(f"nameserver {address}\n" for address in nameservers)
