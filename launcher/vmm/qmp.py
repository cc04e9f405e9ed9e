"""A QMP client for a peer that may be hostile: a guest that has taken its VMM over speaks here with the supervisor.

qemu.qmp takes what is no QMP for an error, and ends the connection. What is left to us is to keep nothing that can
grow, and to believe no type. Sources: docs/interop/qmp-spec.rst, qapi/run-state.json (`ShutdownCause`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

LINE_LIMIT_BYTES = 64 << 10  # of a message; as Python objects it may take thirty times as much
SHUTDOWN_REASONS = ("guest-shutdown", "guest-reset", "guest-panic")
# Those that say more than the shutdown or reset which follows them.
TELLING = {"GUEST_PANICKED": "guest-panic", "WATCHDOG": "watchdog"}


@dataclass
class Ending:
    """What QEMU has said about the end of its guest: one of SHUTDOWN_REASONS, of TELLING's, or nothing.

    A listener of QMPClient's.
    """

    reason: str = ""

    async def put(self, event: Mapping[str, object]) -> None:
        name, data = event.get("event"), event.get("data")
        reason = data.get("reason") if isinstance(data, dict) else None
        if isinstance(name, str) and name in TELLING and self.reason != "guest-panic":
            self.reason = TELLING[name]
        elif name == "SHUTDOWN" and self.reason not in TELLING.values() and reason in SHUTDOWN_REASONS:
            self.reason = str(reason)


def make_client() -> tuple[QMPClient, Ending]:
    """A client, not connected yet, and what it will hear of the guest's end."""
    import logging

    from qemu.qmp import QMPClient

    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)  # it would quote what it hears, as often as it does
    client, ending = QMPClient("guest", LINE_LIMIT_BYTES), Ending()
    client.events.event_filter = lambda event: False  # it would keep each event for ever
    client.register_listener(ending)
    return client, ending
