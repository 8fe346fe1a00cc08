"""search: never worse than its starts, what it moves stays a partition, and what its record says is so."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.policies.base import SystemState, make_policy
from muxtune.policies.candidates import Builder, Candidate, candidate_of
from muxtune.policies.choices import layout_choices
from muxtune.policies.moves import Freedom, chunk_sizes, neighbour
from muxtune.policies.search import STARTS
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import make_evaluate
from muxtune.spec.align import ALIGNMENTS
from muxtune.spec.check import check
from muxtune.spec.errors import InfeasibleError, InputError, NoAnswerError
from muxtune.spec.plan import Plan
from tests.conftest import make_state, make_workload


def judged(state: SystemState) -> SystemState:
    return replace(state, evaluate=make_evaluate(Roofline(), 0, 2))


def plan_of(state: SystemState, options: str = "evaluations=40") -> Plan:
    return make_policy(f"search:{options}", Roofline()).plan(state)


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 2, 2), (4, 4, 2), (6, 2, 4)])
def test_never_worse_than_any_start(shape: tuple[int, int, int], tiny_workload: Any, tiny_state: Any) -> None:
    tasks, pp, microbatches = shape
    state = judged(tiny_state(tiny_workload(tasks), pp=pp, microbatches=microbatches))
    assert state.evaluate is not None
    plan = plan_of(state, "evaluations=60")
    value_ns = state.evaluate(plan).iteration_ns
    assert plan.made_by.solver is not None
    assert plan.made_by.solver.value_ns == value_ns
    for name in STARTS[:3]:
        assert value_ns <= state.evaluate(make_policy(name, Roofline()).plan(state)).iteration_ns
        assert name in plan.made_by.solver.status


def test_a_larger_budget_is_never_worse(tiny_workload: Any, tiny_state: Any) -> None:
    state = judged(tiny_state(tiny_workload(6), pp=2))
    values = [plan_of(state, f"evaluations={n},alignment=pad").made_by.solver for n in (20, 40, 80)]
    reached = [v.value_ns for v in values if v is not None and v.value_ns is not None]
    assert reached == sorted(reached, reverse=True)
    assert all(v is not None and v.deterministic for v in values)


def test_it_beats_every_start_somewhere(tiny_workload: Any, tiny_state: Any) -> None:
    """Padded plans alone: the same freedom as the planners it starts from."""
    state = judged(tiny_state(tiny_workload(8, samples=(2, 6, 4)), pp=4, microbatches=2, cluster="4xA40"))
    assert state.evaluate is not None
    best_ns = state.evaluate(plan_of(state, "evaluations=120,alignment=pad")).iteration_ns
    paper_ns = state.evaluate(make_policy("muxtune", Roofline()).plan(state)).iteration_ns
    assert best_ns < 0.98 * paper_ns


def test_seconds_end_it_and_are_said(tiny_state: Any) -> None:
    plan = plan_of(judged(tiny_state()), "evaluations=1000000,seconds=0.01")
    assert plan.made_by.solver is not None
    assert not plan.made_by.solver.deterministic


def test_it_may_choose_layout_and_count(tiny_workload: Any, tiny_state: Any) -> None:
    state = judged(tiny_state(tiny_workload(4), cluster="2xA40"))
    kept = layout_choices(state.workload, state.cluster, (1, 2)).kept
    plan = plan_of(replace(state, choices=kept), "evaluations=80,alignment=pad")
    assert state.evaluate is not None
    for choice in kept:
        fixed = replace(state, layout=choice.layout, microbatches=choice.microbatches)
        assert (
            state.evaluate(plan).iteration_ns
            <= state.evaluate(make_policy("muxtune", Roofline()).plan(fixed)).iteration_ns
        )


def test_it_needs_the_simulator_and_a_budget(tiny_state: Any) -> None:
    with pytest.raises(InputError, match="policy search judges plans with the simulator"):
        plan_of(replace(tiny_state(), evaluate=None))
    for options, told in (("evaluations=0", "above 0"), ("seconds=0", "above 0"), ("alignment=x", "alignment='x'")):
        with pytest.raises(InputError, match=told):
            make_policy(f"search:{options}", Roofline())
    with pytest.raises(InfeasibleError, match=r"no start is feasible: .*rank 0 needs"):
        plan_of(judged(tiny_state(memory_bytes=2**20)))


STATE = make_state(make_workload(5), pp=2, microbatches=2, cluster="4xA40")
FREEDOM = Freedom(
    choices=layout_choices(STATE.workload, STATE.cluster, (1, 2, 4)).kept,
    alignments=ALIGNMENTS,
    chunk_tokens=chunk_sizes(STATE.workload),
)


def start() -> Candidate:
    found = candidate_of(make_policy("muxtune", Roofline()).plan(STATE))
    assert found is not None
    return found


@given(seed=st.integers(0, 10**6), moves=st.integers(1, 40))
def test_moves_keep_a_partition(seed: int, moves: int) -> None:
    candidate, rng = start(), np.random.default_rng(seed)
    for _ in range(moves):
        candidate = neighbour(candidate, FREEDOM, rng)
        placed = Counter(t for bucket in candidate.buckets for h in bucket for t in h)
        assert placed == Counter(t.task_id for t in STATE.workload.tasks)
        assert all(bucket and all(bucket) for bucket in candidate.buckets)
        assert candidate == candidate.canonical()


def drafted(candidate: Candidate) -> Plan | None:
    builder = Builder(make_policy("search", Roofline()), "search", STATE)
    draft = builder.draft(candidate)
    return None if draft is None else builder.plan(draft)


@given(seed=st.integers(0, 10**6))
def test_what_is_built_can_be_executed_and_read_back(seed: int) -> None:
    candidate, rng = start(), np.random.default_rng(seed)
    for _ in range(8):
        candidate = neighbour(candidate, FREEDOM, rng)
    built = drafted(candidate)
    if built is not None and check(built) == ():
        again = candidate_of(built)
        assert again is not None
        assert again.buckets == candidate.buckets
        assert (again.choice, again.alignment) == (candidate.choice, candidate.alignment)


@pytest.mark.parametrize(
    "key", ["muxtune", "greedy", "sl-peft", "temporal", "muxtune:alignment=chunk", "muxtune:fusion=false"]
)
def test_plans_of_others_are_candidates(key: str) -> None:
    plan = make_policy(key, Roofline()).plan(STATE)
    candidate = candidate_of(plan)
    assert candidate is not None
    built = drafted(candidate)
    assert built is not None
    evaluate = make_evaluate(Roofline(), 0)
    if candidate.order != "eager":
        assert evaluate(built).iteration_ns == evaluate(plan).iteration_ns


@pytest.mark.parametrize("key", ["hf-peft", "lorafusion"])
def test_other_plans_are_none(key: str) -> None:
    try:
        assert candidate_of(make_policy(key, Roofline()).plan(STATE)) is None
    except NoAnswerError:
        pytest.fail("fits")
