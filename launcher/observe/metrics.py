"""Metrics for Prometheus, taken at each scrape: nothing is kept between two of them.

Names follow https://prometheus.io/docs/practices/naming/: base units, counters end in `_total`. Directions are the
guest's, as node_exporter's are the machine's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

import router

from .. import events, pod, state
from ..errors import UklaunchError
from .sample import GuestSample, PodSample, Traffic, sample_all

_GUEST = ("pod", "guest")
_DIRECTIONS: tuple[tuple[str, str, Callable[[Traffic], float]], ...] = (
    ("receive_bytes", "Bytes to", lambda traffic: traffic.bytes_in),
    ("receive_packets", "Packets to", lambda traffic: traffic.packets_in),
    ("transmit_bytes", "Bytes from", lambda traffic: traffic.bytes_out),
    ("transmit_packets", "Packets from", lambda traffic: traffic.packets_out),
)


class _Pods(Collector):
    """Every pod of this host and its guests. A pod that is coming or going is left out."""

    def collect(self) -> Iterator[Metric]:
        error = GaugeMetricFamily("uklaunch_scrape_error", "1 if the router could not be read, so pods are missing.")
        samples: list[PodSample] = []
        records = state.pods()
        try:
            if records:  # else do not load the router only to look at it
                with pod.open_router() as table:
                    samples = list(sample_all(records, table))
            error.add_metric([], 0)
        except UklaunchError:
            error.add_metric([], 1)
        yield error
        yield from _pod_metrics(samples)
        guests = state.guests()
        yield from _guest_metrics(guests)
        yield from _supervision_metrics(guests)
        yield from _process_metrics([(now.record.name, guest) for now in samples for guest in now.guests])
        yield from _traffic(
            "uklaunch_guest",
            _GUEST,
            "the guest",
            [((now.record.name, guest.name), guest.traffic) for now in samples for guest in now.guests],
        )
        yield from _traffic(
            "uklaunch_link",
            ("pod", "device"),
            "the pod's own stack; lo: containers among themselves",
            [((now.record.name, device), traffic) for now in samples for device, traffic in now.links.items()],
        )


def _pod_metrics(samples: Sequence[PodSample]) -> Iterator[Metric]:
    info = InfoMetricFamily("uklaunch_pod", "A pod.", labels=["pod"])
    flows = GaugeMetricFamily("uklaunch_flows", "Flows in the router's table.", labels=["pod", "protocol", "state"])
    redirected = CounterMetricFamily("uklaunch_redirected_packets", "Packets sent along a flow.", labels=["pod"])
    passed = CounterMetricFamily("uklaunch_passed_packets", "Frames of guests left to the bridge.", labels=["pod"])
    drops = CounterMetricFamily("uklaunch_drops", "Packets dropped, by reason.", labels=["pod", "reason"])
    for now in samples:
        name, record = now.record.name, now.record
        info.add_metric([name], {"netns": record.netns, "ipv4": record.ipv4, "ipv6": record.ipv6})
        for (protocol, flow_state), count in Counter((flow.protocol, flow.state) for flow in now.flows).items():
            flows.add_metric([name, protocol, flow_state], count)
        redirected.add_metric([name], now.counters[router.REDIRECTED])
        passed.add_metric([name], now.counters[router.PASSED])
        for reason in router.drop_reasons():  # also those at 0: a rate needs a value to start from
            drops.add_metric([name, str(reason)], now.counters.get(reason, 0))
    yield from (info, flows, redirected, passed, drops)


def _guest_metrics(records: Sequence[state.GuestRecord]) -> Iterator[Metric]:
    """Also of guests that have ended, until they are forgotten."""
    info = InfoMetricFamily("uklaunch_guest", "A guest.", labels=_GUEST)
    up = GaugeMetricFamily("uklaunch_guest_up", "1 if the guest runs.", labels=_GUEST)
    start = GaugeMetricFamily("uklaunch_guest_start_time_seconds", "Start, since the epoch.", labels=_GUEST)
    limit = GaugeMetricFamily("uklaunch_guest_memory_limit_bytes", "Memory the guest was given.", labels=_GUEST)
    for record in records:
        labels = [record.pod, record.name]
        facts = {"family": record.family, "vmm": record.vmm, "accel": record.accel, "image": record.image}
        info.add_metric(labels, {**facts, "ipv4": record.ipv4, "ipv6": record.ipv6})
        up.add_metric(labels, state.alive(record))
        start.add_metric(labels, record.started_at)
        limit.add_metric(labels, record.memory_mib << 20)
    yield from (info, up, start, limit)


def _supervision_metrics(records: Sequence[state.GuestRecord]) -> Iterator[Metric]:
    """How guests fare. What is not known of a guest, or not asked, has no sample."""
    restarts = CounterMetricFamily("uklaunch_guest_restarts", "Times the guest was started again.", labels=_GUEST)
    health = GaugeMetricFamily(
        "uklaunch_guest_health", "1 for what the guest's health check says.", labels=(*_GUEST, "state")
    )
    code = GaugeMetricFamily("uklaunch_guest_last_exit_code", "Exit code of the last run that ended.", labels=_GUEST)
    reason = GaugeMetricFamily(
        "uklaunch_guest_last_exit_reason", "1 for why the last run ended.", labels=(*_GUEST, "reason")
    )
    ready = GaugeMetricFamily(
        "uklaunch_guest_ready_time_seconds", "When the guest was ready last, since the epoch.", labels=_GUEST
    )
    boot = GaugeMetricFamily(
        "uklaunch_guest_boot_duration_seconds", "From the guest's start until it was ready.", labels=_GUEST
    )
    for record in records:
        labels = [record.pod, record.name]
        restarts.add_metric(labels, record.restarts)
        if record.health is not None:
            for name in ("starting", "healthy", "unhealthy"):
                health.add_metric([*labels, name], record.health == name)
        if record.exit_code is not None:
            code.add_metric(labels, record.exit_code)
        if record.reason is not None:
            reason.add_metric([*labels, record.reason], 1)
        if record.ready_at is not None:
            ready.add_metric(labels, record.ready_at)
            if record.resumed_at is not None and record.ready_at >= record.resumed_at:  # else of the run before
                boot.add_metric(labels, record.ready_at - record.resumed_at)
    happened = CounterMetricFamily("uklaunch_events", "What happened to pods and guests.", labels=["event"])
    for what, count in {**dict.fromkeys(events.KINDS, 0), **events.counts()}.items():
        happened.add_metric([what], count)
    yield from (restarts, health, code, reason, ready, boot, happened)


def _process_metrics(guests: Sequence[tuple[str, GuestSample]]) -> Iterator[Metric]:
    cpu = CounterMetricFamily("uklaunch_guest_cpu_seconds", "CPU time of the guest's VMM.", labels=_GUEST)
    memory = GaugeMetricFamily(
        "uklaunch_guest_resident_memory_bytes", "Resident memory of the guest's VMM.", labels=_GUEST
    )
    for pod_name, guest in guests:
        if guest.process:
            cpu.add_metric([pod_name, guest.name], guest.process.cpu_s)
            memory.add_metric([pod_name, guest.name], guest.process.memory_bytes)
    yield from (cpu, memory)


def _traffic(
    prefix: str, labels: Sequence[str], whom: str, rows: Sequence[tuple[Sequence[str], Traffic]]
) -> Iterator[Metric]:
    for name, text, pick in _DIRECTIONS:
        metric = CounterMetricFamily(f"{prefix}_{name}", f"{text} {whom}.", labels=labels)
        for values, traffic in rows:
            metric.add_metric(values, pick(traffic))
        yield metric


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Pods())
    return registry


def text() -> str:
    """The exposition format, as a scrape gets it."""
    return generate_latest(_registry()).decode()


def serve(address: IPv4Address | IPv6Address, port: int, *, say: Callable[[str], None]) -> None:
    """Answer scrapes, until interrupted. Raises UklaunchError if the address cannot be listened on."""
    try:
        _, thread = start_http_server(port, str(address), _registry())
    except OSError as exc:
        raise UklaunchError(
            f"cannot listen on {address} port {port}: {exc.strerror}", "choose another: --listen [ADDRESS:]PORT"
        ) from exc
    host = f"[{address}]" if address.version == 6 else str(address)
    say(f"metrics at http://{host}:{port}/metrics; Ctrl-C ends it")
    thread.join()
