"""Metrics of a Timeline by hand, and Kendall's τ-b against scipy."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from muxtune.spec.estimate import Estimate
from muxtune.spec.metrics import (
    bubble_fraction,
    busy_ns,
    compare_causes,
    exposed_comm_fraction,
    kendall_tau_b,
    task_step_ns,
)
from muxtune.spec.program import Instruction, UnitKey
from muxtune.spec.timeline import Span, Timeline, span_op


def span(op: str, start: int, end: int, *, rank: int = 0, step: int = 0, tasks: Any = ("a",), **more: Any) -> Span:
    key = UnitKey(step=step, instance=0, bucket=0, unit=0)
    return Span(
        **{"rank": rank, "stream": "compute", "op": op, "index": start, "key": key, "tasks": tasks}
        | {"start_ns": start, "end_ns": end}
        | more
    )


def timeline(*spans: Span, steps: int = 1) -> Timeline:
    return Timeline(source="sim", program_digest="x", seed=0, steps=steps, spans=spans)


#: Rank 0 works 0-4 and 8-10, rank 1 receives 0-4 and works 4-8.
TWO_RANKS = timeline(
    span("forward", 0, 4),
    span("backward", 8, 10),
    span("recv_activation", 0, 4, rank=1),
    span("forward", 4, 6, rank=1),
    span("backward", 6, 8, rank=1),
)


def test_busy_and_bubble_by_hand() -> None:
    assert [busy_ns(TWO_RANKS, r) for r in (0, 1)] == [6, 4]
    assert bubble_fraction(TWO_RANKS) == 0.5
    assert (TWO_RANKS.makespan_ns, TWO_RANKS.ranks) == (10, (0, 1))


def test_subgraph_spans_are_not_counted_twice() -> None:
    inner = span("forward", 0, 4, subgraph=0)
    assert busy_ns(timeline(*TWO_RANKS.spans, inner), 0) == 6


def test_iteration_is_makespan_over_steps() -> None:
    assert timeline(span("forward", 5, 105), steps=3).iteration_ns == 33


def test_exposed_communication_by_hand() -> None:
    # Communication 2-6 and 5-8 (together 2-8), compute 0-3 and 7-10: exposed 3-7, that is 4 of 10.
    spans = (
        span("forward", 0, 3, subgraph=0),
        span("forward", 7, 10, subgraph=2),
        span("forward", 2, 6, stream="comm", subgraph=1),
        span("forward", 5, 8, stream="comm", subgraph=3),
    )
    assert exposed_comm_fraction(timeline(*spans)) == 0.4


def test_task_steps_by_hand() -> None:
    spans = (
        span("forward", 0, 4, tasks=("a", "b")),
        span("step", 9, 10),
        span("step", 7, 8, tasks=("b",)),
        span("forward", 10, 12, step=1),
        span("step", 14, 16, step=1),
    )
    assert task_step_ns(timeline(*spans, steps=2)) == (("a", 8), ("b", 8))


def test_causes_add_up_to_device_time() -> None:
    measured = timeline(*(span(s.op, 2 * s.start_ns, 2 * s.end_ns, rank=s.rank) for s in TWO_RANKS.spans))
    rows = {r.cause: (r.predicted_ns, r.measured_ns) for r in compare_causes(TWO_RANKS, measured)}
    assert rows["forward"] == (6, 12)
    assert rows["transfer and wait"] == (4, 8)
    assert [sum(column) for column in zip(*rows.values(), strict=True)] == [20, 40]
    scaled = compare_causes(TWO_RANKS, measured, scale=2.0)
    assert all(r.predicted_ns == r.measured_ns for r in scaled)


VALUES = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), max_size=12)


@given(VALUES)
def test_tau_b_equals_scipy(pairs: list[tuple[int, int]]) -> None:
    first, second = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    mine = kendall_tau_b(first, second)
    theirs = kendalltau(first, second).statistic if len(pairs) > 1 else math.nan
    assert (mine is None) == math.isnan(theirs)
    assert mine is None or mine == pytest.approx(theirs)


def test_tau_b_by_hand() -> None:
    assert kendall_tau_b([1, 2, 3], [10, 20, 30]) == 1.0
    assert kendall_tau_b([1, 2, 3], [30, 20, 10]) == -1.0
    assert kendall_tau_b([1, 2, 3], [10, 30, 20]) == pytest.approx(1 / 3)
    assert kendall_tau_b([1, 1], [1, 2]) is None
    assert kendall_tau_b([], []) is None


def test_span_names() -> None:
    key = UnitKey(step=0, instance=0, bucket=0, unit=0)
    assert span_op(Instruction(op="recv", key=key, payload="gradient")) == "recv_gradient"
    assert span_op(Instruction(op="step", key=key, task="a")) == "step"


def test_rates(tiny_state: Any, hand_plan: Any) -> None:
    state = tiny_state()
    estimate = state.evaluate(hand_plan(state, [["t0", "t1", "t2", "t3"]]))
    assert isinstance(estimate, Estimate)
    assert estimate.rate_per_s(estimate.iteration_ns) == 1e9
