"""Pictures of a Timeline: valid, the same twice, nothing cut or overlapping, and only what the Timeline has data for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from muxtune.experiments.plots.clock import _clock, clock, fullest_clock
from muxtune.experiments.plots.lanes import LANE_KINDS
from muxtune.experiments.plots.memory import _memory
from muxtune.experiments.plots.stalls import LOOKS, _stalls
from muxtune.experiments.plots.style import STYLE, alike, text_colour
from muxtune.experiments.plots.timeline import _pipeline, pictures
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import simulate
from muxtune.spec.bind import bind
from muxtune.spec.stalls import CAUSES
from muxtune.spec.timeline import Timeline

ALL = ["pipeline.svg", "clock.svg", "memory.svg", "stalls.svg"]
LIMIT = 48 * 1024**3


@pytest.fixture(scope="module")
def timelines(tiny_workload: Any, tiny_state: Any, hand_plan: Any) -> dict[str, Timeline]:
    """One rank; pp=4 with tp=2; 32 tasks of which 24 are hTasks of one bucket."""

    def run(tasks: int, groups: Any, buckets: Any, **state: Any) -> Timeline:
        made = tiny_state(tiny_workload(tasks, model="tiny-gpt2"), **state)
        return simulate(bind(hand_plan(made, groups, buckets), seed=0), Roofline()).timeline

    single = [[f"t{i}"] for i in range(32)]
    return {
        "one rank": run(2, [["t0", "t1"]], [[0]], cluster="1xA40"),
        "pp=4 tp=2": run(4, [["t0", "t1"], ["t2"], ["t3"]], [[0], [1, 2]], pp=4, tp=2, cluster="8xA40-nvlink"),
        "32 tasks": run(32, single, [list(range(24)), list(range(24, 32))], pp=2, cluster="2xA40"),
    }


NAMES = ["one rank", "pp=4 tp=2", "32 tasks"]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_valid_and_the_same_twice(timelines: dict[str, Timeline], name: str) -> None:
    first, second = (list(pictures(timelines[name], LIMIT)) for _ in range(2))
    assert first == second
    assert [file for file, _ in first] == ALL
    for _, svg in first:
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert "<metadata" not in svg


def figures(timeline: Timeline) -> Iterable[Figure]:
    rank, index = fullest_clock(timeline)  # type: ignore
    whole = next(s for s in timeline.instruction_spans(rank) if s.index == index)
    inner = [s for s in timeline.spans if (s.rank, s.index) == (rank, index) and s.subgraph >= 0]
    yield _pipeline(timeline)
    yield _clock(whole, inner, 0.5)
    yield _memory(timeline, LIMIT)
    yield _memory(timeline, round(1.2 * max(timeline.peak_bytes)))
    yield _stalls(timeline)


@pytest.mark.parametrize("name", NAMES)
def test_texts_lie_inside_the_picture_and_apart(
    timelines: dict[str, Timeline], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, Bbox]] = []
    draw = Text.draw

    def noted(self: Text, renderer: Any) -> None:
        draw(self, renderer)
        if self.get_text().strip() and self.get_visible() and not clipped(self):
            drawn.append((self.get_text(), self.get_window_extent(renderer)))

    monkeypatch.setattr(Text, "draw", noted)
    with matplotlib.rc_context(STYLE):
        for figure in figures(timelines[name]):
            drawn.clear()
            figure.draw(FigureCanvasAgg(figure).get_renderer())
            assert len(drawn) > 5
            for text, box in drawn:
                assert min(box.x0, box.y0) >= 0, text
                assert box.x1 <= figure.bbox.x1, text
                assert box.y1 <= figure.bbox.y1, text
            for (text, a), (other, b) in combinations(drawn, 2):
                assert not Bbox.intersection(a, b.padded(-0.5)), (text, other)


def clipped(text: Text) -> bool:
    """Whether a text of the data stands beyond what is shown of it."""
    if text.axes is None or not text.get_clip_on():
        return False
    low, high = text.axes.get_xlim()
    return not low <= text.get_position()[0] <= high


def test_ranks_that_do_the_same_share_a_lane(timelines: dict[str, Timeline]) -> None:
    timeline = timelines["pp=4 tp=2"]
    lanes, bars = (f(timeline).axes[0].get_yticklabels() for f in (_pipeline, _stalls))
    assert [t.get_text() for t in lanes] == [f"ranks {r}, {r + 1}" for r in (0, 2, 4, 6)]
    assert [t.get_text() for t in bars] == ["all ranks", *(f"ranks {r}, {r + 1}" for r in (0, 2, 4, 6))]
    assert alike(timeline, lambda rank: 0) == [("ranks 0–7", 0)]
    assert alike(timeline, lambda rank: rank % 2) == [("ranks 0, 2, 4, 6", 0), ("ranks 1, 3, 5, 7", 1)]


def test_every_forward_is_a_box(timelines: dict[str, Timeline]) -> None:
    timeline = timelines["32 tasks"]
    colour = matplotlib.colors.to_rgba(LANE_KINDS[0][2])
    axes = _pipeline(timeline).axes[0]
    drawn = sum(len(c.get_paths()) for c in axes.collections if tuple(c.get_facecolor()[0]) == colour)  # type: ignore
    assert drawn == sum(s.op == "forward" and s.subgraph < 0 for s in timeline.spans)


def test_stall_bars_are_whole(timelines: dict[str, Timeline]) -> None:
    assert tuple(LOOKS) == CAUSES
    axes = _stalls(timelines["32 tasks"]).axes[0]
    widths: dict[float, float] = {}
    for bar in axes.patches:
        at = round(bar.get_y(), 3)  # type: ignore
        widths[at] = widths.get(at, 0.0) + bar.get_width()  # type: ignore
    assert len(widths) == 3  # all ranks, rank 0, rank 1
    assert all(width == pytest.approx(100) for width in widths.values())


def test_the_limit_is_drawn_where_it_does_not_flatten_the_curves(timelines: dict[str, Timeline]) -> None:
    timeline = timelines["one rank"]
    peak = max(timeline.peak_bytes)
    near, far = (_memory(timeline, limit).axes[0] for limit in (2 * peak, 10 * peak))
    assert (len(near.lines), len(far.lines)) == (1, 0)
    assert near.get_ylim()[1] > 2 * far.get_ylim()[1] * 0.9


def test_what_a_timeline_does_not_have_is_not_drawn(timelines: dict[str, Timeline]) -> None:
    whole = timelines["pp=4 tp=2"]
    bare = replace(whole, source="executor", memory=(), spans=tuple(s for s in whole.spans if s.subgraph < 0))
    assert [file for file, _ in pictures(bare, LIMIT)] == ["pipeline.svg", "stalls.svg"]
    assert fullest_clock(bare) is None
    with pytest.raises(KeyError):
        clock(bare, 0, 0)


def test_the_fullest_clock_has_the_most_htasks(timelines: dict[str, Timeline]) -> None:
    rank, index = fullest_clock(timelines["32 tasks"])  # type: ignore
    spans = [s for s in timelines["32 tasks"].spans if (s.rank, s.index) == (rank, index) and s.subgraph >= 0]
    assert len({s.tasks for s in spans}) == 24


def test_labels_are_readable_on_their_colour() -> None:
    assert (text_colour("#0072B2"), text_colour("#000000"), text_colour("#56B4E9")) == ("white", "white", "black")


def test_boxes_of_a_cut_unit_name_their_chunk(timelines: dict[str, Timeline]) -> None:
    whole = timelines["one rank"]
    first = next(s for s in whole.spans if s.op == "forward")
    cut = replace(
        whole, spans=tuple(replace(s, key=replace(s.key, chunk=2)) if s.key == first.key else s for s in whole.spans)
    )
    found = [[text.get_text() for text in _pipeline(t).findobj(Text)] for t in (whole, cut)]  # type: ignore[attr-defined]
    label = f"{first.key.bucket}.{first.key.unit}"
    assert (label in found[0], f"{label}.2" in found[0], f"{label}.2" in found[1]) == (True, False, True)
    assert ("numbers: bucket.unit" in found[0], "numbers: bucket.unit.chunk" in found[1]) == (True, True)
