"""The nouns of uklaunch as frozen dataclasses and enums. No I/O, and no import of another module of ours
but `errors` and `imagefile`.

Units are in the names. Addresses are `ipaddress` objects, MAC addresses six bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from pathlib import Path

from .errors import UsageError
from .imagefile import ImageFile

GUEST_INDEX_MIN = 2
GUEST_INDEX_MAX = 254


class Protocol(StrEnum):
    TCP = "tcp"
    UDP = "udp"


class Family(StrEnum):
    """How a guest is configured."""

    OSV = "osv"
    LINUX = "linux"
    UNIKRAFT = "unikraft"
    NANOS = "nanos"
    GENERIC = "generic"


class ImageFormat(StrEnum):
    """What the first bytes of an image say it is."""

    RAW_DISK = "raw disk"
    QCOW2 = "qcow2 disk"
    PVH_ELF = "PVH ELF kernel"
    MULTIBOOT_ELF = "multiboot ELF kernel"
    BZIMAGE = "bzImage"


class Accel(StrEnum):
    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class LogDriver(StrEnum):
    """Where a guest's console is kept."""

    FILE = "file"
    JOURNALD = "journald"
    NONE = "none"


class Machine(StrEnum):
    """The board a guest can run on; a VMM picks the smallest it offers."""

    MICROVM = "microvm"  # virtio-mmio, no PCI; the guest finds its devices in ACPI
    PC = "pc"  # i440FX: legacy-free virtio-pci
    Q35 = "q35"


@dataclass(frozen=True, slots=True, order=True)
class Port:
    """A port that a guest serves."""

    number: int
    protocol: Protocol = Protocol.TCP

    def __str__(self) -> str:
        return f"{self.number}/{self.protocol}"

    @classmethod
    def parse(cls, text: str) -> Port:
        """`8080`, `8080/tcp`, `53/udp`. Raises UsageError."""
        number, slash, protocol = text.partition("/")
        if not (number.isascii() and number.isdigit() and 1 <= int(number) <= 65535):
            raise UsageError(f"port {text!r} is not a number from 1 to 65535", "write it as 8080 or 53/udp")
        try:
            return cls(int(number), Protocol(protocol if slash else "tcp"))
        except ValueError:
            raise UsageError(f"port {text!r}: protocol {protocol!r} is not tcp or udp") from None


_MEMORY = re.compile(r"([0-9]{1,9})([KMG]?)(?:i?B)?", re.IGNORECASE)
_KIB = {"K": 1, "M": 1024, "G": 1024 * 1024}


DEFAULT_MTU = 1500
MTU_MIN, MTU_MAX = 1280, 65535  # RFC 8200, 5: IPv6 needs as much; IPv4's length has 16 bits
TAP_MTU_MAX = MTU_MAX - 14  # drivers/net/tun.c, tun_net_initialize: the Ethernet header counts too


def parse_mtu(text: str) -> int:
    """Bytes from the IP header on, as much as a TAP takes. Raises UsageError."""
    if not text.isdecimal() or not MTU_MIN <= int(text) <= MTU_MAX:
        raise UsageError(f"--mtu {text}: an MTU is a number from {MTU_MIN} to {MTU_MAX}")
    return min(int(text), TAP_MTU_MAX)


def parse_memory_mib(text: str) -> int:
    """`128M`, `1G`, `131072K`, or a bare number of MiB; returns whole MiB. Raises UsageError."""
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"memory {text!r} is not a size", "write it as 128M or 1G")
    kib = int(match[1]) * _KIB[match[2].upper() or "M"]
    if not 4 * 1024 <= kib <= 1024**3:
        raise UsageError(f"memory {text!r} is not between 4M and 1024G")
    return kib // 1024


# A pod's name becomes a file name and, behind `uk-`, a namespace's; a guest's name becomes a host name (RFC 1123).
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,46}[a-z0-9])?")


def check_name(what: str, name: str) -> str:
    """`name` itself if it can name a pod or a guest. Raises UsageError."""
    if _NAME.fullmatch(name) is None:
        shown = name if len(name) <= 40 else name[:37] + "..."
        raise UsageError(
            f"{what} name {shown!r} is not usable",
            "use 1 to 48 lower-case letters, digits and inner hyphens",
        )
    return name


