"""Lanes of a pipeline chart: one a rank (or a set of ranks that do the same), its instructions as boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from muxtune.experiments.plots.style import LABEL_POINTS, edge, fits
from muxtune.spec.stalls import step_begin_ns
from muxtune.spec.timeline import Span, Timeline
from muxtune.spec.units import NS_PER_MS

WAIT = "wait and receive"
#: What a lane shows, in legend order: (name, ops, colour).
LANE_KINDS = (
    ("forward", ("forward",), "#56B4E9"),
    ("backward", ("backward",), "#E69F00"),
    ("optimizer step", ("step",), "#009E73"),
    ("send", ("send_activation", "send_gradient"), "#CC79A7"),
    (WAIT, ("recv_activation", "recv_gradient"), "#D9D9D9"),
)
#: Narrower boxes than this are left out: they would only darken the picture.
LEAST_POINTS = 0.15

#: (start, width) in ms.
Box = tuple[float, float]


def draw_lanes(axes: Axes, timeline: Timeline, rows: Sequence[tuple[str, int]], points_per_ms: float) -> None:
    """One lane a row (label, rank); forwards and backwards carry bucket.unit where it fits."""
    origin_ns = min(s.start_ns for s in timeline.spans)
    begin_ns = step_begin_ns(timeline.spans)
    several, cut = _numbered(timeline)
    for place, (_, rank) in enumerate(rows):
        spans = timeline.instruction_spans(rank)
        boxes: dict[str, list[Box]] = {name: [] for name, _, _ in LANE_KINDS}
        for span in spans:
            for kind, start_ns, end_ns in _parts(span, begin_ns.get((span.key, span.tasks), span.start_ns)):
                boxes[kind].append(((start_ns - origin_ns) / NS_PER_MS, (end_ns - start_ns) / NS_PER_MS))
        for name, _, colour in LANE_KINDS:
            wide = [b for b in boxes[name] if b[1] * points_per_ms > LEAST_POINTS]
            lines = [edge(width_ms * points_per_ms) for _, width_ms in wide]
            axes.broken_barh(wide, (place - 0.42, 0.84), facecolors=colour, edgecolor="white", linewidths=lines)
        for span in spans:
            width_ms = span.duration_ns / NS_PER_MS
            label = (
                f"{span.key.instance}:" * several + f"{span.key.bucket}.{span.key.unit}" + f".{span.key.chunk}" * cut
            )
            if span.op in ("forward", "backward") and fits(label, width_ms * points_per_ms):
                middle = ((span.start_ns - origin_ns) / NS_PER_MS + width_ms / 2, place)
                axes.text(*middle, label, ha="center", va="center", fontsize=LABEL_POINTS, clip_on=True)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _parts(span: Span, begin_ns: int) -> Iterator[tuple[str, int, int]]:
    """(kind, start, end) of a span; what a step waits for other ranks is a wait."""
    kind = next(name for name, ops, _ in LANE_KINDS if span.op in ops)
    if span.op == "step" and begin_ns > span.start_ns:
        yield WAIT, span.start_ns, min(begin_ns, span.end_ns)
        yield kind, min(begin_ns, span.end_ns), span.end_ns
    else:
        yield kind, span.start_ns, span.end_ns


def _numbered(timeline: Timeline) -> tuple[bool, bool]:
    """Whether boxes need the number of their instance, and of their chunk."""
    return len({s.key.instance for s in timeline.spans}) > 1, any(s.key.chunk for s in timeline.spans)


def legend_handles(timeline: Timeline) -> list[Patch]:
    """The kinds, idle, and what the numbers say."""
    handles = [Patch(facecolor=colour, label=name) for name, _, colour in LANE_KINDS]
    handles.append(Patch(facecolor="white", edgecolor="#BBBBBB", label="idle"))
    several, cut = _numbered(timeline)
    note = "numbers: " + "instance:" * several + "bucket.unit" + ".chunk" * cut
    return [*handles, Patch(facecolor="none", edgecolor="none", label=note)]
