"""Nanos guests: a whole disk whose manifest holds the program, its environment and its files.

The manifest is inside the disk's TFS, which we do not rewrite: the image must be built for its place in the pod
(`ops ... --ip-address`), or take its address from the kernel's command line when it boots by its kernel.
Source: src/kernel/init.c and src/net/net.c (`en1.ipaddr` and its like) in Nanos' tree.
"""

from __future__ import annotations

from ..errors import UsageError
from ..model import DEFAULT_MTU, Boot, Disk, GuestSpec, Machine, Nic

MTU = DEFAULT_MTU


def configure(spec: GuestSpec, nic: Nic) -> Boot:
    """With a kernel of its own in the bundle, the address is given; a disk alone keeps what its manifest says."""
    image = spec.image
    if image.kernel is None and (spec.env or spec.cmdline is not None):
        raise UsageError(
            "a Nanos disk takes no -e and no --cmdline: its manifest has them",
            "build them into the image, or give its kernel too, in a bundle",
        )
    network = {
        "en1.ipaddr": nic.ipv4.ip,
        "en1.netmask": nic.ipv4.netmask,
        "en1.gateway": nic.gateway_ipv4,
        "en1.ip6addr": nic.ipv6.ip,
        "en1.mtu": nic.mtu,
    }
    words = [f"{key}={value}" for key, value in network.items()]
    words += [f"environment.{key}={value}" for key, value in spec.env.items()]
    return Boot(
        kernel=image.kernel,
        cmdline=" ".join([*words, spec.cmdline or image.cmdline]).strip(),
        disks=tuple(Disk(source=file, qcow2=qcow2) for file, qcow2 in zip(image.disks, image.disks_qcow2, strict=True)),
        machines=(Machine.Q35,),
        memory_mib=spec.memory_mib,
        cpus=spec.cpus,
        nic=nic,
        ipv6=None,
    )


def exit_status(console: bytes) -> int | None:
    return None
