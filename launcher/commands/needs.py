"""What a command needs before it makes anything."""

from __future__ import annotations

import os

from ..errors import UklaunchError


def require_root() -> None:
    """Be root; without sudo, in namespaces of the user's own. What touches the kernel comes after this."""
    if os.geteuid() != 0:
        from .. import rootless

        rootless.enter()


def require_real_root() -> None:
    if os.geteuid() != 0:
        raise UklaunchError("this is for root alone", "run it with sudo")
