"""Cutting a plan down: what is left can run and decides alike; the search keeps an effect and says how far it came."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.experiments.laws import with_options
from muxtune.experiments.shrink import shrink, smaller_plans
from muxtune.policies.base import make_policy
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import simulate
from muxtune.spec.bind import bind
from muxtune.spec.check import check
from muxtune.spec.errors import InputError
from muxtune.spec.metrics import compare_operators
from muxtune.spec.plan import Plan
from muxtune.spec.program import UnitKey
from muxtune.spec.restrict import restrict
from muxtune.spec.timeline import Span, Timeline

POLICIES = ("muxtune", "muxtune:alignment=chunk", "temporal", "sl-peft", "hf-peft", "random")


@pytest.fixture(scope="module")
def plans(tiny_state: Any, tiny_workload: Any) -> list[Plan]:
    state = tiny_state(tiny_workload(4), pp=2)
    return [make_policy(with_options(name, ""), Roofline()).plan(state) for name in POLICIES]


@settings(max_examples=40)
@given(data=st.data())
def test_a_restricted_plan_can_run_and_computes_the_samples_that_are_left(plans: list[Plan], data: Any) -> None:
    plan = data.draw(st.sampled_from(plans))
    batches = {t.task_id: t.global_batch_samples for t in plan.workload.tasks}
    kept = {task: data.draw(st.integers(0, count), label=task) for task, count in batches.items()}
    if not any(kept.values()):
        with pytest.raises(InputError, match="no task has a sample left"):
            restrict(plan, kept)
        return
    smaller = restrict(plan, kept)
    assert check(smaller) == ()
    rows = [row for w in bind(smaller, seed=1).program.units for b in w.batches for row in b.rows]
    computed = {task: {r.slot for r in rows if r.task == task} for task in kept}
    assert computed == {task: set(range(count)) for task, count in kept.items()}


def test_nothing_left_out_changes_nothing_that_runs(plans: list[Plan]) -> None:
    for plan in plans:
        same = restrict(plan, {})
        assert same.decision_digest() == plan.decision_digest()
        assert same.predicted is None


def test_order_of_what_is_left_is_the_old_one(plans: list[Plan]) -> None:
    """Stage orders with the units that are gone struck out, units renumbered in place."""
    plan = plans[0]
    smaller = restrict(plan, {plan.workload.tasks[0].task_id: 0})
    for before, after in zip(plan.instances, smaller.instances, strict=True):
        for old, new in zip(before.orders, after.orders, strict=True):
            assert [a.op for a in new.actions if a.op != "step"] == [
                a.op for a in old.actions if a.op != "step" and _is_left(smaller, before, a.bucket, a.unit)
            ]


def _is_left(smaller: Plan, before: Any, bucket: int, unit: int) -> bool:
    tasks = {t.task_id for t in smaller.workload.tasks}
    return any(part.task in tasks for part in before.buckets[bucket].units[unit].parts)


def test_wrong_requests(plans: list[Plan]) -> None:
    task = plans[0].workload.tasks[0]
    with pytest.raises(InputError, match=f"task {task.task_id}: 99 samples: give 0 to {task.global_batch_samples}"):
        restrict(plans[0], {task.task_id: 99})


def test_smaller_plans_are_smaller_and_valid(plans: list[Plan]) -> None:
    for plan in plans:
        samples = sum(t.global_batch_samples for t in plan.workload.tasks)
        found = list(smaller_plans(plan))
        assert found
        for smaller in found:
            assert sum(t.global_batch_samples for t in smaller.workload.tasks) < samples
            assert check(smaller) == ()


class TestSearch:
    def test_finds_the_one_task_that_is_to_blame(self, plans: list[Plan]) -> None:
        """Predictions miss 30 % of any plan that holds t2, else nothing."""

        def trial(plan: Plan) -> tuple[int, int, float]:
            guilty = any(t.task_id == "t2" for t in plan.workload.tasks)
            return (700 if guilty else 1000), 1000, 0.01

        found = shrink(plans[0], trial, most_steps=100)
        assert [(t.task_id, t.global_batch_samples) for t in found.plan.workload.tasks] == [("t2", 1)]
        assert found.error == pytest.approx(-0.3)
        assert 0 < found.kept < found.steps

    def test_an_error_of_the_other_sign_does_not_count(self, plans: list[Plan]) -> None:
        whole = plans[0].decision_digest()
        found = shrink(plans[0], lambda p: (700 if p.decision_digest() == whole else 1300, 1000, 0.01), most_steps=5)
        assert found.plan.decision_digest() == whole
        assert (found.steps, found.kept) == (5, 0)

    def test_an_error_within_the_noise_does_not_count(self, plans: list[Plan]) -> None:
        whole = plans[0].decision_digest()
        found = shrink(plans[0], lambda p: (700, 1000, 0.0 if p.decision_digest() == whole else 0.5), most_steps=5)
        assert found.kept == 0


class TestOperators:
    def test_equal_timelines_have_no_error_and_nothing_is_lost(self, plans: list[Plan]) -> None:
        for plan in plans:
            timeline = simulate(bind(plan, seed=0), Roofline()).timeline
            rows = compare_operators(timeline, timeline, scale=2.0)
            assert all(r.predicted_ns == 2 * r.measured_ns for r in rows)
            inner = sum(s.duration_ns for s in timeline.spans if s.subgraph >= 0)
            assert sum(r.measured_ns for r in rows if "launching" not in r.cause) == inner

    def test_by_hand(self) -> None:
        """A forward of 100 with attention of 60 and of 30 in two layers: 10 are launching."""
        key = UnitKey(step=0, instance=0, bucket=0, unit=0)

        def span(op: str, start_ns: int, end_ns: int, subgraph: int = -1) -> Span:
            times = {"start_ns": start_ns, "end_ns": end_ns}
            return Span(rank=0, stream="compute", op=op, index=0, key=key, tasks=("a",), subgraph=subgraph, **times)

        spans = (span("forward", 0, 100), span("layer0.attention", 0, 60, 0), span("layer1.attention", 60, 90, 1))
        measured = Timeline(source="executor", program_digest="", seed=0, steps=1, spans=spans)
        found = {r.cause: r.measured_ns for r in compare_operators(measured, measured)}
        assert found == {"forward attention": 90, "forward launching": 10, "backward launching": 0}
