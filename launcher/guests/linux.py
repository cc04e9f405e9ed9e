"""Linux guests: a kernel, the image's initramfs as it is, and a second archive that lies over it.

The overlay holds /etc/hosts, /etc/resolv.conf and /etc/hostname, which any userland reads, and /uklaunch, which our
own init reads: the NIC's addresses, the environment and the command.
"""

from __future__ import annotations

import re
import shlex

from ..model import Boot, Disk, GuestSpec, Machine, Nic
from . import cpio, nocloud
from .hosts import hosts, resolv_conf

# Few messages, for every character of one is an exit; panic=-1 and reboot=t: a panic ends the VM, at once.
KERNEL_CMDLINE = "console=ttyS0 loglevel=3 edd=off panic=-1 reboot=t no_timer_check random.trust_cpu=on"
SHELL = "echo uklaunch: a shell in this guest, ended by exit or Ctrl-D; exec sh -i"

_EXIT_STATUS = re.compile(rb"uklaunch: exit status (\d{1,3})\r?$", re.MULTILINE)

# Wide, so that what fits the pod's own loopback is hardly ever too big for the guest: a name server's answers, for one.
# Wider still is slower: with two segments beyond 64 KiB, TCP's packets are cut up on the way to the TAP.
MTU = 32768


def configure(spec: GuestSpec, nic: Nic) -> Boot:
    """`cmdline` is a shell command that the guest runs; without one it is an interactive shell.

    A disk image boots by its own boot sector, and is told the rest by a NoCloud seed.
    """
    if spec.image.kernel is None:
        return _from_disk(spec, nic)
    command = (spec.cmdline if spec.cmdline is not None else spec.image.cmdline) or SHELL
    return Boot(
        kernel=spec.image.kernel,
        initrds=(*spec.image.initrds, overlay(spec, nic, command)),
        cmdline=KERNEL_CMDLINE,
        disks=_disks(spec),
        machines=(Machine.MICROVM, Machine.Q35),
        memory_mib=spec.memory_mib,
        cpus=spec.cpus,
        nic=nic,
        console_interrupts=True,
        tells_panics=True,
    )


def _from_disk(spec: GuestSpec, nic: Nic) -> Boot:
    return Boot(
        kernel=None,
        disks=(*_disks(spec), Disk(source=nocloud.seed(spec, nic), readonly=True)),
        machines=(Machine.Q35,),
        memory_mib=spec.memory_mib,
        cpus=spec.cpus,
        nic=nic,
        tells_panics=True,
    )


def _disks(spec: GuestSpec) -> tuple[Disk, ...]:
    disks = zip(spec.image.disks, spec.image.disks_qcow2, strict=True)
    return tuple(Disk(source=file, qcow2=qcow2) for file, qcow2 in disks)


def overlay(spec: GuestSpec, nic: Nic, command: str) -> bytes:
    settings = {
        "IPV4": nic.ipv4,
        "IPV6": nic.ipv6,
        "GATEWAY_IPV4": nic.gateway_ipv4,
        "GATEWAY_IPV6": nic.gateway_ipv6,
        "MTU": nic.mtu,
        "STOP_SIGNAL": "HUP" if command == SHELL else "TERM",  # which an interactive shell ignores
    }
    env = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in spec.env.items())
    return cpio.archive(
        (
            cpio.directory("etc"),
            cpio.file("etc/hosts", hosts("linux", spec.name, nic)),
            cpio.file("etc/resolv.conf", resolv_conf(spec)),
            cpio.file("etc/hostname", spec.name + "\n"),
            cpio.directory("uklaunch", 0o700),
            cpio.file("uklaunch/settings", "".join(f"{key}={value}\n" for key, value in settings.items()), 0o600),
            cpio.file("uklaunch/env", env, 0o600),
            cpio.file("uklaunch/command", command + "\n", 0o600),
        )
    )


def exit_status(console: bytes) -> int | None:
    """The command's, from our init's last line; None if the guest ended some other way."""
    found = _EXIT_STATUS.findall(console)
    return int(found[-1]) & 0xFF if found else None
