"""One page of pictures of build/bench.json. Reads figures only: what is drawn again needs no measuring again.

Every title states what its picture shows, computed from the figures; our router is blue, a goal is a dashed green line,
whiskers are the quartiles of all rounds.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .launch import GOALS, IMPORTS, STEPS, own_work_ms
from .turns import Row

ROUTER, BASE, OTHER, SOFT = "#1f6fb4", "#55606b", "#b9c0c7", "#8c959d"
GOAL, BAD, INK = "#2e9e5b", "#c8553d", "#22292f"
FLOW_SHADES = ("#9cc8ec", "#4b96d1", "#124f86")
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind words that a line would cross
STEP_NAMES = {
    "cli": "Python and the command line",
    "args": "image identified",
    "trio": "import trio",
    "namespace": "network namespace",
    "tap": "TAP",
    "vmm-exec": "QEMU executed",
    "qmp": "QEMU answers QMP",
    "pyroute2": "import pyroute2",
    "bridge": "bridge",
    "joined": "TAP and router joined",
    "resumed": "guest runs",
}
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#c4cad0",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "uklaunch",  # the same figures make the same file
}


def colour(name: str) -> str:
    return ROUTER if name.startswith("router") else BASE if name.startswith("bridge") else OTHER


def headline(ax: Axes, finding: str, detail: str = "") -> None:
    """Above the axes and what stands on them: the finding in bold, and in grey what it is about."""
    place = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points", "ha": "left", "va": "bottom"}
    ax.annotate(finding, xytext=(0, 30), fontsize=10, weight="bold", **place)
    ax.annotate(detail, xytext=(0, 17), fontsize=8, color=SOFT, **place)


def goal_line(ax: Axes, at: float, text: str) -> None:
    ax.axvline(at, color=GOAL, linewidth=1.2, linestyle=(0, (4, 3)), zorder=3)
    ax.text(at, 1.01, text, color=GOAL, fontsize=7.5, ha="center", va="bottom", transform=ax.get_xaxis_transform())


# --- alternatives: one list of names, a column for each metric ---


def against_the_bridge(ax: Axes, rows: list[Row], metric: str, unit: Callable[[float], str], edge: float) -> None:
    """Bars of the ratio to the bridge, cut off at `edge`; beside each what was measured."""
    for at, row in enumerate(rows):
        if "unmeasurable" in row:
            words = textwrap.fill(row["unmeasurable"], 28, max_lines=2)
            ax.text(0.02 * edge, at, words, color=SOFT, fontsize=7, style="italic", va="center", linespacing=1)
            continue
        ratio, name = row[metric]["ratio"], row["name"]
        shown = min(ratio["median"], edge)
        ax.barh(at, shown, height=0.66, color=colour(name), zorder=2)
        if ratio["q3"] <= edge:
            ax.plot([ratio["q1"], ratio["q3"]], [at, at], color=INK, linewidth=1, zorder=4, solid_capstyle="butt")
        words = unit(row[metric]["median"])
        if ratio["median"] > edge:
            words += f", {ratio['median']:.1f}x"
        inside = shown > 0.4 * edge
        place = {"fontsize": 7.5, "va": "center", "zorder": 5}
        if inside:
            ax.text(0.02 * edge, at, words, color=INK if colour(name) == OTHER else "white", **place)
        else:
            ax.text(max(shown, ratio["q3"]) + 0.02 * edge, at, words, bbox=PAPER, **place)
    goal_line(ax, 1.0, "goal")
    ax.set_xlim(0, edge)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ticks = {0: "0", 0.5: "0.5", 1: "bridge", 1.5: "1.5"}
    ax.set_xticks([at for at in ticks if at < edge], [words for at, words in ticks.items() if at < edge])
    ax.spines["left"].set_visible(False)


def of_the_router(rows: list[Row], metric: str) -> str:
    """The range of our ratios, as words."""
    ratios = [row[metric]["ratio"]["median"] for row in rows if row["name"].startswith("router") and metric in row]
    low, high = (f"{ratio:.2f}" for ratio in (min(ratios), max(ratios)))
    return low if low == high else f"{low}–{high}"


def thousands(value: float) -> str:
    return f"{value / 1000:.1f} k/s" if value < 10_000 else f"{value / 1000:.0f} k/s"


COLUMNS: tuple[tuple[str, str, str, str, Callable[[float], str], float], ...] = (
    ("compare", "gbps", "Throughput", "more is better", lambda v: f"{v:.1f} Gb/s", 1.35),
    ("compare", "p50", "Latency, p50", "less is better", lambda v: f"{v:.1f} µs", 1.8),
    ("rates", "connections", "Connections", "more is better", thousands, 1.35),
    ("rates", "datagrams", "Small datagrams", "more is better", thousands, 1.35),
    ("rates", "cpu", "CPU time per gigabit", "less is better", lambda v: f"{v:.0f} ms", 1.8),
)


def draw_comparison(axes: list[Axes], answers: dict[str, Any]) -> None:
    for ax, (question, metric, title, better, unit, edge) in zip(axes, COLUMNS, strict=True):
        rows = answers.get(question)
        rows = rows.get(metric) if isinstance(rows, dict) else rows
        if rows is None:
            not_measured(ax, title, question)
            continue
        against_the_bridge(ax, rows, metric, unit, edge)
        headline(ax, f"{title}: {of_the_router(rows, metric)}", f"router, of the bridge's; {better}")
        names = [row["name"] for row in rows] if ax is axes[0] else []
        ax.set_yticks(range(len(names)), names)
        for label, name in zip(ax.get_yticklabels(), names, strict=False):
            label.set_color(ROUTER if name.startswith("router") else INK)


# --- scale ---


def not_measured(ax: Axes, title: str, question: str) -> None:
    ax.set_axis_off()
    headline(ax, title)
    ax.text(0, 0.9, f"not measured yet: python -m tests.bench {question}", color=SOFT, style="italic", va="top",
            transform=ax.transAxes)  # fmt: skip


def line(ax: Axes, rows: list[Row], metric: str, **style: Any) -> None:
    """Medians over guests, in a band from quartile to quartile."""
    guests = [row["guests"] for row in rows]
    ax.plot(guests, [row[metric]["median"] for row in rows], marker="o", markersize=4, linewidth=1.8, zorder=4, **style)
    ax.fill_between(guests, [row[metric]["q1"] for row in rows], [row[metric]["q3"] for row in rows],
                    color=style["color"], alpha=0.18, linewidth=0, zorder=2)  # fmt: skip


def lines_by_flows(ax: Axes, rows: list[Row], metric: str) -> None:
    for shade, (flows, group) in zip(FLOW_SHADES, itertools.groupby(rows, key=lambda row: row["flows"]), strict=True):
        line(ax, [row for row in group if metric in row], metric, color=shade, label=f"{flows:,}")


def beside(ax: Axes, row: Row, metric: str, words: str, **style: Any) -> None:
    """A line's name and last value, left of its last point."""
    at = (row["guests"], row[metric]["median"])
    above = style["va"] == "bottom"
    ax.annotate(f"{words}, {at[1]:.{0 if at[1] >= 20 else 1}f}", at, xytext=(4 if above else -10, 5 if above else 0),
                textcoords="offset points", ha="right", fontsize=8, **style)  # fmt: skip


