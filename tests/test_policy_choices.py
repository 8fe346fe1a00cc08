"""Layouts worth planning for, and the search over them that every policy shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from muxtune.policies.base import Policy, SystemState, make_policy
from muxtune.policies.build import make_instance, make_plan
from muxtune.policies.choices import layout_choices, microbatch_counts, plan_over
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import make_evaluate
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.errors import InfeasibleError
from muxtune.spec.plan import Plan
from tests.conftest import with_memory


def judged(state: SystemState) -> SystemState:
    return replace(state, evaluate=make_evaluate(Roofline(), 0, 2))


def names(workload: Any, cluster: str, *args: Any) -> list[str]:
    return [c.name for c in layout_choices(workload, parse_cluster(cluster), *args).kept]


def test_layouts_by_hand(tiny_workload: Any) -> None:
    assert names(tiny_workload(), "2xA40", (1, 2)) == [
        *("tp=1 pp=1 dp=1 C=1", "tp=1 pp=1 dp=1 C=2", "tp=1 pp=2 dp=1 C=1", "tp=1 pp=2 dp=1 C=2"),
        *("tp=1 pp=1 dp=2 C=2", "tp=2 pp=1 dp=1 C=1", "tp=2 pp=1 dp=1 C=2"),
    ]
    assert layout_choices(tiny_workload(), parse_cluster("2xA40"), (1, 2)).pruned_shape == 1  # dp=2 with C=1


def test_tensor_parallelism_stays_inside_a_node(tiny_workload: Any) -> None:
    assert not any(name.startswith("tp=4") for name in names(tiny_workload(), "2x2xA40-ib", (4,)))
    assert any(name.startswith("tp=2") for name in names(tiny_workload(), "2x2xA40-ib", (4,)))
    assert any(" sp" in name for name in names(tiny_workload(), "2xA40", (4,), True))


def test_a_backbone_that_does_not_fit_is_pruned(tiny_workload: Any) -> None:
    workload = tiny_workload(model="llama2-7b")  # 13.5 GB in half precision
    cluster = with_memory(parse_cluster("2xA40"), 10 * 2**30)
    found = layout_choices(workload, cluster, (2,))
    assert [c.name for c in found.kept] == ["tp=1 pp=2 dp=1 C=2", "tp=2 pp=1 dp=1 C=2"]
    assert found.pruned_memory == 2  # one device, and two replicas of it
    assert "A40 has 10.0 GiB" in found.closest


def test_auto_counts(tiny_workload: Any) -> None:
    assert microbatch_counts(tiny_workload(3, samples=(2, 9, 4))) == (1, 2, 4, 8)


@pytest.mark.parametrize("reference", ["muxtune", "temporal", "nemo"])
def test_the_search_keeps_the_best_of_all_choices(reference: str, tiny_state: Any, tiny_workload: Any) -> None:
    state = judged(tiny_state(tiny_workload(4), cluster="2xA40"))
    choices = layout_choices(state.workload, state.cluster, (1, 2, 4))
    plan = plan_over(make_policy(reference, Roofline()), reference, state, choices)
    assert state.evaluate is not None
    best_ns = state.evaluate(plan).iteration_ns
    for choice in choices.kept:
        one = make_policy(reference, Roofline()).plan(
            replace(state, layout=choice.layout, microbatches=choice.microbatches)
        )
        assert best_ns <= state.evaluate(one).iteration_ns
    searched = plan.made_by.layouts
    assert searched is not None
    assert (searched.candidates, searched.pruned_memory) == (len(choices.kept), 0)
    assert searched.evaluations >= searched.candidates - searched.infeasible


class Picky(Policy):
    """Plans under one layout only."""

    def plan(self, state: SystemState) -> Plan:
        if state.layout.tp == 1 or state.microbatches == 1:
            raise InfeasibleError("tp=2 and C=2 or nothing")
        ids = [t.task_id for t in state.workload.tasks]
        return make_plan(self, "picky", state, [make_instance(state, "shared", [ids], [[0]])])


def test_choices_without_a_plan_are_counted_and_none_at_all_is_a_reason(tiny_state: Any) -> None:
    state = judged(tiny_state(cluster="2xA40"))
    choices = layout_choices(state.workload, state.cluster, (1, 2))
    plan = plan_over(Picky(Picky.Config(), Roofline()), "picky", state, choices)
    assert plan.instances[0].layout.tp == 2
    assert plan.made_by.layouts is not None
    assert plan.made_by.layouts.infeasible == len(choices.kept) - 1
    few = replace(choices, kept=choices.kept[:2])
    with pytest.raises(InfeasibleError, match=r"under any of 2 layouts; tp=1 pp=1 dp=1 C=2: tp=2 and C=2 or nothing"):
        plan_over(Picky(Picky.Config(), Roofline()), "picky", state, few)
    nothing = layout_choices(state.workload, with_memory(state.cluster, 2**20), (2,))
    with pytest.raises(InfeasibleError, match=r"no layout fits: rank \d needs .* A40 has 1\.00 MiB"):
        plan_over(Picky(Picky.Config(), Roofline()), "picky", state, nothing)
