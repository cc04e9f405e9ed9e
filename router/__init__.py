"""The router of uklaunch, seen from Python: load it once per host, fill its tables, read what it does.

    with router.open_router() as table:
        table.add_pod(7, router.PodRow(...))       # then attach table.program_fd with class id 7
        table.add_guest(7, router.GuestRow(...))

Imports nothing of the launcher's. What is named here is imported when first used: `import router` is free.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import RouterError
    from .model import (
        PASSED,
        REDIRECTED,
        Drop,
        Endpoint,
        Flow,
        FlowState,
        GuestRow,
        Loaded,
        PodRow,
        PortRow,
        Reason,
        Severed,
        Timeouts,
        UplinkRow,
    )
    from .tables import (
        DropWatch,
        Router,
        drop_reasons,
        is_loaded,
        loaded,
        open_router,
        pod_ids,
        remove_pod,
        unload_all,
        unload_superseded,
    )
    from .users import load_for, select, unload_for

__all__ = [
    "PASSED",
    "REDIRECTED",
    "Drop",
    "DropWatch",
    "Endpoint",
    "Flow",
    "FlowState",
    "GuestRow",
    "Loaded",
    "PodRow",
    "PortRow",
    "Reason",
    "Router",
    "RouterError",
    "Severed",
    "Timeouts",
    "UplinkRow",
    "drop_reasons",
    "is_loaded",
    "load_for",
    "loaded",
    "open_router",
    "pod_ids",
    "remove_pod",
    "select",
    "unload_all",
    "unload_for",
    "unload_superseded",
]

_TABLES = (
    "DropWatch",
    "Router",
    "drop_reasons",
    "is_loaded",
    "loaded",
    "open_router",
    "pod_ids",
    "remove_pod",
    "unload_all",
    "unload_superseded",
)
_USERS = ("load_for", "select", "unload_for")
_HOMES = {"RouterError": "errors"} | dict.fromkeys(_TABLES, "tables") | dict.fromkeys(_USERS, "users")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES.get(name, 'model')}", __name__), name)
