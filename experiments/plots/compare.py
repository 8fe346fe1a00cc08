"""Comparison of policies: iteration times as bars, one panel a case, best at the top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from muxtune.experiments.plots.style import PALETTE, draw, short
from muxtune.spec.units import NS_PER_MS, format_ns

COLUMNS, ROW_INCHES, HEAD_INCHES = 2, 0.26, 0.75
BEST, OTHER, NONE = PALETTE[2], PALETTE[5], "#777777"
#: Letters of a policy's name that fit beside a panel.
NAME_LETTERS = 30


def bars(cases: Sequence[dict[str, Any]]) -> str:
    """SVG of the rows of some `compare` cases."""
    return draw(lambda: _bars(cases))


def _bars(cases: Sequence[dict[str, Any]]) -> Figure:
    columns = min(COLUMNS, len(cases))
    lines = -(-len(cases) // columns)
    tallest = max(len(case["rows"]) for case in cases)
    size = (5.2 * columns + 0.6, lines * (ROW_INCHES * tallest + HEAD_INCHES))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for place, panel in enumerate(axes):
        if place < len(cases):
            _panel(panel, cases[place])
        else:
            panel.set_visible(False)
    return figure


def _panel(axes: Axes, case: dict[str, Any]) -> None:
    rows = case["rows"]
    times = [(r["iteration_ns"] or 0) / NS_PER_MS for r in rows]
    colours = [BEST if r["policy"] == case["best"] else OTHER for r in rows]
    axes.barh(range(len(rows)), times, color=colours, height=0.75)
    for place, (row, time_ms) in enumerate(zip(rows, times, strict=True)):
        label = format_ns(row["iteration_ns"]) if row["feasible"] else "no plan"
        colour = "black" if row["feasible"] else NONE
        axes.annotate(
            label, (time_ms, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7, color=colour
        )
    axes.set_yticks(range(len(rows)), [short(r["policy"], NAME_LETTERS) for r in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.18 * max(times) or 1.0)
    axes.set_xlabel("iteration (ms)")
    axes.set_title(short(f"{case['workload']} on {case['cluster']}"))
