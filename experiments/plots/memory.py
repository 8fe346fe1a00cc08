"""Memory over time: a panel a rank (ranks with one curve share it), with what is static and the device's limit."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from muxtune.experiments.plots.style import alike, draw
from muxtune.spec.timeline import MemorySample, Timeline
from muxtune.spec.units import GIB, MIB, NS_PER_MS, format_bytes

#: The limit is drawn where it is less than this factor above the peak; else it would flatten the curves, and is only named.
LIMIT_FACTOR = 2.5
STATIC, MOVING, LIMIT = "#999999", "#56B4E9", "#D55E00"
PANEL_INCHES, WIDTH_INCHES = 0.95, 10.0


def memory(timeline: Timeline, limit_bytes: int) -> str:
    """Bytes in use on every rank from the start to the end of the Program."""
    return draw(lambda: _memory(timeline, limit_bytes))


def _memory(timeline: Timeline, limit_bytes: int) -> Figure:
    samples: dict[int, list[MemorySample]] = {rank: [] for rank in timeline.ranks}
    for sample in timeline.memory:
        samples[sample.rank].append(sample)
    rows = alike(timeline, lambda rank: tuple((s.time_ns, s.in_use_bytes) for s in samples[rank]))
    peak = max(s.in_use_bytes for s in timeline.memory)
    unit, unit_bytes = ("GiB", GIB) if peak >= GIB else ("MiB", MIB)
    shown = limit_bytes <= LIMIT_FACTOR * peak
    top = 1.12 * (max(limit_bytes, peak) if shown else peak) / unit_bytes
    height = PANEL_INCHES * len(rows) + 0.95
    figure = Figure(figsize=(WIDTH_INCHES, height))
    figure.subplots_adjust(left=0.075, right=0.985, top=1 - 0.25 / height, bottom=0.75 / height, hspace=0.32)
    panels = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (label, rank) in zip(panels, rows, strict=True):
        _panel(axes, label, samples[rank], timeline.makespan_ns, unit_bytes)
        if shown:
            axes.axhline(limit_bytes / unit_bytes, color=LIMIT, linewidth=1.0, linestyle="--")
    panels[-1].set_xlim(0, timeline.makespan_ns / NS_PER_MS)
    panels[-1].set_ylim(0, top)
    panels[-1].set_xlabel("time (ms)")
    figure.text(0.012, 0.5 + 0.25 / height, f"in use ({unit})", rotation=90, va="center", fontsize=9)
    figure.legend(handles=_handles(limit_bytes, shown), loc="lower center", ncols=3, fontsize=8)
    return figure


def _panel(axes: Axes, label: str, samples: Sequence[MemorySample], end_ns: int, unit_bytes: int) -> None:
    times_ms = [s.time_ns / NS_PER_MS for s in samples] + [end_ns / NS_PER_MS]
    used = [s.in_use_bytes / unit_bytes for s in samples] + [samples[-1].in_use_bytes / unit_bytes]
    static = min(used)
    axes.fill_between(times_ms, used, static, step="post", color=MOVING, linewidth=0)
    axes.fill_between([times_ms[0], times_ms[-1]], [static, static], color=STATIC, linewidth=0)
    highest = max(samples, key=lambda s: (s.in_use_bytes, -s.time_ns))
    text = f"{label}: peak {format_bytes(highest.in_use_bytes)} at {highest.time_ns / NS_PER_MS:.1f} ms"
    axes.set_title(text, fontsize=8, pad=2)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="y", nbins=4)


def _handles(limit_bytes: int, shown: bool) -> list[Patch | Line2D]:
    limit = f"device memory {format_bytes(limit_bytes)}"
    line = Line2D([], [], color=LIMIT, linewidth=1.0, linestyle="--", label=limit)
    far = Patch(facecolor="none", edgecolor="none", label=f"{limit} (above the picture)")
    return [
        Patch(color=STATIC, label="static: weights, adapters, optimizer states"),
        Patch(color=MOVING, label="activations, messages and workspace"),
        line if shown else far,
    ]
