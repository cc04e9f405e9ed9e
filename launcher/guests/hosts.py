"""The files by which a guest takes `localhost` for the bridge, from their templates in guest-config/.

OSv's has IPv4 alone and first (of several lines with a name it takes the first, whatever family was asked for), and
must end in a newline (a name at the very end of the file is overlooked).
"""

from __future__ import annotations

import importlib.resources
from string import Template

from ..model import GuestSpec, Nic


def template(family: str, file: str) -> str:
    return (importlib.resources.files("launcher.guest_config") / family / file).read_text()


def hosts(family: str, name: str, nic: Nic) -> str:
    """/etc/hosts for a guest of the family."""
    return Template(template(family, "hosts")).substitute(
        name=name,
        ipv4=nic.ipv4.ip,
        ipv6=nic.ipv6.ip,
        gateway_ipv4=nic.gateway_ipv4,
        gateway_ipv6=nic.gateway_ipv6,
    )


def resolv_conf(spec: GuestSpec) -> str:
    lines = [f"nameserver {address}" for address in spec.nameservers]
    lines += [f"search {' '.join(spec.search)}"] * bool(spec.search)
    lines += [f"options {' '.join(spec.resolver_options)}"] * bool(spec.resolver_options)
    return "".join(f"{line}\n" for line in lines)
