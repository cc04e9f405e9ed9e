"""`make bench`: what the router costs, against a bridge without translation, nftables' DNAT, a proxy and the
clone-to-all method; what it costs those who do not use it; and where a launch spends its time.

The alternatives take turns, round by round, and each is compared with the bridge of its own round: machines are noisy,
ratios within a round less so. Exit status 0 when all could be measured, whatever the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

from launcher import pod
from launcher.model import AddressPlan

from ..net.conftest import played_pod
from . import baselines, launch
from .topology import lab
from .traffic import Way, latency_us, on_one_core, throughput_gbps

PLAN = AddressPlan()
GUEST4, GUEST6 = str(PLAN.guest_ipv4(2).ip), str(PLAN.guest_ipv6(2).ip)
BRIDGE4, BRIDGE6 = str(PLAN.ipv4.ip), str(PLAN.ipv6.ip)
OUTPUT = Path("build/bench.json")
ports = itertools.count(20000)


def machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in cpuinfo if line.startswith("model name")), "")
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    return {"cpu": model, "cores": str(os.cpu_count()), "kernel": platform.release(), "qemu": qemu.splitlines()[0]}


def ways(stack: contextlib.ExitStack, guests: int) -> dict[str, Callable[[], Way]]:
    """Each alternative, its namespaces made and kept by the stack; a new port at every call."""
    routed = stack.enter_context(played_pod(guests, name=f"bench{guests}"))
    guest = routed.guests[0].netns
    plain = stack.enter_context(lab("plain", 1))
    nat = stack.enter_context(baselines.dnat(guests))
    clone = stack.enter_context(baselines.clone_to_all(guests))
    proxied = stack.enter_context(baselines.proxy())

    def way(client: Path, server: Path, bind: str, dial: str) -> Callable[[], Way]:
        return lambda: Way(client=client, server=server, bind=bind, dial=dial, port=next(ports))

    return {
        "bridge, IPv4": way(plain.netns, plain.guests[0], GUEST4, GUEST4),
        "bridge, IPv6": way(plain.netns, plain.guests[0], GUEST6, GUEST6),
        "router, container to guest, IPv4": way(routed.netns, guest, "0.0.0.0", "127.0.0.1"),
        "router, container to guest, IPv6": way(routed.netns, guest, "::", "::1"),
        "router, guest to container, IPv4": way(guest, routed.netns, "127.0.0.1", BRIDGE4),
        "router, guest to container, IPv6": way(guest, routed.netns, "::1", BRIDGE6),
        "nftables DNAT, IPv4": way(nat.netns, nat.guests[0], "0.0.0.0", "127.0.0.1"),
        "clone-to-all, IPv4": way(clone.netns, clone.guests[0], "0.0.0.0", "127.0.0.1"),
        "proxy (socat), IPv4": lambda: Way(
            client=proxied.netns,
            server=proxied.guests[0],
            bind=GUEST4,
            dial="127.0.0.1",
            port=baselines.PROXY_PORTS[4],
            listen_port=baselines.PROXIED_PORT,
        ),
    }


def compare(guests: int, rounds: int, seconds: int) -> list[dict[str, object]]:
    figures: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        alternatives = ways(stack, guests)
        for _ in range(rounds):
            for name, make in alternatives.items():
                kept = figures.setdefault(name, {"gbps": [], "p50": [], "p99": []})
                kept["gbps"].append(throughput_gbps(make(), seconds))
                p50, p99 = latency_us(make())
                kept["p50"].append(p50)
                kept["p99"].append(p99)
    rows: list[dict[str, object]] = []
    for name, kept in figures.items():
        base = figures["bridge, " + name[-4:]]
        row: dict[str, object] = {"name": name, "guests": guests}
        for key, values in kept.items():
            row[key] = {"min": min(values), "median": statistics.median(values), "max": max(values)}
            row[f"{key}_ratio"] = statistics.median(a / b for a, b in zip(values, base[key], strict=True))
        rows.append(row)
    return rows


def loopback(rounds: int, seconds: int) -> dict[str, float]:
    """What two processes in a pod pay for a router that they do not use: ratios, with / without."""
    gbps: list[float] = []
    p50: list[float] = []
    with contextlib.ExitStack() as stack:
        routed = stack.enter_context(played_pod(1, name="bench-lo"))
        plain = stack.enter_context(lab("lo", 1))
        for _ in range(rounds):
            pair = []
            for netns in (routed.netns, plain.netns):
                made = [
                    Way(client=netns, server=netns, bind="127.0.0.1", dial="127.0.0.1", port=next(ports)) for _ in "ab"
                ]
                pair.append((throughput_gbps(made[0], seconds), latency_us(made[1])[0]))
            gbps.append(pair[0][0] / pair[1][0])
            p50.append(pair[0][1] / pair[1][1])
    return {"throughput_ratio": statistics.median(gbps), "p50_ratio": statistics.median(p50)}


def verdict(good: bool) -> str:
    return "meets the goal" if good else "MISSES the goal"


def show_comparison(rows: list[dict[str, object]]) -> None:
    print(f"\n{'':<36}{'guests':>6}{'Gb/s':>8}{'ratio':>7}{'p50 us':>9}{'ratio':>7}{'p99 us':>9}")
    for row in rows:
        figure = {key: row[key]["median"] for key in ("gbps", "p50", "p99")}  # type: ignore[index]
        line = f"{row['name']:<36}{row['guests']:>6}{figure['gbps']:>8.2f}{row['gbps_ratio']:>7.2f}"
        line += f"{figure['p50']:>9.1f}{row['p50_ratio']:>7.2f}{figure['p99']:>9.1f}"
        if str(row["name"]).startswith("router"):
            good = float(str(row["gbps_ratio"])) >= 0.95 and float(str(row["p50_ratio"])) <= 1.05
            line += f"  {verdict(good)} (>= 0.95, <= 1.05)"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and short rounds")
    args = parser.parse_args()
    rounds, seconds = (2, 1) if args.quick else (7, 1)
    results: dict[str, object] = {"machine": machine()}
    print(*(f"{key}: {value}" for key, value in machine().items()), sep="\n")

    with pod.open_router():
        pass  # loaded, so that what follows measures a warm host
    with on_one_core():
        rows = compare(1, rounds, seconds) + compare(3, max(2, rounds // 2), seconds)
    results["comparison"] = rows
    show_comparison(rows)

    with on_one_core():
        results["loopback"] = cost = loopback(rounds, seconds)
    good = cost["throughput_ratio"] >= 0.97 and cost["p50_ratio"] <= 1.03
    print(f"\nplain loopback with the router / without: throughput {cost['throughput_ratio']:.3f}, "
          f"p50 {cost['p50_ratio']:.3f}  {verdict(good)} (3 %)")  # fmt: skip

    results["router"] = load = launch.router_load(2 if args.quick else 5)
    print(f"\nrouter: first load on a host {load['first load']:.0f} ms  {verdict(load['first load'] <= 600)} (600 ms); "
          f"opened later in {load['open']:.1f} ms")  # fmt: skip

    results["launch"] = steps = launch.launch(2 if args.quick else 7)
    print("\nlaunch, new pod, warm host: ms from the start of the command (QEMU loads beside what follows it)")
    for step, at in sorted(steps.items(), key=lambda item: item[1]):
        print(f"  {at:8.1f}  {step}")
    own = launch.own_work_ms(steps)
    print(f"  to QEMU's exec {steps['vmm-exec']:.0f} ms  {verdict(steps['vmm-exec'] <= 450)} (450 ms); "
          f"of which our own steps {own:.0f} ms  {verdict(own <= 60)} (60 ms)")  # fmt: skip

    results["commands"] = quick = launch.commands(3 if args.quick else 15)
    print("\ncommands, whole processes, ms:")
    for name, value in quick.items():
        goal = 60.0
        print(
            f"  {value:8.1f}  {name}"
            + ("" if name.startswith("python") else f"  {verdict(value <= goal)} ({goal:.0f})")
        )

    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {OUTPUT}")


if __name__ == "__main__":
    main()