def format_mac(mac: bytes) -> str:
    return mac.hex(":")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressPlan:
    """A pod's addresses. The same in every pod: namespaces keep pods apart.

    Guest n (2..254) is host n of both networks; host 1 is the bridge, which is what `localhost` means to a guest.
    """

    ipv4: IPv4Interface = IPv4Interface("169.254.77.1/24")
    ipv6: IPv6Interface = IPv6Interface("fd00:77::1/64")

    @classmethod
    def parse(cls, ipv4: str | None, ipv6: str | None) -> AddressPlan:
        """The plan with the given bridge addresses, such as `10.9.0.1/24`. Raises UsageError."""
        plan = cls()
        try:
            if ipv4:
                plan = replace(plan, ipv4=IPv4Interface(ipv4))
            if ipv6:
                plan = replace(plan, ipv6=IPv6Interface(ipv6))
        except ValueError as exc:
            raise UsageError(f"bad address: {exc}", "write it as 10.9.0.1/24 or fd00:9::1/64") from None
        for address in (plan.ipv4, plan.ipv6):
            network = address.network
            if address.ip != network[1] or network.num_addresses <= GUEST_INDEX_MAX:
                raise UsageError(
                    f"{address} cannot be a pod's bridge", f"give the first host of a /24 or larger: {network[1]}/24"
                )
        return plan

    @property
    def mac(self) -> bytes:
        return self.guest_mac(1)

    def guest_mac(self, index: int) -> bytes:
        return bytes((0x02, 0, 0, 0, 0x77, index))

    def guest_ipv4(self, index: int) -> IPv4Interface:
        return IPv4Interface((self.ipv4.network[index], self.ipv4.network.prefixlen))

    def guest_ipv6(self, index: int) -> IPv6Interface:
        return IPv6Interface((self.ipv6.network[index], self.ipv6.network.prefixlen))


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A guest's network card and how the guest is to configure it. `localhost` is the gateway: the bridge."""

    mac: bytes
    ipv4: IPv4Interface
    ipv6: IPv6Interface
    gateway_ipv4: IPv4Address
    gateway_ipv6: IPv6Address
    mtu: int = DEFAULT_MTU


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk for a guest: either a file of the user's, never written, or bytes that we generated.

    Writes of the guest go to a throw-away overlay unless `readonly`. `patches` are (offset, bytes) laid over the
    content as the guest sees it.
    """

    source: ImageFile | bytes
    qcow2: bool = False
    readonly: bool = False
    patches: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What `image.identify` found: what boots, and what its manifest (if any) asks for."""

    path: Path
    format: ImageFormat
    family: Family
    kernel: ImageFile | None = None  # None: a whole disk that boots by its own boot sector
    initrds: tuple[ImageFile, ...] = ()
    disks: tuple[ImageFile, ...] = ()
    disks_qcow2: tuple[bool, ...] = ()
    cmdline: str = ""  # the image's own: its manifest's, or the one found inside it
    etc: Mapping[str, bytes] = field(default_factory=dict)  # files of an OSv image's /etc, which a disk of ours hides
    env: Mapping[str, str] = field(default_factory=dict)
    memory_mib: int | None = None
    cpus: int | None = None
    ports: tuple[Port, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSpec:
    """What the user wants of one guest, after defaults."""

    name: str
    pod: str
    image: Image
    memory_mib: int = 128
    cpus: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    cmdline: str | None = None  # None: the image's own
    ports: tuple[Port, ...] = ()
    mtu: int | None = None  # None: as its family has it
    watchdog: bool = False  # a device that the guest must attend to, or it has hung
    nameservers: tuple[IPv4Address | IPv6Address, ...] = ()  # none: the pod's, see resolver.py
    search: tuple[str, ...] = ()  # domains that short names are looked up in
    resolver_options: tuple[str, ...] = ()  # of resolv.conf(5), such as `ndots:5`


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What a family makes of a spec, and all that a VMM needs to know: no flag of any VMM is in it.

    `initrds` are concatenated in order, each padded to 4 bytes. `machines` are those that the guest can run on,
    best first. `guest_csum` False: the guest mistakes partial checksums for errors.
    """

    kernel: ImageFile | None
    initrds: tuple[ImageFile | bytes, ...] = ()
    cmdline: str = ""
    disks: tuple[Disk, ...] = ()
    machines: tuple[Machine, ...] = (Machine.Q35,)
    memory_mib: int
    cpus: int
    nic: Nic
    guest_csum: bool = True
    powers_down: bool = True  # obeys an ACPI power button
    console_interrupts: bool = False  # its driver for the serial port has it interrupt: a VMM sees when it is open
    tells_panics: bool = False  # has a driver for pvpanic, the device by which a VMM hears of them
    watchdog: bool = False
    ipv6: bool | None = True  # will it answer to its IPv6 address? None: not known


class ExitReason(StrEnum):
    """Why a guest is no longer running."""

    POWERED_OFF = "powered off"
    PANICKED = "panicked"
    RESET = "reset"
    HUNG = "hung"  # so its watchdog found
    STOPPED = "stopped"  # by us, when asked
    KILLED = "killed"  # by us, when it would not stop
    UNHEALTHY = "unhealthy"  # and ended by us, to be started again
    VMM_FAILED = "VMM failed"
