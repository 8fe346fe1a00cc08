"""Chrome trace of Timelines (opens in ui.perfetto.dev): a process a Timeline, a thread a rank's stream, arrows and counters.

Events: X spans (subgraphs nest inside their instruction), s and f the two ends of a message, C memory and power, M names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from muxtune.spec.timeline import Span, Timeline

#: Threads of a rank, from top to bottom. Sends and receives stand apart: only so does each nest.
STREAMS = ("compute", "comm", "send", "receive", "host")
#: Thread numbers of a stream: the first of its lanes; more are used where spans overlap without nesting.
LANES = 10

Event = dict[str, Any]


def chrome_trace(timelines: Sequence[tuple[str, Timeline]]) -> dict[str, Any]:
    """Trace object of named Timelines; times in microseconds."""
    events: list[Event] = []
    messages = 0
    for pid, (name, timeline) in enumerate(timelines, start=1):
        events += _names(pid, "process", 0, name, pid)
        placed = _placed(timeline)
        for tid, label in sorted({tid: _label(tid) for tid, _, _ in placed}.items()):
            events += _names(pid, "thread", tid, label, tid)
        events += (_span_event(pid, tid, span, shown_ns) for tid, span, shown_ns in placed)
        arrows = list(_arrows(pid, placed, messages))
        messages += len(arrows) // 2
        events += arrows
        events += _counters(pid, timeline)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def microseconds(time_ns: int) -> float:
    """ns as µs, such that a reader that multiplies by 1000 and cuts off the rest has the same ns again."""
    found = time_ns / 1000
    return found if int(found * 1000) == time_ns else math.nextafter(found, math.inf)


def _names(pid: int, kind: str, tid: int, label: str, place: int) -> Iterator[Event]:
    where = {"ph": "M", "pid": pid} | ({"tid": tid} if kind == "thread" else {})
    yield {**where, "name": f"{kind}_name", "args": {"name": label}}
    yield {**where, "name": f"{kind}_sort_index", "args": {"sort_index": place}}


def _placed(timeline: Timeline) -> list[tuple[int, Span, int]]:
    """(thread, span, duration as shown) by thread and start; spans of one thread lie inside or beside each other.

    A send or receive that takes no time is shown as 1 ns, so that an arrow has a slice to hold on to.
    """
    groups: dict[int, list[Span]] = {}
    for span in timeline.spans:
        groups.setdefault(_thread(span), []).append(span)
    placed: list[tuple[int, Span, int]] = []
    for thread, spans in sorted(groups.items()):
        least_ns = 1 if spans[0].stream == "p2p" else 0
        open_ends: list[list[int]] = [[] for _ in range(LANES)]
        for span in sorted(spans, key=lambda s: (s.start_ns, -s.end_ns, s.subgraph)):
            shown_ns = max(least_ns, span.duration_ns)
            lane = _lane(open_ends, span.start_ns, span.start_ns + shown_ns)
            placed.append((thread + lane, span, shown_ns))
    return placed


def _lane(open_ends: Sequence[list[int]], start_ns: int, end_ns: int) -> int:
    """The first lane in which a span nests; `open_ends` are the ends of the spans around it, the innermost last."""
    for lane, ends in enumerate(open_ends):
        while ends and ends[-1] <= start_ns:
            ends.pop()
        if not ends or end_ns <= ends[-1] or lane == len(open_ends) - 1:
            ends.append(end_ns)
            return lane
    raise AssertionError("a span has a lane")


def _thread(span: Span) -> int:
    stream = "send" if span.op.startswith("send") else "receive" if span.op.startswith("recv") else span.stream
    return LANES * (len(STREAMS) * span.rank + STREAMS.index(stream)) + 1


def _label(tid: int) -> str:
    place, lane = divmod(tid - 1, LANES)
    rank, stream = divmod(place, len(STREAMS))
    return f"rank {rank} {STREAMS[stream]}" + (f" ({lane + 1})" if lane else "")


def _span_event(pid: int, tid: int, span: Span, shown_ns: int) -> Event:
    key = span.key
    unit = f" i{key.instance} b{key.bucket} u{key.unit}" if key.unit >= 0 and span.subgraph < 0 else ""
    unit += f" c{key.chunk}" if unit and key.chunk else ""
    args: dict[str, Any] = {"tasks": ", ".join(span.tasks), "step": key.step}
    args |= {"instance": key.instance, "bucket": key.bucket, "unit": key.unit, "chunk": key.chunk, "index": span.index}
    if span.host_wait_ns:
        args["host_wait_ns"] = span.host_wait_ns
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "cat": "instruction" if span.subgraph < 0 else "subgraph",
        "name": f"{span.op}{unit}",
        "ts": microseconds(span.start_ns),
        "dur": microseconds(shown_ns),
        "args": args,
    }


def _arrows(pid: int, placed: Iterable[tuple[int, Span, int]], first_id: int) -> Iterator[Event]:
    """From every send to the receive of the same tag; both ends lie inside their slice. None where a tag has one end only."""
    ends: dict[int, list[tuple[int, Span]]] = {}
    for tid, span, _ in placed:
        if span.tag is not None:
            ends.setdefault(span.tag, []).append((tid, span))
    whole = (sorted(pair, key=lambda x: x[1].op.startswith("recv")) for _, pair in sorted(ends.items()))
    for number, (source, target) in enumerate((p for p in whole if len(p) == 2), start=first_id + 1):
        begin_ns = source[1].start_ns
        arrival_ns = max(target[1].start_ns, begin_ns)
        common = {"pid": pid, "cat": "p2p", "name": "message", "id": number}
        yield {"ph": "s", **common, "tid": source[0], "ts": microseconds(begin_ns)}
        yield {"ph": "f", "bp": "e", **common, "tid": target[0], "ts": microseconds(arrival_ns)}


def _counters(pid: int, timeline: Timeline) -> Iterator[Event]:
    for memory in timeline.memory:
        yield _counter(pid, f"memory rank {memory.rank}", memory.time_ns, {"bytes": memory.in_use_bytes})
    for power in timeline.power:
        yield _counter(pid, f"power rank {power.rank}", power.time_ns, {"watts": power.watts})


def _counter(pid: int, name: str, time_ns: int, value: dict[str, Any]) -> Event:
    return {"ph": "C", "pid": pid, "name": name, "ts": microseconds(time_ns), "args": value}
