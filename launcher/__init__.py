"""uklaunch, for scripts: pods and guests as async context managers under trio.

    async with open_pod("experiment"), run_guest(GuestSpec(name="db", pod="experiment", image=identify(path))) as db:
        await db.wait_ready()

What is named here is imported when it is first used: `import launcher` costs nothing, which the command line needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import UklaunchError
    from .guest import Guest, RunOptions
    from .health import HealthCheck
    from .image import identify
    from .limits import Limits
    from .model import Accel, AddressPlan, Family, GuestSpec, Port, Protocol
    from .pod import open_pod
    from .publish import Publish
    from .restart import RestartPolicy
    from .run import run_guest

__all__ = [
    "Accel",
    "AddressPlan",
    "Family",
    "Guest",
    "GuestSpec",
    "HealthCheck",
    "Limits",
    "Port",
    "Protocol",
    "Publish",
    "RestartPolicy",
    "RunOptions",
    "UklaunchError",
    "identify",
    "open_pod",
    "run_guest",
]

_HOMES = {
    **dict.fromkeys(("Accel", "AddressPlan", "Family", "GuestSpec", "Port", "Protocol"), "model"),
    **dict.fromkeys(("Guest", "RunOptions"), "guest"),
    "HealthCheck": "health",
    "Limits": "limits",
    "Publish": "publish",
    "RestartPolicy": "restart",
    "UklaunchError": "errors",
    "identify": "image",
    "open_pod": "pod",
    "run_guest": "run",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
