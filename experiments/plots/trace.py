"""A trace at a glance: arrivals over time, durations or steps, GPUs, tenants."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from muxtune.experiments.plots.style import PALETTE, draw, short
from muxtune.sim.traces.describe import Description, Spread

#: (seconds, name) of the units of the time axis, the largest of which two fit the span.
UNITS = ((86_400, "days"), (3_600, "hours"), (60, "minutes"), (1, "seconds"))
NAME_LETTERS = 16


def picture(name: str, found: Description) -> str:
    """SVG of a Description."""
    return draw(lambda: _figure(name, found))


def _figure(name: str, found: Description) -> Figure:
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots(2, 2)
    _arrivals(axes[0][0], found)
    if found.duration_s is not None:
        _cumulative(axes[0][1], found.duration_s, "duration (s)", PALETTE[0])
    elif found.steps is not None:
        _cumulative(axes[0][1], found.steps, "steps", PALETTE[0])
    if found.gpus is not None:
        _cumulative(axes[1][0], found.gpus, "GPUs in the source", PALETTE[1])
    else:
        _bars(axes[1][0], found.datasets, "jobs a data set")
    _bars(axes[1][1], found.top_tenants, f"jobs a tenant ({found.tenants:,} in all)")
    figure.suptitle(f"{short(name)}: {found.jobs:,} jobs", x=0.01, ha="left", fontsize=11)
    return figure


def _arrivals(axes: Axes, found: Description) -> None:
    unit_s, unit = next(((s, n) for s, n in UNITS if found.span_s >= 2 * s), UNITS[-1])
    width = found.bin_s / unit_s
    axes.bar([(i + 0.5) * width for i in range(len(found.arrivals))], found.arrivals, width=width, color=PALETTE[5])
    axes.set_xlabel(f"time after the first arrival ({unit})")
    axes.set_title(f"jobs in each of {len(found.arrivals)} equal parts of the time")


def _cumulative(axes: Axes, spread: Spread, label: str, colour: str) -> None:
    shares = [i / (len(spread.quantiles) - 1) for i in range(len(spread.quantiles))]
    axes.step(spread.quantiles, shares, where="post", color=colour)
    positive = [q for q in spread.quantiles if q > 0]
    if positive and max(positive) > 20 * min(positive):
        axes.set_xscale("log")
        axes.set_xlim(left=min(positive))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_ylim(0, 1.02)
    axes.grid(visible=True)
    axes.set_xlabel(label)
    axes.set_title(f"share of jobs up to it (mean {spread.mean:,.5g})")


def _bars(axes: Axes, counts: Sequence[tuple[str, int]], title: str) -> None:
    axes.barh(range(len(counts)), [n for _, n in counts], color=PALETTE[2])
    axes.set_yticks(range(len(counts)), [short(name, NAME_LETTERS) for name, _ in counts])
    axes.set_ylim(len(counts) - 0.5, -0.5)
    axes.set_title(title)
