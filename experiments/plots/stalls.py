"""Stall breakdown: device-time by cause, a bar a rank (ranks that do the same share one) and one for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from muxtune.experiments.plots.style import LABEL_POINTS, alike, draw, fits, text_colour
from muxtune.spec.stalls import CAUSES, RankTime, fractions, rank_times
from muxtune.spec.timeline import Timeline
from muxtune.spec.units import format_ns

#: (name, colour) of each cause, in the order of CAUSES: what computes is blue and green, what waits is warm or grey.
LOOKS = {
    "compute": ("compute", "#0072B2"),
    "exposed_collective": ("exposed collective", "#D55E00"),
    "p2p_wait": ("p2p wait", "#CC79A7"),
    "pipeline_bubble": ("pipeline bubble", "#D9D9D9"),
    "host_wait": ("host wait", "#E69F00"),
    "optimizer_step": ("optimizer step", "#009E73"),
    "unexplained": ("unexplained", "#000000"),
}
#: A cause that is less than this share of every rank's time cannot be seen, and is left out of the legend.
LEAST = 0.0005
BAR_INCHES, WIDTH_INCHES, LEFT, RIGHT = 0.32, 9.0, 0.11, 0.985


def stalls(timeline: Timeline) -> str:
    """Stacked bars that each add up to 100 % of the makespan."""
    return draw(lambda: _stalls(timeline))


def _stalls(timeline: Timeline) -> Figure:
    times = {t.rank: t for t in rank_times(timeline)}
    rows = alike(timeline, lambda rank: times[rank].parts_ns)
    bars: list[tuple[str, Sequence[RankTime]]] = [(label, [times[rank]]) for label, rank in rows]
    if len(times) > 1:
        bars.insert(0, ("all ranks", list(times.values())))
    height = BAR_INCHES * len(bars) + 1.35
    figure = Figure(figsize=(WIDTH_INCHES, height))
    figure.subplots_adjust(left=LEFT, right=RIGHT, top=1 - 0.35 / height, bottom=0.95 / height)
    axes = figure.add_subplot()
    points = 72 * WIDTH_INCHES * (RIGHT - LEFT)
    for place, (_, parts) in enumerate(bars):
        start = 0.0
        for cause, fraction in fractions(parts):
            colour = LOOKS[cause][1]
            axes.barh(
                place, 100 * fraction, left=100 * start, height=0.8, color=colour, edgecolor="white", linewidth=0.3
            )
            label = f"{100 * fraction:.0f} %"
            if fits(label, fraction * points):
                middle = (100 * (start + fraction / 2), place)
                look: dict[str, Any] = {"color": text_colour(colour), "fontsize": LABEL_POINTS}
                axes.text(*middle, label, ha="center", va="center", **look)
            start += fraction
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"share of the makespan, {format_ns(timeline.makespan_ns)} (%)")
    axes.set_title("device-time by cause")
    least_ns = LEAST * timeline.makespan_ns
    seen = [c for place, c in enumerate(CAUSES) if any(t.parts_ns[place] > least_ns for t in times.values())]
    handles = [Patch(facecolor=LOOKS[c][1], label=LOOKS[c][0]) for c in seen]
    figure.legend(handles=handles, loc="lower center", ncols=7, fontsize=8)
    return figure
