"""Curves of replays over time, and bars that compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from muxtune.experiments.plots.style import PALETTE, draw, short

#: Replays whose curves are told apart in one picture.
MOST = 8
CURVES = (
    ("busy_gpus", "GPUs that train"),
    ("running_jobs", "jobs on instances"),
    ("waiting_jobs", "jobs that wait"),
    ("billed_tokens_per_s", "billed tokens/s"),
)
BARS: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
    ("billed tokens/s", lambda b: b["billed_tokens_per_s"]),
    ("mean JCT (h)", lambda b: None if b["jct_s"]["mean"] is None else b["jct_s"]["mean"] / 3600),
    ("p95 JCT (h)", lambda b: None if b["jct_s"]["p95"] is None else b["jct_s"]["p95"] / 3600),
)


def label(body: dict[str, Any]) -> str:
    """Names a replay in a picture."""
    return f"{body['policy']} / {body['cluster_policy']}, seed {body['seed']}"


def curves(bodies: Sequence[dict[str, Any]]) -> str:
    """SVG: one panel a curve, one line a replay."""
    return draw(lambda: _curves(bodies[:MOST])) if bodies else ""


def _curves(bodies: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(10.4, 6.4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).ravel(), CURVES, strict=True):
        for place, body in enumerate(bodies):
            _line(axes, body, name, PALETTE[place % len(PALETTE)])
        axes.set_title(title)
        axes.set_xlabel("days")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _line(axes: Axes, body: dict[str, Any], name: str, colour: str) -> None:
    values, step_s = body["series"][name], body["series"]["step_s"]
    axes.stairs(
        values,
        [i * step_s / 86_400 for i in range(len(values) + 1)],
        color=colour,
        linewidth=1.1,
        label=short(label(body), 60),
    )


def bars(bodies: Sequence[dict[str, Any]]) -> str:
    """SVG: a bar a replay for throughput and completion times."""
    return draw(lambda: _bars(bodies)) if bodies else ""


def _bars(bodies: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(10.4, 0.24 * len(bodies) + 1.1), layout="constrained")
    panels = figure.subplots(1, len(BARS), sharey=True)
    for axes, (title, value) in zip(panels, BARS, strict=True):
        found = [value(b) or 0.0 for b in bodies]
        axes.barh(range(len(bodies)), found, color=PALETTE[5], height=0.75)
        for place, number in enumerate(found):
            text = f"{number:,.3g}" if number < 1000 else f"{number:,.0f}"
            axes.annotate(text, (number, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
        axes.set_xlim(0, 1.25 * max(found, default=0) or 1.0)
        axes.set_title(title)
    panels[0].set_yticks(range(len(bodies)), [short(label(b), 40) for b in bodies])
    panels[0].set_ylim(len(bodies) - 0.5, -0.5)
    return figure
