"""nemo: each task alone under every layout, then in turn or side by side, whichever the simulator finds faster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from muxtune.policies.base import SystemState, make_policy
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import make_evaluate
from muxtune.spec.errors import InfeasibleError, InputError
from muxtune.spec.plan import Plan


def judged(state: SystemState) -> SystemState:
    return replace(state, evaluate=make_evaluate(Roofline(), 0, 2))


def plan_of(state: SystemState, options: str = "") -> Plan:
    return make_policy(f"nemo{options}", Roofline()).plan(state)


def test_equal_small_tasks_run_side_by_side(tiny_workload: Any, tiny_state: Any) -> None:
    """Four equal tasks on four devices without a reason to shard: a device each, no pipeline, no collective."""
    workload = tiny_workload(4, datasets=("sst2",), samples=(4,), ranks=(8,))
    plan = plan_of(judged(tiny_state(workload, microbatches=1, cluster="4xA40")))
    assert sorted(i.devices for i in plan.instances) == [(0,), (1,), (2,), (3,)]
    assert plan.made_by.solver is not None
    assert "4 side by side" in plan.made_by.solver.status


def test_one_task_takes_its_best_layout(tiny_workload: Any, tiny_state: Any) -> None:
    state = judged(tiny_state(tiny_workload(1, samples=(8,)), microbatches=4, cluster="4xA40"))
    plan = plan_of(state)
    assert state.evaluate is not None
    alone_ns = state.evaluate(plan).iteration_ns
    for pp in (1, 2, 4):
        fixed = make_policy("hf-peft", Roofline()).plan(
            tiny_state(state.workload, pp=pp, microbatches=4, cluster="4xA40")
        )
        assert alone_ns <= state.evaluate(fixed).iteration_ns
    assert plan.made_by.solver is not None
    assert plan.made_by.solver.value_ns == alone_ns


def test_swapped_backbones_fit_where_resident_ones_do_not(tiny_workload: Any, tiny_state: Any) -> None:
    state = judged(tiny_state(tiny_workload(8, model="llama2-7b"), cluster="1xA40"))
    with pytest.raises(InfeasibleError, match=r"rank 0 does not fit: needs"):
        plan_of(state)
    plan = plan_of(state, ":residency=swapped")
    assert (plan.residency, len(plan.instances)) == ("swapped", 8)
    with pytest.raises(InfeasibleError):
        make_policy("hf-peft", Roofline()).plan(state)
    assert make_policy("hf-peft:residency=swapped", Roofline()).plan(state).residency == "swapped"


def test_it_needs_the_simulator(tiny_state: Any) -> None:
    with pytest.raises(InputError, match="policy nemo judges plans with the simulator"):
        plan_of(replace(tiny_state(), evaluate=None))
    with pytest.raises(InputError, match="residency='x'"):
        make_policy("nemo:residency=x", Roofline())
