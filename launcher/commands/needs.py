"""What a command needs before it makes anything."""

from __future__ import annotations

import os

from ..errors import UklaunchError


def require_root() -> None:
    if os.geteuid() != 0:
        raise UklaunchError("namespaces, TAPs and BPF programs need root", "run it with sudo")
