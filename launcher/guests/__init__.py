"""Guest families: a spec and a NIC in, a neutral `Boot` out. One module each, with

MTU                                what its link has unless the user says otherwise
configure(spec, nic) -> Boot       a pure function; knows no flag of any VMM
exit_status(console) -> int | None what the console's last bytes say of how the guest ended
"""

from __future__ import annotations

from typing import Protocol

from ..model import Boot, Family, GuestSpec, Nic
from . import generic, linux, nanos, osv, unikraft


class FamilyModule(Protocol):
    MTU: int

    def configure(self, spec: GuestSpec, nic: Nic) -> Boot: ...

    def exit_status(self, console: bytes) -> int | None: ...


FAMILIES: dict[str, FamilyModule] = {
    Family.OSV: osv,
    Family.LINUX: linux,
    Family.UNIKRAFT: unikraft,
    Family.NANOS: nanos,
    Family.GENERIC: generic,
}
