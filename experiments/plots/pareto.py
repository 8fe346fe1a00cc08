"""Trade-offs of two objectives: a point a policy, one panel a case; the non-dominated ones are marked and joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from muxtune.experiments.plots.style import PALETTE, draw, short
from muxtune.policies.objectives.base import require_objective

COLUMNS, PANEL_INCHES = 2, (5.2, 3.8)
ON_FRONT, DOMINATED = PALETTE[2], PALETTE[5]
NAME_LETTERS = 30


def scatter(cases: Sequence[dict[str, Any]]) -> str:
    """SVG of the rows of some `compare` cases that were given `--pareto`."""
    return draw(lambda: _scatter(cases))


def _scatter(cases: Sequence[dict[str, Any]]) -> Figure:
    columns = min(COLUMNS, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines), layout="constrained")
    for place, panel in enumerate(figure.subplots(lines, columns, squeeze=False).ravel()):
        if place < len(cases):
            _panel(panel, cases[place])
        else:
            panel.set_visible(False)
    return figure


def _panel(axes: Axes, case: dict[str, Any]) -> None:
    names = case["pareto"]["objectives"]
    rows = [r for r in case["rows"] if r["feasible"] and all(r["objectives"][n] is not None for n in names)]
    points = [(*(r["objectives"][n] for n in names), r) for r in rows]
    best = sorted((x, y) for x, y, r in points if r["pareto"])
    axes.plot([x for x, _ in best], [y for _, y in best], color=ON_FRONT, linewidth=0.8, linestyle="--", zorder=1)
    labels: dict[tuple[float, float], list[str]] = {}
    for x, y, row in points:
        axes.scatter([x], [y], color=ON_FRONT if row["pareto"] else DOMINATED, s=26 if row["pareto"] else 16, zorder=2)
        labels.setdefault((x, y), []).append(row["policy"])
    for (x, y), policies in labels.items():
        text = short(", ".join(policies), NAME_LETTERS)
        axes.annotate(text, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set_xlabel(_axis(names[0]))
    axes.set_ylabel(_axis(names[1]))
    axes.margins(0.15)
    axes.set_title(short(f"{case['workload']} on {case['cluster']}"))


def _axis(name: str) -> str:
    unit = require_objective(name).unit
    return f"{name} ({unit})" if unit else name