def guests_axis(ax: Axes, unit: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xlim(0.85, 76)
    ax.set_xticks([1, 8, 64], ["1 guest", "8", "64 in the pod"])
    ax.tick_params(axis="x", pad=6)
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.text(0, 1.02, unit, ha="right", va="bottom", fontsize=8, color=SOFT, transform=ax.transAxes)
    ax.tick_params(axis="y", colors=SOFT, labelsize=8)
    ax.grid(axis="y", color="#eceff1", linewidth=0.8)
    ax.set_axisbelow(True)


def worst(rows: list[Row], metric: str, *, least: bool) -> float:
    ratios = [row[metric]["ratio"]["median"] for row in rows if metric in row]
    return min(ratios) if least else max(ratios)


def draw_scale(axes: list[Axes], answers: dict[str, Any]) -> None:
    titles = ("Throughput in a crowd", "Latency in a crowd", "Opening a connection in a crowd")
    if "scale" not in answers:
        for ax, title in zip(axes, titles, strict=True):
            not_measured(ax, title, "scale")
        return
    rows, clones = answers["scale"]["router"], answers["scale"]["clone-to-all"]
    for ax, metric, unit in ((axes[0], "gbps", "Gb/s"), (axes[1], "p50", "µs")):
        lines_by_flows(ax, rows, metric)
        points = [row for row in clones if metric in row]
        line(ax, points, metric, color=OTHER)
        if points:
            beside(ax, points[-1], metric, "clone-to-all", color=SOFT, va="center")
        if metric == "p50":
            beside(ax, rows[-1], metric, "router", color=ROUTER, va="bottom")
        guests_axis(ax, unit)
    least, most = worst(rows, "gbps", least=True), worst(rows, "p50", least=False)
    of_one = "of what it is with one guest and nothing else"
    headline(axes[0], f"{titles[0]}: {least:.0%} at least", of_one)
    headline(axes[1], f"{titles[1]}: {most:.0%} at most", of_one)
    axes[0].legend(title="router, open flows", loc="lower left", frameon=False, fontsize=8, title_fontsize=8, ncols=3)

    lines_by_flows(axes[2], rows, "connect")
    alone = [row for row in rows if row["flows"] == rows[0]["flows"] and "ask" in row]
    line(axes[2], alone, "ask", color=BAD, linestyle=(0, (2, 1.5)))
    beside(axes[2], alone[-1], "ask", "the first to a port:\nall guests are asked", color=BAD, va="center")
    beside(axes[2], alone[-1], "connect", "any later one", color=ROUTER, va="bottom")
    guests_axis(axes[2], "µs")
    times = alone[-1]["ask"]["median"] / alone[0]["ask"]["median"]
    headline(axes[2], f"Opening a connection: {worst(rows, 'connect', least=False):.0%} at most",
             f"of one guest alone; a port's first: {times:.1f} times with {alone[-1]['guests']} guests")  # fmt: skip


# --- who does not use it, memory, launch ---


def draw_loopback(ax: Axes, answers: dict[str, Any]) -> None:
    if "loopback" not in answers:
        not_measured(ax, "Plain loopback", "loopback")
        return
    row = answers["loopback"][1]
    costs = []
    for at, (metric, words, sign) in enumerate((("gbps", "throughput lost", -1), ("p50", "latency added", 1))):
        ratio = row[metric]["ratio"]
        cost, low, high = (sign * (ratio[key] - 1) * 100 for key in ("median", "q1", "q3"))
        costs.append(cost)
        ax.plot([low, high], [at, at], color=ROUTER, linewidth=5, alpha=0.3, solid_capstyle="butt")
        ax.plot(cost, at, "o", color=ROUTER, markersize=8, zorder=4)
        ax.text(
            cost,
            at - 0.12,
            f"{words} {cost:+.1f} %",
            ha="center",
            va="bottom",
            fontsize=8.5,
            zorder=5,
            bbox=PAPER,
        )
    ax.axvline(0, color="#c4cad0", linewidth=0.8)
    goal_line(ax, 2, "goal: 2 %")
    reach = max(3.0, *(1.5 * abs(cost) for cost in costs))
    ax.set_xlim(-reach, reach)
    ax.set_ylim(1.5, -0.7)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    headline(ax, f"Plain loopback pays {max(0.0, *costs):.1f} %",
             "between two containers, with the router against without")  # fmt: skip


def draw_memory(ax: Axes, answers: dict[str, Any]) -> None:
    if "memory" not in answers:
        not_measured(ax, "Memory", "memory")
        return
    figures = answers["memory"]
    names = [name for name in figures if name != "of it a flow"]
    for at, name in enumerate(names):
        mib = figures[name] / 1024
        ax.barh(at, mib, height=0.6, color=OTHER if name in ("supervisor", "QEMU and guest") else ROUTER)
        ax.text(mib, at, f"  {mib:.1f} MiB" if mib < 100 else f"  {mib:.0f} MiB", va="center", fontsize=8)
    ax.set_xlim(0, max(figures.values()) / 1024 * 1.2)
    ax.set_yticks(range(len(names)), names)
    bare(ax)
    pod, flow = figures["an empty pod, with that"] / 1024, figures["of it a flow"] * 1024
    headline(ax, f"A pod takes {pod:.1f} MiB of the kernel, a flow {flow:.0f} bytes of it",
             "tables are as large as they get from the start; processes' PSS, a guest of 128 MiB")  # fmt: skip


def bare(ax: Axes) -> None:
    """Bars from the top, whose values stand beside them: no axis."""
    ax.invert_yaxis()
    ax.set_xticks([])
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


def draw_launch(ax: Axes, answers: dict[str, Any]) -> None:
    if "launch" not in answers:
        not_measured(ax, "Launch", "launch")
        return
    steps = answers["launch"]["steps"]
    until = sorted((name for name in STEPS if name != "ready"), key=lambda name: steps[name])
    before = 0.0
    for at, name in enumerate(until):
        ax.barh(at, steps[name] - before, left=before, height=0.66, color=OTHER if name in IMPORTS else ROUTER)
        ax.text(steps[name], at, f"  {steps[name] - before:.0f}", va="center", fontsize=8)
        before = steps[name]
    ax.set_yticks(range(len(until)), [STEP_NAMES[name] for name in until])
    ax.invert_yaxis()
    goal_line(ax, GOALS["vmm-exec"], "goal for QEMU's start")
    ax.set_xlim(0, max(GOALS["vmm-exec"], before) * 1.08)
    ax.set_xlabel("ms from the start of the command", fontsize=8, color=SOFT)
    ax.spines["left"].set_visible(False)
    headline(ax, f"QEMU starts after {steps['vmm-exec']:.0f} ms, {own_work_ms(steps):.0f} of them ours",
             f"grey: imports; the guest is ready after {steps['ready'] / 1000:.1f} s")  # fmt: skip


def draw_commands(ax: Axes, answers: dict[str, Any]) -> None:
    if "launch" not in answers:
        not_measured(ax, "Commands", "launch")
        return
    figures = answers["launch"]["commands"]
    for at, (name, ms) in enumerate(figures.items()):
        ax.barh(at, ms, height=0.6, color=OTHER if name.startswith("python") else ROUTER)
        ax.text(ms, at, f"  {ms:.0f} ms", va="center", fontsize=8)
    ax.set_yticks(range(len(figures)), figures)
    bare(ax)
    ax.set_xlim(0, max(GOALS["command"], *figures.values()) * 1.25)
    goal_line(ax, GOALS["command"], f"goal: {GOALS['command']:.0f} ms")
    own = [ms for name, ms in figures.items() if not name.startswith("python")]
    headline(ax, f"A command takes {max(own):.0f} ms at most", "whole processes, from exec to exit")


# --- the page ---


def page(results: dict[str, Any]) -> Figure:
    questions = results["questions"]
    answers = {name: entry["answer"] for name, entry in questions.items()}
    figure = plt.figure(figsize=(17, 15.5))
    top = figure.add_gridspec(1, 5, left=0.155, right=0.985, top=0.865, bottom=0.61, wspace=0.12)
    middle = figure.add_gridspec(1, 4, left=0.04, right=0.985, top=0.505, bottom=0.335, wspace=0.28)
    bottom = figure.add_gridspec(1, 3, left=0.115, right=0.985, top=0.235, bottom=0.045, wspace=0.42)
    draw_comparison([figure.add_subplot(cell) for cell in top], answers)
    scale = [figure.add_subplot(cell) for cell in middle]
    draw_scale(scale[:3], answers)
    draw_loopback(scale[3], answers)
    for cell, draw_one in zip(bottom, (draw_memory, draw_launch, draw_commands), strict=True):
        draw_one(figure.add_subplot(cell), answers)

    machine = results["machine"]
    commits = " ".join(sorted({entry["commit"] for entry in questions.values()}))
    quick = ", some in few rounds (--quick)" if any(entry["quick"] for entry in questions.values()) else ""
    figure.text(0.02, 0.972, "One localhost for containers and guests: what it costs", fontsize=20, weight="bold")
    figure.text(
        0.02,
        0.962,
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}; commit {commits}, "
        f"{max(entry['taken'] for entry in questions.values())[:10]}{quick}.\nGuests are played by namespaces, except "
        "in memory and launch; both ends are on one core, except for CPU time. Whiskers and bands: half of all rounds.",
        fontsize=9.5,
        va="top",
        linespacing=1.5,
        color=SOFT,
    )
    for y, words in (
        (0.915, "Against the alternatives: one guest; each with the bridge of its own round"),
        (0.562, "In a crowd, and for those who do not use it"),
        (0.292, "Memory and time"),
    ):
        figure.text(0.02, y, words, fontsize=13, color=BASE, weight="bold")
    return figure


def draw(results: dict[str, Any], directory: Path) -> list[Path]:
    """Writes bench.svg and bench.png into the directory."""
    directory.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        figure = page(results)
        paths = [directory / "bench.svg", directory / "bench.png"]
        for path in paths:
            figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)
    return paths
