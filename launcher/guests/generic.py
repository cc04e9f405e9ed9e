"""Guests of which nothing is known: booted as they are. They find their address, if at all, by themselves."""

from __future__ import annotations

from ..model import DEFAULT_MTU, Boot, Disk, GuestSpec, Machine, Nic

MTU = DEFAULT_MTU


def configure(spec: GuestSpec, nic: Nic) -> Boot:
    """`cmdline` is the kernel's, as it is; a guest without a kernel file boots from its first disk."""
    image = spec.image
    return Boot(
        kernel=image.kernel,
        initrds=image.initrds,
        cmdline=spec.cmdline if spec.cmdline is not None else image.cmdline,
        disks=tuple(Disk(source=file, qcow2=qcow2) for file, qcow2 in zip(image.disks, image.disks_qcow2, strict=True)),
        machines=(Machine.Q35,),
        memory_mib=spec.memory_mib,
        cpus=spec.cpus,
        nic=nic,
        ipv6=None,
    )


def exit_status(console: bytes) -> int | None:
    return None
