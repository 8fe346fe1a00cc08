"""Chrome trace of Timelines (opens in Perfetto): one process a Timeline, one thread a rank and stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from muxtune.spec.timeline import Span, Timeline

STREAMS = ("compute", "comm", "p2p", "host")


def chrome_trace(timelines: Sequence[tuple[str, Timeline]]) -> dict[str, Any]:
    """Trace object of named Timelines, each a process of its own; times in microseconds."""
    events: list[dict[str, Any]] = []
    for pid, (name, timeline) in enumerate(timelines, start=1):
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}})
        events += _thread_names(pid, timeline)
        events += (_event(pid, span) for span in timeline.spans)
        for sample in timeline.memory:
            args = {"bytes": sample.in_use_bytes}
            events.append(
                {"ph": "C", "pid": pid, "name": f"memory rank {sample.rank}", "ts": sample.time_ns / 1000, "args": args}
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _thread(span: Span) -> int:
    return 10 * span.rank + 2 * STREAMS.index(span.stream) + (span.subgraph >= 0)


def _thread_names(pid: int, timeline: Timeline) -> Iterator[dict[str, Any]]:
    for tid, rank, stream, inner in sorted({(_thread(s), s.rank, s.stream, s.subgraph >= 0) for s in timeline.spans}):
        label = f"rank {rank} {stream}" + (" subgraphs" if inner else "")
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": label}}


def _event(pid: int, span: Span) -> dict[str, Any]:
    key = span.key
    chunk = f" c{key.chunk}" if key.chunk else ""
    unit = f" i{key.instance} b{key.bucket} u{key.unit}{chunk}" if key.unit >= 0 else ""
    args = {
        "tasks": ", ".join(span.tasks),
        "step": key.step,
        "instance": key.instance,
        "bucket": key.bucket,
        "unit": key.unit,
        "chunk": key.chunk,
    }
    return {
        "ph": "X",
        "pid": pid,
        "tid": _thread(span),
        "name": f"{span.op}{unit}",
        "ts": span.start_ns / 1000,
        "dur": span.duration_ns / 1000,
        "args": args,
    }
