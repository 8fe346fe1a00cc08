"""The four pictures of one Timeline, predicted or measured, by file name."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from muxtune.experiments.plots.clock import clock, fullest_clock
from muxtune.experiments.plots.lanes import draw_lanes, legend_handles
from muxtune.experiments.plots.memory import memory
from muxtune.experiments.plots.stalls import stalls
from muxtune.experiments.plots.style import alike, draw
from muxtune.spec.timeline import Timeline
from muxtune.spec.units import NS_PER_MS, format_ns

LANE_INCHES, WIDTH_INCHES = 0.34, 11.0


def pictures(timeline: Timeline, limit_bytes: int) -> Iterator[tuple[str, str]]:
    """(file name, SVG) of every picture that the Timeline has the data for; `limit_bytes` is a device's memory."""
    yield "pipeline.svg", pipeline(timeline)
    place = fullest_clock(timeline)
    if place is not None:
        yield "clock.svg", clock(timeline, *place)
    if timeline.memory:
        yield "memory.svg", memory(timeline, limit_bytes)
    yield "stalls.svg", stalls(timeline)


def pipeline(timeline: Timeline) -> str:
    """A lane a rank: which unit runs forward or backward when, and where the rank waits."""
    return draw(lambda: _pipeline(timeline))


def _pipeline(timeline: Timeline) -> Figure:
    rows = alike(timeline, lambda rank: tuple((s.op, s.start_ns, s.end_ns) for s in timeline.instruction_spans(rank)))
    height = LANE_INCHES * len(rows) + 1.2
    left = 0.09
    figure = Figure(figsize=(WIDTH_INCHES, height))
    figure.subplots_adjust(left=left, right=0.99, top=1 - 0.35 / height, bottom=0.8 / height)
    axes = figure.add_subplot()
    end_ms = timeline.makespan_ns / NS_PER_MS
    draw_lanes(axes, timeline, rows, 72 * WIDTH_INCHES * (0.99 - left) / (1.004 * end_ms))
    axes.set_xlim(0, 1.004 * end_ms)
    axes.set_xlabel("time (ms)")
    steps = f", {timeline.steps} optimizer steps" if timeline.steps > 1 else ""
    kind = "predicted" if timeline.source == "sim" else "measured"
    axes.set_title(f"{kind}: {format_ns(timeline.makespan_ns)}{steps}")
    figure.legend(handles=legend_handles(timeline), loc="lower center", ncols=7, fontsize=8)
    return figure
