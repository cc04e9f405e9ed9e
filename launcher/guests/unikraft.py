"""Unikraft guests: library parameters, then `--`, then the application's arguments.

`netdev.ip` is `ADDRESS/PREFIX:GATEWAY:DNS0:DNS1:HOSTNAME:DOMAIN`; `env.vars` a list in brackets. Unikraft has no hosts
file unless its root file system brings one, so a guest finds the pod's localhost at $LOCALHOST.
Sources: lib/uknetdev/params.c, lib/uklibparam, lib/posix-environ in Unikraft's tree.
"""

from __future__ import annotations

from ..model import DEFAULT_MTU, Boot, GuestSpec, Machine, Nic

MTU = DEFAULT_MTU


def configure(spec: GuestSpec, nic: Nic) -> Boot:
    """`cmdline` is the application's arguments, or parameters, `--` and arguments."""
    given = spec.cmdline if spec.cmdline is not None else spec.image.cmdline
    parameters, dashes, arguments = f" {given} ".partition(" -- ")
    if not dashes:
        parameters, arguments = "", given
    dns = [str(address) for address in spec.nameservers if address.version == 4][:2]
    ip = ":".join([str(nic.ipv4), str(nic.gateway_ipv4), *[*dns, "", ""][:2], spec.name])
    env = {"LOCALHOST": str(nic.gateway_ipv4), **spec.env}
    words = [
        spec.name,  # argv[0]
        f"netdev.ip={ip}",
        "env.vars=[ " + " ".join(f'"{_quoted(f"{key}={value}")}"' for key, value in env.items()) + " ]",
        parameters.strip(),
        "--",
        arguments.strip(),
    ]
    return Boot(
        kernel=spec.image.kernel,
        initrds=spec.image.initrds,
        cmdline=" ".join(word for word in words if word),
        machines=(Machine.Q35,),
        memory_mib=spec.memory_mib,
        cpus=spec.cpus,
        nic=nic,
        ipv6=None,
    )


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def exit_status(console: bytes) -> int | None:
    return None
