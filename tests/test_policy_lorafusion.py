"""lorafusion: pairs, bounded micro-batches, and steps that stand where the bubble rule allows them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.policies.base import SystemState, make_policy
from muxtune.policies.lorafusion import drained_under_each_other, pairs
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import estimate
from muxtune.spec.bind import bind
from muxtune.spec.check import check
from muxtune.spec.draw import draw_samples
from muxtune.spec.errors import InputError
from muxtune.spec.plan import Plan
from tests.conftest import make_state, make_workload


def plan_of(state: SystemState, options: str = "") -> Plan:
    return make_policy(f"lorafusion{options}", Roofline()).plan(state)


def test_the_longest_goes_with_the_shortest() -> None:
    assert pairs({"a": 10, "b": 90, "c": 40, "d": 60, "e": 50}) == [("a", "b"), ("c", "d"), ("e",)]
    assert pairs({"b": 1, "a": 1}) == [("a", "b")]
    assert pairs({"a": 1}) == [("a",)]


@given(
    tasks=st.integers(1, 7),
    pp=st.integers(1, 4),
    dp=st.integers(1, 2),
    microbatches=st.integers(2, 5),
    steps=st.integers(1, 3),
)
def test_every_plan_passes_check(tasks: int, pp: int, dp: int, microbatches: int, steps: int) -> None:
    state = make_state(make_workload(tasks), pp=pp, dp=dp, microbatches=microbatches, cluster="8xcpu")
    plan = plan_of(state, f":steps={steps}")
    assert check(plan) == ()
    assert plan.instances[0].steps == steps
    assert bind(plan, seed=0).program.steps == steps


@pytest.mark.parametrize("capacity", [40, 150, 400])
def test_micro_batches_hold_no_more_than_their_bound(capacity: int, tiny_workload: Any, tiny_state: Any) -> None:
    """Packed by the samples of the seed's first step, the tokens of that step can be counted."""
    workload = tiny_workload(5, samples=(5, 7, 9))
    plan = plan_of(tiny_state(workload, pp=2), f":lengths=drawn,capacity_tokens={capacity}")
    draw = draw_samples(workload, 0)

    def tokens(task: str, slot: int) -> int:
        sample = draw.of(task, 0)[slot]
        billed: int = workload.task(task).billed_len_tokens
        return min(sample.prompt_tokens + sample.response_tokens, billed)

    longest = max(tokens(t.task_id, s) for t in workload.tasks for s in range(t.global_batch_samples))
    loads = [
        sum(tokens(p.task, s) for p in unit.parts for s in p.slots)
        for bucket in plan.instances[0].buckets
        for unit in bucket.units
    ]
    assert max(loads) <= max(capacity, longest)
    assert plan.made_by.solver is not None
    assert f"{len(loads)} micro-batches for 3 groups" in plan.made_by.solver.status


def test_a_small_group_leaves_places_empty() -> None:
    """One group of one unit, three stages, two steps: the second step may enter three places after the first."""
    state = make_state(make_workload(1), pp=3)
    orders = drained_under_each_other([("t0",)], [1], state, 2)
    first = [(a.op, a.step) for a in orders[0].actions]
    assert first == [("forward", 0), ("backward", 0), ("step", 0), ("forward", 1), ("backward", 1), ("step", 1)]


def test_another_group_fills_the_drain() -> None:
    """Two groups of two units on two stages: on stage 0 group 1's forwards stand between group 0's last and its step."""
    state = make_state(make_workload(2), pp=2)
    orders = drained_under_each_other([("t0",), ("t1",)], [2, 2], state, 2)
    text = [f"{a.op[0]}{a.bucket}.{a.unit}" if a.op != "step" else f"s{a.task}" for a in orders[0].actions]
    assert text[:9] == ["f0.0", "f0.1", "b0.0", "f1.0", "b0.1", "st0", "f1.1", "b1.0", "f0.0"]


def test_more_steps_without_a_flush_take_less_time_each(tiny_state: Any, tiny_workload: Any) -> None:
    workload = tiny_workload(8, datasets=("sst2",), samples=(8,), ranks=(8,))
    state = tiny_state(workload, pp=4, microbatches=4, cluster="4xA40")
    # Eight equal tasks in equal units: one draw of billed lengths would do, so the steps alone make the difference.
    once, often = (estimate(plan_of(state, f":steps={n}"), Roofline(), 0).iteration_ns for n in (1, 4))
    assert often < once


def test_wrong_options() -> None:
    for options, told in (("steps=0", "steps=0"), ("packing=x", "packing='x'"), ("lengths=x", "lengths='x'")):
        with pytest.raises(InputError, match=told):
            make_policy(f"lorafusion:{options}", Roofline())
