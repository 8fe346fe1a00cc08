"""A plan without some of its tasks: still valid, the rest in its old sequence, nothing else changed."""

from __future__ import annotations

from typing import Any

import pytest

from muxtune.policies.base import make_policy
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.bind import bind, bind_draw
from muxtune.spec.check import check
from muxtune.spec.draw import draw_onward, draw_samples
from muxtune.spec.errors import PlanError
from muxtune.spec.restrict import without_tasks

POLICIES = ("hf-peft", "sl-peft", "temporal", "muxtune:charge=exact", "muxtune:alignment=chunk,chunk=64", "lorafusion")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("gone", [("t0",), ("t1", "t2"), ("t0", "t1", "t3")], ids=len)
def test_what_is_left_is_valid_and_of_the_same_sequence(
    tiny_workload: Any, tiny_state: Any, policy: str, gone: tuple[str, ...]
) -> None:
    plan = make_policy(policy, Roofline()).plan(tiny_state(tiny_workload(5), pp=2, microbatches=2))
    less = without_tasks(plan, gone)
    assert check(less) == ()
    assert [t.task_id for t in less.workload.tasks] == [t.task_id for t in plan.workload.tasks if t.task_id not in gone]
    whole, part = (
        [[(x.op, x.task) for x in r.instructions if x.op == "step" and x.task not in gone] for r in b.program.ranks]
        for b in (bind(plan, seed=0), bind(less, seed=0))
    )
    assert part == whole


def test_rows_of_the_others_stay_where_they_were(tiny_workload: Any, tiny_state: Any, hand_plan: Any) -> None:
    plan = hand_plan(tiny_state(tiny_workload(4)), [["t0", "t1"], ["t2"], ["t3"]], [[0, 1], [2]])
    less = without_tasks(plan, ["t2", "t3"])
    (instance,) = less.instances
    assert [h.tasks for h in instance.htasks] == [("t0", "t1")]
    assert [b.htasks for b in instance.buckets] == [(0,)]
    kept = [p for u in plan.instances[0].buckets[0].units for p in u.parts if p.htask == 0]
    assert [p for u in instance.buckets[0].units for p in u.parts] == kept


def test_an_unknown_task_and_an_empty_plan_are_refused(tiny_workload: Any, tiny_state: Any, hand_plan: Any) -> None:
    plan = hand_plan(tiny_state(tiny_workload(2)), [["t0", "t1"]])
    with pytest.raises(PlanError, match="task 'x' is not in the plan: it has t0, t1"):
        without_tasks(plan, ["x"])
    with pytest.raises(PlanError, match="no task is left"):
        without_tasks(plan, ["t0", "t1"])


def test_a_late_task_draws_what_it_would_have_drawn_alone(tiny_workload: Any) -> None:
    workload = tiny_workload(2)
    late = draw_onward(workload, 3, 2, {"t0": 5})
    for step in range(2):
        assert late.of("t0", step) == draw_samples(workload, 3, 8).of("t0", 5 + step)
        assert late.of("t1", step) == draw_samples(workload, 3, 8).of("t1", step)


def test_a_draw_onward_gives_the_program_of_that_step(tiny_workload: Any, tiny_state: Any, hand_plan: Any) -> None:
    plan = hand_plan(tiny_state(tiny_workload(2)), [["t0", "t1"]])
    onward = bind_draw(plan, draw_onward(plan.workload, 1, 1, {"t0": 4, "t1": 4}))
    assert onward == bind(plan, seed=1, first_step=4)
