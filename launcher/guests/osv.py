"""OSv guests: everything goes through the command line, but `localhost`, which is a file.

Options come first and end at the first word without a dash; then the application. The guest's /etc becomes a disk of
ours: hosts with `localhost` at the bridge, and what the image had there. A literal 127.0.0.1 inside the guest stays
its own. Sources: loader.cc (`parse_options`), fs/rofs; see also GUESTS in README.md.
"""

from __future__ import annotations

import re
import shlex

from ..errors import UsageError
from ..model import DEFAULT_MTU, Boot, Disk, GuestSpec, ImageFormat, Machine, Nic
from . import rofs
from .hosts import hosts, resolv_conf

CMDLINE_OFFSET = 512  # of a whole disk image: behind the boot sector
CMDLINE_LIMIT = 1024  # what the guest sets aside for it

# OSv's exit code is always 0, so what it says last counts. 127 as a shell would, 134 as abort(3) would.
_ENDINGS = ((rb"Failed to load object: .*Powering off", 127), (rb"^Aborted\r?$", 134), (rb"^\[backtrace\]", 134))
_OURS = ("--ip=", "--defaultgw=", "--nameserver=", "--power-off-on-abort")

MTU = DEFAULT_MTU


def configure(spec: GuestSpec, nic: Nic) -> Boot:
    """`cmdline` is the application and its arguments, behind options for OSv if need be."""
    image = spec.image
    if nic.mtu != DEFAULT_MTU:
        raise UsageError(f"--mtu {nic.mtu}: OSv's network cards have an MTU of {DEFAULT_MTU}", "leave out --mtu")
    disks = [Disk(source=file, qcow2=qcow2) for file, qcow2 in zip(image.disks, image.disks_qcow2, strict=True)]
    cmdline = command_line(spec, nic, etc_disk=len(disks))
    if image.kernel is None:
        patch = (CMDLINE_OFFSET, cmdline.encode() + b"\0")
        disks[0] = Disk(source=disks[0].source, qcow2=disks[0].qcow2, patches=(patch,))
    etc = {
        **image.etc,
        "hosts": hosts("osv", spec.name, nic).encode(),
        "resolv.conf": resolv_conf(spec).encode(),
    }
    disks.append(Disk(source=rofs.write(etc), readonly=True))
    return Boot(
        kernel=image.kernel,
        initrds=(),
        cmdline=cmdline,
        disks=tuple(disks),
        machines=(Machine.PC,),  # microvm needs KVM's clock; q35 may hang behind virtio-blk
        memory_mib=spec.memory_mib,
        cpus=spec.cpus,
        nic=nic,
        console_interrupts=True,
        ipv6=None,  # mainline has none, the branch `ipv6` has
    )


def command_line(spec: GuestSpec, nic: Nic, *, etc_disk: int) -> str:
    """What OSv is to read. Raises UsageError if it is too long, or there is nothing to run."""
    given = spec.cmdline if spec.cmdline is not None else spec.image.cmdline
    options, application = split(given)
    # Of the image's own options all count but those about the network, which is ours to give.
    kept = [option for option in options if not option.startswith(_OURS)]
    if spec.cmdline is not None and not options:
        kept = [option for option in split(spec.image.cmdline)[0] if not option.startswith(_OURS)]
    if not application:
        raise UsageError(f"{spec.image.path} does not say what to run", "say it: --cmdline '/app.so ARGUMENTS'")
    network = [f"--ip=eth0,{nic.ipv4.ip},{nic.ipv4.netmask}", f"--defaultgw={nic.gateway_ipv4}"]
    network += [f"--nameserver={address}" for address in spec.nameservers if address.version == 4][:1]
    env = [f"--env={key}={escape(value)}" for key, value in spec.env.items()]
    mount = [f"--mount-fs=rofs,/dev/vblk{etc_disk},/etc"]
    line = " ".join([*kept, *network, *mount, *env, "--power-off-on-abort", application])
    if spec.image.format in (ImageFormat.RAW_DISK, ImageFormat.QCOW2) and len(line) >= CMDLINE_LIMIT:
        raise UsageError(
            f"OSv's command line of {len(line)} bytes is over the {CMDLINE_LIMIT - 1} that the image takes",
            "shorten --cmdline and -e, or boot the kernel itself (loader.elf) in a bundle",
        )
    return line


def split(cmdline: str) -> tuple[list[str], str]:
    """OSv's options, and the application with its arguments as they are."""
    options = []
    rest = cmdline.strip()
    while match := re.match(r"(-(?:\\.|\S)*)\s*", rest):
        options.append(match[1])
        rest = rest[match.end() :]
    return options, rest


def escape(value: str) -> str:
    """A value inside an option: blanks and backslashes behind a backslash."""
    if "\n" in value or "\0" in value:
        raise UsageError("OSv takes no line breaks in its environment", f"leave out -e ...={shlex.quote(value)}")
    return re.sub(r"([\\\s\"])", r"\\\1", value)


def exit_status(console: bytes) -> int | None:
    """OSv's application cannot tell its status; a crash and a missing application show on the console."""
    for pattern, status in _ENDINGS:
        if re.search(pattern, console, re.MULTILINE):
            return status
    return None
