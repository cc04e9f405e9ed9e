"""Flows and counters as rows that a person reads. Prints nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .model import Address, Drop, Endpoint, Flow, Reason

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def format_endpoint(endpoint: Endpoint) -> str:
    return _format(endpoint.address, endpoint.port)


def _format(address: Address | None, port: int) -> str:
    if address is None:
        return "-"
    if not port:
        return str(address)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def format_source(drop: Drop) -> str:
    return _format(drop.source, drop.source_port)


def format_target(drop: Drop) -> str:
    return _format(drop.target, drop.target_port)


def format_bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def format_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def flow_rows(flows: Sequence[Flow], names: Mapping[int, str]) -> Table:
    """Headings and rows; `names` are the guests' by index."""

    def who(endpoint: Endpoint) -> str:
        if endpoint.guest is None:
            return "outside" if endpoint.outside else "container"
        return names.get(endpoint.guest, f"guest {endpoint.guest}")

    return (
        ("PROTO", "FROM", "SOURCE", "DIALLED", "SERVED BY", "STATE", "SENT", "RECEIVED", "AGE", "IDLE"),
        [
            (
                flow.protocol,
                who(flow.opener),
                format_endpoint(flow.opener),
                format_endpoint(flow.dialled),
                who(flow.server),
                str(flow.state),
                format_bytes(flow.bytes_sent),
                format_bytes(flow.bytes_received),
                format_seconds(flow.age_s),
                format_seconds(flow.idle_s),
            )
            for flow in flows
        ],
    )


def counter_rows(counters: Mapping[Reason, int]) -> Table:
    return (
        ("COUNTED", "PACKETS", "WHAT IT MEANS"),
        [(str(reason), str(count), reason.text) for reason, count in counters.items()],
    )
