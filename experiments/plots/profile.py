"""report.html of a profile: a family a picture, with measured points, fitted curves, their band and the left-out residuals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from muxtune.experiments.plots.style import PALETTE, draw, short
from muxtune.sim.cost.table import REMAINDERS, Curve, FamilyError, FittedTable, interpolant, residuals
from muxtune.spec.cluster import DeviceSpec, device_presets
from muxtune.spec.ops import FAMILIES
from muxtune.spec.units import NS_PER_US, format_ns

TEMPLATE = Path(__file__).parents[1] / "data" / "profile.html"
#: A legend of more lines hides the picture.
MOST_CURVES = 12
CURVE_POINTS = 60


def page(fitted: FittedTable, name: str) -> str:
    """A self-contained page; nothing is loaded from elsewhere."""
    device = device_presets()[fitted.device]
    figures = [f"<h2>{escape(e.family)}</h2><figure>{_figure(fitted, e, device)}</figure>" for e in fitted.families]
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"profile {name}: {fitted.device}"),
        subtitle=escape(fitted.provenance.environment),
        reference=format_ns(fitted.reference_ns),
        table="\n".join(_row(fitted, error) for error in fitted.families),
        figures="\n".join(figures),
    )


def _row(fitted: FittedTable, error: FamilyError) -> str:
    curves = [c for c in fitted.curves if c.family == error.family]
    spread = statistics.median(p.spread for c in curves for p in c.points)
    held_out = "too few points" if error.held_out_mape is None else f"{100 * error.held_out_mape:.1f} %"
    cells = (escape(error.family), str(len(curves)), str(error.points), held_out, f"{100 * spread:.1f} %")
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _figure(fitted: FittedTable, error: FamilyError, device: DeviceSpec) -> str:
    curves = [c for c in fitted.curves if c.family == error.family]
    return draw(lambda: _panels(curves, error, device))


def _panels(curves: Sequence[Curve], error: FamilyError, device: DeviceSpec) -> Figure:
    figure = Figure(figsize=(11.0, 3.6), layout="constrained")
    times, misses = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, curve in enumerate(curves):
        colour = PALETTE[place % len(PALETTE)]
        _draw_times(times, curve, colour, error.held_out_mape or 0.0, device)
        left_out = residuals(curve, device)
        misses.plot([_x(s) for s, _ in left_out], [100 * e for _, e in left_out], "o", color=colour, markersize=4)
    variables = " × ".join(FAMILIES[error.family].grid)
    for axes in (times, misses):
        axes.set_xscale("log", base=2)
        axes.set_xlabel(variables)
        axes.grid(True)
        _plain_numbers(axes.xaxis)
    misses.set_xlim(*times.get_xlim())
    if error.family not in REMAINDERS:
        times.set_yscale("log")
        times.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        _plain_numbers(times.yaxis)
    times.set_ylabel("time (µs)")
    misses.axhline(0.0, color="#888888", linewidth=1.0)
    misses.set_ylabel("predicted without it / measured − 1 (%)")
    if len(curves) <= MOST_CURVES:
        figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    else:
        figure.suptitle(f"{len(curves)} operator groups", fontsize=8)
    return figure


def _plain_numbers(axis: Axis) -> None:
    """1024 in place of a power of two."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_times(axes: Axes, curve: Curve, colour: str, mape: float, device: DeviceSpec) -> None:
    """Points with their spread; a curve a value of the second variable (attention has one: the length of a row)."""
    points = sorted(curve.points, key=lambda p: _x(p.size))
    middles = [p.p50_ns / NS_PER_US for p in points]
    bars = [abs(m) * p.spread / 2 for m, p in zip(middles, points, strict=True)]
    label = short(curve.name, 60)
    axes.errorbar([_x(p.size) for p in points], middles, yerr=bars, fmt="o", color=colour, markersize=4, label=label)
    fitted = interpolant(curve, device)
    for rest in sorted({p.size[1:] for p in points}):
        ends = [p.size[0] for p in points if p.size[1:] == rest]
        sizes = sorted(
            {round(min(ends) * (max(ends) / min(ends)) ** (i / CURVE_POINTS)) for i in range(CURVE_POINTS + 1)}
        )
        x = [_x((n, *rest)) for n in sizes]
        y = [fitted.ns((n, *rest)) / NS_PER_US for n in sizes]
        axes.plot(x, y, color=colour, linewidth=1.0)
        axes.fill_between(
            x, [v - abs(v) * mape for v in y], [v + abs(v) * mape for v in y], color=colour, alpha=0.12, linewidth=0
        )


def _x(size: tuple[int, ...]) -> int:
    """One number a size: the product of its variables."""
    product = 1
    for n in size:
        product *= n
    return product
