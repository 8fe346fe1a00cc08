"""Where device-time goes: the time of every rank, from the Timeline's start to its end, split by cause without a rest.

compute + exposed collective + p2p wait + bubble + host wait + optimizer step + unexplained = makespan, to the nanosecond.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from muxtune.spec.intervals import length, overlap, union
from muxtune.spec.noun import noun
from muxtune.spec.program import UnitKey
from muxtune.spec.timeline import Span, Timeline

#: compute: a subgraph on the compute stream. exposed_collective: a collective with no compute beside it. p2p_wait: a send, or
#: a receive whose message is on its way. pipeline_bubble: a receive whose message is not sent yet (the stage before it is
#: late), a step that other ranks have not reached, and the time before a rank's first and after its last instruction.
#: host_wait: kernels or instructions that the host has not issued. unexplained: what the Timeline does not say.
CAUSES = (
    "compute",
    "exposed_collective",
    "p2p_wait",
    "pipeline_bubble",
    "host_wait",
    "optimizer_step",
    "unexplained",
)
COMPUTE, EXPOSED, P2P, BUBBLE, HOST, STEP, UNEXPLAINED = range(len(CAUSES))
#: Causes in which a rank computes.
BUSY = (COMPUTE, STEP)

#: What a moment counts as where instances run at once on a rank: the first of these.
PRECEDENCE = (COMPUTE, STEP, EXPOSED, P2P, HOST, BUBBLE, UNEXPLAINED)
#: Ops that are work of the device itself.
WORK = ("forward", "backward", "step")

#: (start, end, cause).
Segment = tuple[int, int, int]

#: (rank, index of a forward or backward) → (ns of compute in it, ns of collectives with no compute beside them).
Clocks = Mapping[tuple[int, int], tuple[int, int]]

#: (key, tasks) of a step → ns.
StepBegins = dict[tuple[UnitKey, tuple[str, ...]], int]


@noun
class RankTime:
    """One rank's makespan; `parts_ns` has one entry a cause, in the order of CAUSES."""

    rank: int
    parts_ns: tuple[int, ...]


def rank_times(timeline: Timeline, clocks: Clocks | None = None) -> tuple[RankTime, ...]:
    """Every rank's time by its immediate cause, predicted or measured.

    What is inside a forward or backward is read from its subgraph spans, or from `clocks` where those are known already.
    One that has neither counts as compute. Where instructions overlap, the one that started first is counted.
    """
    inside = timeline_clocks(timeline) if clocks is None else clocks
    whole: dict[int, list[Span]] = {rank: [] for rank in timeline.ranks}
    for span in timeline.spans:
        if span.subgraph < 0:
            whole[span.rank].append(span)
    window = (min(s.start_ns for s in timeline.spans), max(s.end_ns for s in timeline.spans))
    found = _Causes(inside, (s for spans in whole.values() for s in spans))
    return tuple(RankTime(rank=r, parts_ns=found.parts(spans, window)) for r, spans in whole.items())


def fractions(times: Iterable[RankTime]) -> tuple[tuple[str, float], ...]:
    """(cause, share of device-time), in the order of CAUSES; the shares add up to 1."""
    sums = [sum(column) for column in zip(*(t.parts_ns for t in times), strict=True)]
    total = sum(sums)
    return tuple((cause, part / total if total else 0.0) for cause, part in zip(CAUSES, sums, strict=True))


def timeline_clocks(timeline: Timeline) -> Clocks:
    """What the subgraph spans say about the inside of forwards and backwards."""
    groups: dict[tuple[int, int], list[Span]] = {}
    for span in timeline.spans:
        if span.subgraph >= 0:
            groups.setdefault((span.rank, span.index), []).append(span)
    return {place: _clock(spans) for place, spans in groups.items()}


def _clock(spans: Sequence[Span]) -> tuple[int, int]:
    compute = union((s.start_ns, s.end_ns) for s in spans if s.stream == "compute")
    comm = union((s.start_ns, s.end_ns) for s in spans if s.stream == "comm")
    waited_ns = sum(s.host_wait_ns for s in spans if s.stream == "compute")
    return max(0, length(compute) - waited_ns), length(comm) - overlap(comm, compute)


