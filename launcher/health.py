"""Health checks: what is asked, how often, and what counts. `probes` asks."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from enum import StrEnum

from .errors import UsageError
from .model import Port


class CheckKind(StrEnum):
    TCP = "tcp"  # the port accepts
    HTTP = "http"  # GET answers with 200-399
    CMD = "cmd"  # a command, run in the pod's namespace and by no shell, exits 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthCheck:
    kind: CheckKind
    port: int = 0
    path: str = "/"
    command: tuple[str, ...] = ()
    interval_s: float = 10.0
    retries: int = 3  # so many failures in a row make a guest unhealthy
    start_s: float = 30.0  # after its start, in which failures do not count

    @classmethod
    def parse(cls, text: str, *, interval_s: float = 10.0, retries: int = 3, start_s: float = 30.0) -> HealthCheck:
        """`tcp:PORT`, `http:PORT[/PATH]`, `cmd:COMMAND`. Raises UsageError."""
        kind, _, rest = text.partition(":")
        if kind not in set(CheckKind) or not rest:
            raise UsageError(f"health check {text!r} is not known", "tcp:8080, http:8080/path or cmd:COMMAND")
        port, path = 0, "/"
        command: tuple[str, ...] = ()
        if kind == CheckKind.CMD:
            try:
                command = tuple(shlex.split(rest))
            except ValueError as exc:
                raise UsageError(f"health check {text!r}: {str(exc).lower()}") from None
            if not command:
                raise UsageError(f"health check {text!r} has no command", "such as cmd:'redis-cli ping'")
        else:
            number, slash, path = rest.partition("/")
            if (slash and kind == CheckKind.TCP) or not path.isascii() or any(c.isspace() for c in path):
                raise UsageError(f"health check {text!r} is not usable", "write it as tcp:8080 or http:8080/path")
            port, path = Port.parse(number).number, f"/{path}"
        return cls(
            kind=CheckKind(kind), port=port, path=path, command=command,
            interval_s=interval_s, retries=retries, start_s=start_s,
        )  # fmt: skip
