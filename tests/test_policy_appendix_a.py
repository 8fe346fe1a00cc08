"""appendix-a: its program equals listing every order of tiny cases, its policy is never worse than buckets and eager order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, permutations, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.policies.base import make_policy
from muxtune.policies.flow import Job, Sequences, fits, least_ns, makespan_ns
from muxtune.policies.fusion import exact_partition
from muxtune.policies.solver import best_order
from muxtune.policies.surrogate import Surrogate
from muxtune.policies.template import schedule
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.errors import InputError

AMPLE = 10**6


def job(kind: int, forward: tuple[int, ...], backward: tuple[int, ...], held: int = 1) -> Job:
    return Job(kind=kind, forward_ns=forward, backward_ns=backward, held_bytes=(held,) * len(forward))


def every(jobs: int, stages: int) -> Iterator[Sequences]:
    """Every order: forwards and backwards each in one order on all stages, and any merge of them on each."""
    merges = list(combinations(range(2 * jobs), jobs))
    for down, up in product(permutations(range(jobs)), repeat=2):
        for chosen in product(merges, repeat=stages):
            yield tuple(_merged(down, up, places) for places in chosen)


def _merged(down: tuple[int, ...], up: tuple[int, ...], places: tuple[int, ...]) -> Any:
    forwards, backwards = iter(down), iter(up)
    size = len(down) + len(up)
    return tuple(("forward", next(forwards)) if i in places else ("backward", next(backwards)) for i in range(size))


def listed_ns(jobs: list[Job], budget: tuple[int, ...]) -> int:
    values = [
        ns
        for order in every(len(jobs), len(budget))
        if (ns := makespan_ns(jobs, order)) is not None and fits(jobs, order, budget)
    ]
    return min(values)


def test_by_hand() -> None:
    # Two stages, two equal units of 1 down and 1 up: 2 to fill and drain, 4 of work on the last stage.
    equal = [job(0, (1, 1), (1, 1)), job(0, (1, 1), (1, 1))]
    assert makespan_ns(equal, ((("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1)),) * 2) == 6
    assert best_order(equal, (AMPLE, AMPLE), 8, "highs", 100).bound_ns == 6 == least_ns(equal)
    # With room for one unit on the first stage they follow each other: 4 + 4.
    assert best_order(equal, (1, AMPLE), 8, "highs", 100).bound_ns == 8
    assert makespan_ns(equal, ((("backward", 0), ("forward", 0)),)) is None


@settings(max_examples=12)
@given(data=st.data())
def test_the_program_equals_listing_every_order(data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, 2))
    times = st.tuples(*(st.integers(1, 9) for _ in range(stages)))
    jobs = [
        job(k, data.draw(times), data.draw(times), data.draw(st.integers(1, 3)))
        for k in range(data.draw(st.integers(1, 2)))
    ]
    jobs += jobs[:1]
    budget = tuple(data.draw(st.integers(1, 7)) for _ in range(stages))
    best = listed_ns(jobs, budget)
    most = sum(sum(j.forward_ns) + sum(j.backward_ns) for j in jobs)
    answer = best_order(jobs, budget, most, "highs", 2000)
    assert answer.sequences is not None
    assert fits(jobs, answer.sequences, budget)
    assert makespan_ns(jobs, answer.sequences) == answer.bound_ns == best
    assert least_ns(jobs) <= best


@pytest.mark.parametrize(("tasks", "pp", "microbatches"), [(2, 2, 2), (3, 2, 2), (3, 3, 1), (1, 2, 3), (4, 1, 1)])
def test_never_worse_than_buckets_and_eager_order(
    tasks: int, pp: int, microbatches: int, tiny_state: Any, tiny_workload: Any
) -> None:
    state = tiny_state(tiny_workload(tasks), pp=pp, microbatches=microbatches, cluster="4xA40")
    surrogate = Surrogate(Roofline(), state, "pad")
    template = schedule(surrogate, exact_partition(surrogate, surrogate.sorted_tasks())).template
    plan = make_policy("appendix-a", Roofline()).plan(state)
    record = plan.made_by.solver
    assert record is not None
    assert record.bound_ns is not None
    assert record.gap is not None
    assert record.value_ns is not None
    assert record.bound_ns <= record.value_ns <= template.makespan_ns
    assert (record.status == "optimal") == (record.bound_ns == record.value_ns)
    assert record.gap <= 1e-3
    assert state.evaluate(plan).iteration_ns > 0


def test_beyond_its_limits_it_says_that_nothing_is_proven(tiny_state: Any, tiny_workload: Any) -> None:
    state = tiny_state(tiny_workload(3), pp=2, microbatches=2, cluster="4xA40")
    record = make_policy("appendix-a:units=1", Roofline()).plan(state).made_by.solver
    assert record is not None
    assert record.bound_ns is not None
    assert record.value_ns is not None
    assert record.nodes == 0
    assert record.bound_ns <= record.value_ns
    with pytest.raises(InputError, match="units"):
        make_policy("appendix-a:units=0", Roofline())
