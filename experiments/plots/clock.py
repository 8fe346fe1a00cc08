"""Stream chart inside a clock: what one rank's compute and communication streams run during one forward or backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from muxtune.experiments.plots.style import LABEL_POINTS, PALETTE, draw, edge, fits, listed, short, text_colour
from muxtune.spec.stalls import timeline_clocks
from muxtune.spec.timeline import Span, Timeline
from muxtune.spec.units import NS_PER_MS, NS_PER_US, format_ns

#: More launches than this get a second pair of lanes that shows only the first ones.
READABLE = 40
#: Beyond this many hTasks the colours repeat, with another hatch.
HATCHES = ("", "///", "...", "xxx")
LEGEND_ENTRIES = 15
LANE_INCHES, WIDTH_INCHES, LEFT, RIGHT = 0.55, 11.0, 0.075, 0.97


def fullest_clock(timeline: Timeline) -> tuple[int, int] | None:
    """(rank, instruction) of the forward or backward with the most hTasks, then the longest; None without subgraph spans."""
    groups: dict[tuple[int, int], set[tuple[str, ...]]] = {}
    for span in timeline.spans:
        if span.subgraph >= 0:
            groups.setdefault((span.rank, span.index), set()).add(span.tasks)
    whole = {(s.rank, s.index): s.duration_ns for s in timeline.spans if s.subgraph < 0}
    return max(groups, key=lambda at: (len(groups[at]), whole[at], -at[0], -at[1]), default=None)


def clock(timeline: Timeline, rank: int, index: int) -> str:
    """Both streams of one instruction of a rank, subgraphs coloured by hTask; gaps are waits.

    Raises:
        KeyError: the rank has no such instruction, or it has no subgraph spans.
    """
    whole = next((s for s in timeline.instruction_spans(rank) if s.index == index), None)
    inner = [s for s in timeline.spans if s.rank == rank and s.index == index and s.subgraph >= 0]
    if whole is None or not inner:
        raise KeyError((rank, index))
    compute_ns, exposed_ns = timeline_clocks(timeline)[rank, index]
    host_ns = whole.duration_ns - compute_ns - exposed_ns
    return draw(lambda: _clock(whole, inner, host_ns / max(1, whole.duration_ns)))


def _clock(whole: Span, inner: Sequence[Span], waiting: float) -> Figure:
    htasks = list(dict.fromkeys(s.tasks for s in inner))
    streams = [name for name in ("compute", "comm") if any(s.stream == name for s in inner)]
    windows = [(whole.start_ns, whole.end_ns)]
    ordered = sorted(inner, key=lambda s: (s.start_ns, s.end_ns))
    if len(ordered) > READABLE:
        windows.append((whole.start_ns, max(s.end_ns for s in ordered[:READABLE])))
    entries = min(len(htasks), LEGEND_ENTRIES)
    legend_rows = -(-entries // _columns(htasks))
    panel = LANE_INCHES * len(streams) + 0.7
    height = panel * len(windows) + 0.3 + 0.2 * legend_rows
    figure = Figure(figsize=(WIDTH_INCHES, height))
    figure.subplots_adjust(
        left=LEFT,
        right=RIGHT,
        top=1 - 0.35 / height,
        bottom=(0.65 + 0.2 * legend_rows) / height,
        hspace=0.95 / (LANE_INCHES * len(streams)),
    )
    panels = figure.subplots(len(windows), 1, squeeze=False)[:, 0]
    unit, unit_ns = ("ms", NS_PER_MS) if whole.duration_ns >= 2 * NS_PER_MS else ("µs", NS_PER_US)
    for axes, window in zip(panels, windows, strict=True):
        _streams(axes, ordered, streams, htasks, window, unit_ns)
    wait = f", {100 * waiting:.0f} % of the time waiting for the host" if waiting >= 0.005 else ""
    count = "one hTask" if len(htasks) == 1 else f"{len(htasks)} hTasks"
    where = f"rank {whole.rank}, {whole.op} of bucket {whole.key.bucket}, unit {whole.key.unit}"
    panels[0].set_title(f"{where}: {format_ns(whole.duration_ns)}, {len(inner)} launches of {count}{wait}")
    if len(windows) > 1:
        panels[1].set_title(f"its first {READABLE} launches", fontsize=9)
    panels[-1].set_xlabel(f"time from the start of the instruction ({unit})")
    figure.legend(handles=_legend(htasks), loc="lower center", ncols=_columns(htasks), fontsize=8)
    return figure


def _streams(
    axes: Axes,
    spans: Sequence[Span],
    streams: Sequence[str],
    htasks: Sequence[tuple[str, ...]],
    window: tuple[int, int],
    unit_ns: int,
) -> None:
    start_ns, end_ns = window
    length = max(1, end_ns - start_ns) / unit_ns
    points_each = 72 * WIDTH_INCHES * (RIGHT - LEFT) / length
    for span in spans:
        if span.start_ns > end_ns:
            continue
        colour, hatch = _look(htasks.index(span.tasks))
        place = streams.index(span.stream)
        left, width = (span.start_ns - start_ns) / unit_ns, span.duration_ns / unit_ns
        box: dict[str, Any] = {
            "color": colour,
            "hatch": hatch,
            "edgecolor": "white",
            "linewidth": edge(width * points_each),
        }
        axes.barh(place, width, left=left, height=0.82, **box)
        label = span.op.split(" ")[0].removeprefix("layer").replace("attention", "attn")
        if fits(label, width * points_each) and not hatch:
            look: dict[str, Any] = {"color": text_colour(colour), "fontsize": LABEL_POINTS, "clip_on": True}
            axes.text(left + width / 2, place, label, ha="center", va="center", **look)
    axes.set_yticks(range(len(streams)), ["compute" if s == "compute" else "collectives" for s in streams])
    axes.set_ylim(len(streams) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, length)


def _look(place: int) -> tuple[str, str]:
    """(colour, hatch) of the hTask at a place of the bucket."""
    return PALETTE[place % len(PALETTE)], HATCHES[place // len(PALETTE) % len(HATCHES)]


def _columns(htasks: Sequence[tuple[str, ...]]) -> int:
    longest = max(len(_name(h)) for h in htasks)
    return max(1, min(len(htasks), LEGEND_ENTRIES, 150 // (longest + 6)))


def _name(tasks: tuple[str, ...]) -> str:
    return listed((short(t, 18) for t in dict.fromkeys(tasks)), 3)


def _legend(htasks: Sequence[tuple[str, ...]]) -> list[Patch]:
    named = htasks if len(htasks) <= LEGEND_ENTRIES else htasks[: LEGEND_ENTRIES - 1]
    handles = []
    for place, tasks in enumerate(named):
        colour, hatch = _look(place)
        handles.append(Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=_name(tasks)))
    if len(named) < len(htasks):
        handles.append(Patch(facecolor="none", edgecolor="none", label=f"and {len(htasks) - len(named)} more"))
    return handles
