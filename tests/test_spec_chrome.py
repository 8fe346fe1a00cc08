"""The trace: one event a span, spans of a thread nest, messages are arrows, memory and power are counters."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.policies.build import make_instance
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import simulate
from muxtune.spec.bind import bind
from muxtune.spec.chrome import chrome_trace, microseconds
from muxtune.spec.plan import Plan
from muxtune.spec.program import UnitKey
from muxtune.spec.timeline import MemorySample, PowerSample, Span, Timeline

Event = dict[str, Any]


def span(op: str, start: int, end: int, rank: int = 0, **more: Any) -> Span:
    key = UnitKey(step=0, instance=0, bucket=0, unit=0)
    fixed = {"rank": rank, "stream": "compute", "op": op, "index": start, "key": key, "tasks": ("a", "b")}
    return Span(**fixed | {"start_ns": start, "end_ns": end} | more)


def timeline(*spans: Span, **more: Any) -> Timeline:
    return Timeline(source="sim", program_digest="x", seed=0, steps=1, spans=spans, **more)


def events_of(*timelines: Timeline) -> list[Event]:
    """Events after a round trip through JSON."""
    named = [(f"run {i}", t) for i, t in enumerate(timelines)]
    found: list[Event] = json.loads(json.dumps(chrome_trace(named), allow_nan=False))["traceEvents"]
    return found


def ns(time_us: float) -> int:
    """What a reader makes of a time: it multiplies and cuts off."""
    return int(time_us * 1000)


def slices(events: list[Event]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(start, end) in ns of the slices of each thread."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for e in events:
        if e["ph"] == "X":
            found.setdefault((e["pid"], e["tid"]), []).append((ns(e["ts"]), ns(e["ts"]) + ns(e["dur"])))
    return found


def check_rules(events: list[Event]) -> None:
    """Rules of the trace event format that Perfetto relies on."""
    assert {e["ph"] for e in events} <= {"X", "M", "s", "f", "C"}
    threads = slices(events)
    for found in threads.values():
        ends: list[int] = []
        for start, end in sorted(found, key=lambda x: (x[0], -x[1])):
            while ends and ends[-1] <= start:
                ends.pop()
            assert not ends or end <= ends[-1], "slices of a thread nest"
            ends.append(end)
    assert {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"} == set(threads)
    flows: dict[int, list[Event]] = {}
    for e in events:
        if e["ph"] in "sf":
            flows.setdefault(e["id"], []).append(e)
    for pair in flows.values():
        assert [e["ph"] for e in pair] == ["s", "f"]
        begin, finish = pair
        assert (begin["cat"], begin["name"]) == (finish["cat"], finish["name"])
        assert begin["ts"] <= finish["ts"]
        assert finish["bp"] == "e"
        for e in pair:
            assert any(a <= ns(e["ts"]) < b for a, b in threads[e["pid"], e["tid"]]), "an end lies in a slice"
    for e in events:
        if e["ph"] == "C":
            assert all(isinstance(v, (int, float)) for v in e["args"].values())


@given(st.integers(0, 10**12))
def test_nanoseconds_survive(time_ns: int) -> None:
    assert ns(json.loads(json.dumps(microseconds(time_ns)))) == time_ns


def test_by_hand() -> None:
    found = timeline(
        span("forward", 0, 8),
        span("layer0.mlp", 1, 5, index=0, subgraph=0),
        span("layer0.mlp all_reduce", 5, 7, index=0, subgraph=1, stream="comm", host_wait_ns=1),
        span("send_activation", 8, 8, stream="p2p", tag=3),
        span("recv_activation", 0, 12, rank=1, stream="p2p", tag=3),
        memory=(MemorySample(rank=1, time_ns=2500, in_use_bytes=7),),
        power=(PowerSample(rank=0, time_ns=8, watts=30.0),),
    )
    events = events_of(found, found)
    check_rules(events)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    work = {e["name"]: e for e in events if e["ph"] == "X" and e["pid"] == 1}
    assert sorted(work) == [
        *("forward i0 b0 u0", "layer0.mlp", "layer0.mlp all_reduce"),
        *("recv_activation i0 b0 u0", "send_activation i0 b0 u0"),
    ]
    assert names[1, work["layer0.mlp"]["tid"]] == names[1, work["forward i0 b0 u0"]["tid"]] == "rank 0 compute"
    assert names[1, work["layer0.mlp all_reduce"]["tid"]] == "rank 0 comm"
    assert (work["forward i0 b0 u0"]["dur"], work["forward i0 b0 u0"]["args"]["tasks"]) == (0.008, "a, b")
    assert work["layer0.mlp all_reduce"]["args"]["host_wait_ns"] == 1
    assert work["send_activation i0 b0 u0"]["dur"] == 0.001
    arrows = [(e["pid"], e["id"], names[e["pid"], e["tid"]], e["ts"]) for e in events if e["ph"] in "sf"]
    assert arrows == [
        *((1, 1, "rank 0 send", 0.008), (1, 1, "rank 1 receive", 0.008)),
        *((2, 2, "rank 0 send", 0.008), (2, 2, "rank 1 receive", 0.008)),
    ]
    counters = [(e["name"], e["ts"], e["args"]) for e in events if e["ph"] == "C" and e["pid"] == 1]
    assert counters == [("memory rank 1", 2.5, {"bytes": 7}), ("power rank 0", 0.008, {"watts": 30.0})]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["run 0", "run 1"]


def test_a_message_with_one_end_has_no_arrow() -> None:
    events = events_of(timeline(span("send_gradient", 0, 2, stream="p2p", tag=1), span("forward", 2, 3)))
    assert {e["ph"] for e in events} == {"X", "M"}


SPANS = st.builds(
    lambda op, start, width, subgraph: span(op, start, start + width, index=0, subgraph=subgraph),
    st.sampled_from(("forward", "step", "send_activation", "recv_gradient")),
    st.integers(0, 20),
    st.integers(0, 9),
    st.integers(-1, 1),
)


@given(st.lists(SPANS, min_size=1, max_size=9))
def test_spans_that_overlap_get_lanes_of_their_own(spans: list[Span]) -> None:
    events = events_of(timeline(*spans))
    check_rules(events)
    assert sum(e["ph"] == "X" for e in events) == len(spans)


@pytest.mark.parametrize("cluster", ["4xcpu", "4xA40-pcie"])
def test_a_simulated_plan_follows_the_rules(tiny_workload: Any, tiny_state: Any, cluster: str) -> None:
    workload = tiny_workload(4, model="tiny-gpt2")
    state = tiny_state(workload, tp=2, pp=2, cluster=cluster)
    instance = make_instance(state, "i", (("t0", "t1"), ("t2",), ("t3",)), ((0,), (1, 2)), "pad")
    bound = bind(Plan(workload=workload, cluster=state.cluster, instances=(instance,)), seed=0)
    found = simulate(bound, Roofline()).timeline
    events = events_of(found)
    check_rules(events)
    sends = sum(x.op == "send" for r in bound.program.ranks for x in r.instructions)
    assert sum(e["ph"] == "s" for e in events) == sends > 0
    assert sum(e["ph"] == "X" for e in events) == len(found.spans)
    labels = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert labels == {f"rank {r} {s}" for r in range(4) for s in ("compute", "comm", "send", "receive")}
    assert {e["name"] for e in events if e["ph"] == "C"} == {
        f"{c} rank {r}" for c in ("memory", "power") for r in range(4)
    }
