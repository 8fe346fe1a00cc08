"""Pictures of a study as SVG text: pure functions of their data, the same bytes every time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from muxtune.experiments.plots.lanes import draw_lanes, legend_handles
from muxtune.experiments.plots.style import MEASURED, PALETTE, PREDICTED, draw, short
from muxtune.experiments.result import Pair, PlanRow
from muxtune.sim.cost.table import FamilyError
from muxtune.spec.units import GIB, MIB, NS_PER_MS, format_ns

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
FILLS = ("full", "none", "left", "top", "right", "bottom")
BAND = 0.10
#: Where measurements lie further apart than this factor, axes are logarithmic.
LOG_FACTOR = 8.0


def scatter(rows: Sequence[PlanRow]) -> str:
    """Predicted against measured iteration time: colour is the policy, marker the layout, filling the workload."""
    return draw(lambda: _scatter(rows)) if rows else ""


def pipeline(pair: Pair) -> str:
    """Two Gantt charts on one time axis, predicted above measured; one lane a rank."""
    return draw(lambda: _pipeline(pair))


def families(errors: Sequence[FamilyError]) -> str:
    """Held-out error of each operator family, largest first."""
    return draw(lambda: _families(errors)) if errors else ""


def causes(rows: Sequence[PlanRow]) -> str:
    """Device time by cause, summed over plans, predicted beside measured."""
    return draw(lambda: _causes(rows)) if any(r.causes for r in rows) else ""


def memory(rows: Sequence[PlanRow]) -> str:
    """Peak memory of the fullest rank of each plan, predicted beside measured."""
    return draw(lambda: _memory(rows)) if rows else ""


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _scatter(rows: Sequence[PlanRow]) -> Figure:
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    policies, layouts, workloads = (
        sorted({getattr(r, name) for r in rows}) for name in ("policy", "layout", "workload")
    )
    for row in rows:
        colour = PALETTE[policies.index(row.policy) % len(PALETTE)]
        measured, predicted = row.measured_ns / NS_PER_MS, row.predicted_ns / NS_PER_MS
        margin = predicted * row.relative_error
        axes.vlines(measured, predicted - margin, predicted + margin, color=colour, alpha=0.35, linewidth=1.0, zorder=2)
        axes.plot(
            [measured],
            [predicted],
            marker=MARKERS[layouts.index(row.layout) % len(MARKERS)],
            fillstyle=FILLS[workloads.index(row.workload) % len(FILLS)],  # type: ignore[arg-type]
            color=colour,
            markersize=7,
            linestyle="none",
            zorder=3,
        )
    _diagonal(axes, [t / NS_PER_MS for r in rows for t in (r.measured_ns, r.predicted_ns)])
    axes.set_xlabel("measured iteration time (ms)")
    axes.set_ylabel("predicted iteration time (ms)")
    axes.grid(True, which="major")
    figure.legend(handles=_scatter_legend(policies, layouts, workloads), loc="outside right upper", fontsize=8)
    return figure


def _diagonal(axes: Axes, values_ms: Sequence[float]) -> None:
    """y = x with its band, on equal axes."""
    low, high = min(values_ms), max(values_ms)
    if high > LOG_FACTOR * low:
        ends = [low / 1.4, high * 1.4]
        for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
    else:
        ends = [max(0.0, low - 0.15 * (high - low) - 0.05 * low), high + 0.15 * (high - low) + 0.05 * low]
    axes.fill_between(ends, [v * (1 - BAND) for v in ends], [v * (1 + BAND) for v in ends], color="#EFEFEF", zorder=0)
    axes.plot(ends, ends, color="#888888", linewidth=1.0, zorder=1)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)


def _scatter_legend(policies: Sequence[str], layouts: Sequence[str], workloads: Sequence[str]) -> list[Line2D | Patch]:
    def dot(label: str, **style: object) -> Line2D:
        return Line2D([], [], linestyle="none", markersize=6, label=short(label, 36), **style)  # type: ignore[arg-type]

    def heading(label: str) -> Patch:
        return Patch(facecolor="none", edgecolor="none", label=f"{label}:")

    made: list[Line2D | Patch] = [
        Line2D([], [], color="#888888", label="predicted = measured"),
        Patch(color="#EFEFEF", label=f"±{BAND:.0%}"),
        Line2D([], [], color="#888888", alpha=0.5, marker="|", linestyle="none", label="propagated error"),
    ]
    made += [heading("policy"), *(dot(p, marker="o", color=PALETTE[i % len(PALETTE)]) for i, p in enumerate(policies))]
    shapes = (dot(x, marker=MARKERS[i % len(MARKERS)], color="#555555") for i, x in enumerate(layouts))
    made += [heading("layout"), *shapes]
    fills = (dot(w, marker="h", fillstyle=FILLS[i % len(FILLS)], color="#555555") for i, w in enumerate(workloads))
    made += [heading("workload"), *fills]
    return made


def _pipeline(pair: Pair) -> Figure:
    ranks = max(len(pair.predicted.ranks), len(pair.measured.ranks))
    lanes_inches = 2 * (0.34 * ranks + 0.42)
    height = lanes_inches + 0.85
    figure = Figure(figsize=(11.0, height))
    figure.subplots_adjust(
        left=0.055, right=0.99, top=1 - 0.3 / height, bottom=0.8 / height, hspace=0.42 / (0.34 * ranks)
    )
    top, bottom = figure.subplots(2, 1, sharex=True)
    predicted = pair.predicted_at_speed
    end_ms = max(predicted.makespan_ns, pair.measured.makespan_ns) / NS_PER_MS
    points_per_ms = 72 * 11.0 * (0.99 - 0.055) / end_ms
    for axes, name, timeline in ((top, "predicted", predicted), (bottom, "measured", pair.measured)):
        draw_lanes(axes, timeline, [(f"rank {r}", r) for r in timeline.ranks], points_per_ms)
        steps = f" for {timeline.steps} steps" if timeline.steps > 1 else ""
        axes.set_title(f"{name}: {format_ns(timeline.makespan_ns)}{steps}", fontsize=9)
    bottom.set_xlim(0, 1.004 * end_ms)
    bottom.set_xlabel("time (ms)")
    figure.legend(handles=legend_handles(predicted), loc="lower center", ncols=7, fontsize=8)
    return figure


def _families(errors: Sequence[FamilyError]) -> Figure:
    ordered = sorted(errors, key=lambda e: (e.held_out_mape is None, -(e.held_out_mape or 0.0), e.family))
    figure = Figure(figsize=(8.0, 0.26 * len(ordered) + 0.8), layout="constrained")
    axes = figure.add_subplot()
    shown = [100 * (e.held_out_mape or 0.0) for e in ordered]
    axes.barh(range(len(ordered)), shown, color=PREDICTED, height=0.7)
    for place, error in enumerate(ordered):
        value = (
            "too few points to leave one out" if error.held_out_mape is None else f"{100 * error.held_out_mape:.1f} %"
        )
        axes.annotate(
            f"{value}  (n={error.points})", (shown[place], place), (4, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(ordered)), [short(e.family) for e in ordered])
    axes.set_ylim(len(ordered) - 0.5, -0.5)
    axes.set_xlim(0, max(max(shown), 1.0) * 1.3)
    axes.set_xlabel("mean absolute error at points left out of the fit (%)")
    return figure


def _causes(rows: Sequence[PlanRow]) -> Figure:
    names = _distinct(c.cause for r in rows for c in r.causes)
    totals = [
        [sum(getattr(c, side) for r in rows for c in r.causes if c.cause == name) / NS_PER_MS for name in names]
        for side in ("predicted_ns", "measured_ns")
    ]
    whole = sum(totals[1])
    labels = [f"{100 * (p - m) / whole:+.1f} % of all" for p, m in zip(*totals, strict=True)]
    return _paired_bars(names, totals[0], totals[1], labels, "device time, summed over plans and ranks (ms)")


def operators(rows: Sequence[PlanRow]) -> str:
    """Time inside clocks by kind of subgraph and direction, predicted beside measured, summed over plans and ranks."""
    return draw(lambda: _operators(rows)) if any(r.operators for r in rows) else ""


def _operators(rows: Sequence[PlanRow]) -> Figure:
    names = _distinct(o.cause for r in rows for o in r.operators)
    totals = [
        [sum(getattr(o, side) for r in rows for o in r.operators if o.cause == name) / NS_PER_MS for name in names]
        for side in ("predicted_ns", "measured_ns")
    ]
    labels = [f"{100 * (p / m - 1):+.1f} %" if m > 0 else "never measured" for p, m in zip(*totals, strict=True)]
    return _paired_bars(names, totals[0], totals[1], labels, "time inside clocks, summed over plans and ranks (ms)")


def _memory(rows: Sequence[PlanRow]) -> Figure:
    peaks = [
        [max(getattr(r, side), default=0) for r in rows] for side in ("predicted_peak_bytes", "measured_peak_bytes")
    ]
    unit, unit_bytes = ("GiB", GIB) if max(map(max, peaks)) >= GIB else ("MiB", MIB)
    labels = [f"{100 * (p / m - 1):+.1f} %" if m > 0 else "not measured" for p, m in zip(*peaks, strict=True)]
    names = [short(f"{r.policy}, {r.workload}, {r.layout}") for r in rows]
    scaled = [[value / unit_bytes for value in side] for side in peaks]
    return _paired_bars(names, scaled[0], scaled[1], labels, f"peak memory of the fullest rank ({unit})")


def _paired_bars(
    names: Sequence[str], predicted: Sequence[float], measured: Sequence[float], labels: Sequence[str], unit: str
) -> Figure:
    """Two bars a name, with the error of the prediction beside them."""
    figure = Figure(figsize=(8.0, 0.36 * len(names) + 1.1), layout="constrained")
    axes = figure.add_subplot()
    for shift, values, colour, label in (
        (-0.2, predicted, PREDICTED, "predicted"),
        (0.2, measured, MEASURED, "measured"),
    ):
        axes.barh([i + shift for i in range(len(names))], values, height=0.38, color=colour, label=label)
    for place, label in enumerate(labels):
        end = max(predicted[place], measured[place], 0.0)
        axes.annotate(label, (end, place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), [short(n) for n in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(min(0.0, *predicted, *measured), max(*predicted, *measured, 1e-9) * 1.18)
    axes.set_xlabel(unit)
    figure.legend(loc="outside upper right", ncols=2, fontsize=8)
    return figure