def step_begin_ns(spans: Iterable[Span]) -> StepBegins:
    """When each optimizer step could begin: all its ranks sum one gradient norm, so it waits for the last to reach it."""
    found: StepBegins = {}
    for span in spans:
        if span.op == "step":
            at = (span.key, span.tasks)
            found[at] = max(found.get(at, span.start_ns), span.start_ns)
    return found


class _Causes:
    """What the instructions of all ranks say about each other: when a message was sent, when a step could begin."""

    def __init__(self, clocks: Clocks, spans: Iterable[Span]) -> None:
        self.clocks = clocks
        known = tuple(spans)
        self.sent_ns = {s.tag: s.start_ns for s in known if s.op.startswith("send") and s.tag is not None}
        self.met_ns = step_begin_ns(known)

    def parts(self, spans: Sequence[Span], window: tuple[int, int]) -> tuple[int, ...]:
        """Parts of one rank; each moment of the window is counted once.

        Of instances that run at once a moment goes to the one that does most: computes, steps, sums, moves, waits.
        """
        parts = [0] * len(CAUSES)
        lists = [self._segments(mine, window) for mine in _lists(spans)]
        for start_ns, end_ns, cause in lists[0] if len(lists) == 1 else _overlay(lists):
            parts[cause] += end_ns - start_ns
        return tuple(parts)

    def _segments(self, spans: Sequence[Span], window: tuple[int, int]) -> Iterator[Segment]:
        """The window in pieces of one cause each; where instructions overlap, the one that started first is shown."""
        now_ns, idle = window[0], BUBBLE
        for span in sorted(spans, key=lambda s: (s.start_ns, s.index)):
            if span.start_ns > now_ns:
                yield now_ns, span.start_ns, idle
                now_ns = span.start_ns
            if span.end_ns > now_ns:
                for cause, part_ns in self._split(span, now_ns, span.end_ns - now_ns):
                    yield now_ns, now_ns + part_ns, cause
                    now_ns += part_ns
            idle = HOST
        yield now_ns, window[1], BUBBLE

    def _split(self, span: Span, now_ns: int, left_ns: int) -> tuple[tuple[int, int], ...]:
        """The last `left_ns` of a span, from `now_ns` on, as (cause, ns)."""
        if span.op in ("forward", "backward"):
            compute_ns, exposed_ns = self.clocks.get((span.rank, span.index), (left_ns, 0))
            compute_ns = min(compute_ns, left_ns)
            exposed_ns = min(exposed_ns, left_ns - compute_ns)
            return (COMPUTE, compute_ns), (EXPOSED, exposed_ns), (HOST, left_ns - compute_ns - exposed_ns)
        if span.op.startswith("send"):
            return ((P2P, left_ns),)
        if span.op.startswith("recv") and span.tag in self.sent_ns:
            early_ns = min(max(0, self.sent_ns[span.tag] - now_ns), left_ns)
            return (BUBBLE, early_ns), (P2P, left_ns - early_ns)
        if span.op == "step":
            early_ns = min(max(0, self.met_ns[span.key, span.tasks] - now_ns), left_ns)
            return (BUBBLE, early_ns), (STEP, left_ns - early_ns)
        return ((UNEXPLAINED, left_ns),)


def _lists(spans: Sequence[Span]) -> list[list[Span]]:
    """The spans of one rank, by instance where instances run at once: where the work of two overlaps."""
    lists: dict[int, list[Span]] = {}
    for span in spans:
        lists.setdefault(span.key.instance, []).append(span)
    busy = sorted(
        (s.start_ns, s.end_ns, i) for i, mine in lists.items() for s in mine if s.op in WORK and s.duration_ns
    )
    at_once = any(a[2] != b[2] and b[0] < a[1] for a, b in pairwise(busy))
    return list(lists.values()) if len(lists) > 1 and at_once else [list(spans)]


def _overlay(lists: Iterable[Iterable[Segment]]) -> Iterator[Segment]:
    """Segments that cover one window several times, as segments that cover it once, by PRECEDENCE."""
    left = [[x for x in segments if x[1] > x[0]][::-1] for segments in lists]
    while all(left):
        now_ns = max(segments[-1][0] for segments in left)
        end_ns = min(segments[-1][1] for segments in left)
        yield now_ns, end_ns, min((segments[-1][2] for segments in left), key=PRECEDENCE.index)
        for segments in left:
            start_ns, last_ns, cause = segments.pop()
            if last_ns > end_ns:
                segments.append((max(start_ns, end_ns), last_ns, cause))
