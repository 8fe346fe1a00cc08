"""Buckets and template: number partitioning, order of buckets, eager launching within memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from muxtune.policies.balance import EXACT_ITEMS, balance, balance_gap
from muxtune.policies.surrogate import Surrogate
from muxtune.policies.template import eager_template, schedule


def partitions(items: list[int], parts: int) -> Iterator[list[list[int]]]:
    """Every partition into `parts` non-empty lists."""
    if not items:
        if parts == 0:
            yield []
        return
    head, *rest = items
    for smaller in partitions(rest, parts - 1) if parts else ():
        yield [[head], *smaller]
    for same in partitions(rest, parts):
        for i in range(len(same)):
            yield [*same[:i], [head, *same[i]], *same[i + 1 :]]


def squares(loads: list[int], buckets: Any) -> int:
    """Σ (bucket load)²: with the mean fixed, the squared deviation of Eq. 7 up to a constant."""
    return sum(sum(loads[i] for i in b) ** 2 for b in buckets)


def test_balance_by_hand() -> None:
    assert balance([7, 6, 5, 4], 2) == ((0, 3), (1, 2))
    assert balance([7, 6, 5, 4], 1) == ((0, 1, 2, 3),)
    assert balance([7, 6, 5, 4], 4) == ((0,), (1,), (2,), (3,))


def test_balance_improves_on_longest_first() -> None:
    # Longest first gives 3+2+2 | 3+2; swapping a 3 for a 2 gives 6 | 6.
    loads = [3, 3, 2, 2, 2]
    assert squares(loads, balance(loads, 2)) == 2 * 36


def test_balance_fills_every_bucket_with_zero_loads() -> None:
    assert balance([0, 0, 0], 3) == ((0,), (1,), (2,))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=EXACT_ITEMS), st.data())
def test_balance_is_the_best_partition_of_few(loads: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(loads)))
    found = balance(loads, parts)
    assert len(found) == parts
    assert all(found)
    assert sorted(i for b in found for i in b) == list(range(len(loads)))
    assert squares(loads, found) == min(squares(loads, p) for p in partitions(list(range(len(loads))), parts))
    assert balance_gap(loads, found) == 0


@given(st.lists(st.integers(0, 30), min_size=EXACT_ITEMS + 1, max_size=EXACT_ITEMS + 1), st.data())
def test_balance_of_more_is_near_the_best_and_says_how_near(loads: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.sampled_from([1, 2, 7, 8, 9]))
    found = balance(loads, parts)
    assert len(found) == parts
    assert all(found)
    assert sorted(i for b in found for i in b) == list(range(len(loads)))
    best = min(squares(loads, p) for p in partitions(list(range(len(loads))), parts))
    assert best <= squares(loads, found) <= (1 + balance_gap(loads, found)) * best * (1 + 1e-12)
    sums = [sum(loads[i] for i in b) for b in found]
    for b, bucket in enumerate(found):
        assert not any(0 < loads[i] < sums[b] - other for i in bucket for other in sums), "a move would improve"


def test_buckets_run_in_descending_order(tiny_state: Callable[..., Any], fake_cost: Callable[..., Any]) -> None:
    surrogate = Surrogate(fake_cost(flops_per_ns=50), tiny_state(pp=2), "pad")
    groups = tuple((t,) for t in surrogate.sorted_tasks())
    found = schedule(surrogate, groups)
    loads = [sum(surrogate.first_stage_ns(groups[h]) for h in b) for b in found.buckets]
    assert loads == sorted(loads, reverse=True)
    assert sorted(h for b in found.buckets for h in b) == list(range(len(groups)))


def test_schedule_keeps_the_least_makespan(tiny_state: Callable[..., Any], fake_cost: Callable[..., Any]) -> None:
    surrogate = Surrogate(fake_cost(flops_per_ns=50), tiny_state(pp=2), "pad")
    groups = tuple((t,) for t in surrogate.sorted_tasks())
    loads = [surrogate.first_stage_ns(g) for g in groups]
    makespans = []
    for parts in range(1, len(groups) + 1):
        buckets = sorted(balance(loads, parts), key=lambda b: (-sum(loads[h] for h in b), b))
        template = eager_template(surrogate, groups, tuple(buckets))
        assert template is not None
        makespans.append(template.makespan_ns)
    assert schedule(surrogate, groups).template.makespan_ns == min(makespans)


def test_equal_stages_take_the_textbook_time(
    tiny_state: Callable[..., Any], tiny_workload: Any, fake_cost: Any
) -> None:
    """One stage: every pair runs back to back, whatever the order."""
    state = tiny_state(tiny_workload(3, samples=(4,)), microbatches=4)
    surrogate = Surrogate(fake_cost(flops_per_ns=50), state, "pad")
    groups = tuple((t,) for t in surrogate.sorted_tasks())
    found = schedule(surrogate, groups)
    assert found.template.makespan_ns == sum(map(surrogate.steady_ns, groups))


def in_flight(template: Any, stage: int) -> int:
    """Most units between their forward and their backward on a stage."""
    most = now = 0
    for action in template.orders[stage].actions:
        now += 1 if action.op == "forward" else -1
        most = max(most, now)
    return most


def test_memory_bounds_what_is_launched(tiny_state: Callable[..., Any], tiny_workload: Any, fake_cost: Any) -> None:
    workload = tiny_workload(2, datasets=("sst2",), samples=(8,), ranks=(4,))
    roomy = Surrogate(fake_cost(), tiny_state(workload, pp=2, microbatches=8), "pad")
    groups = tuple((t,) for t in roomy.sorted_tasks())
    unit = roomy.microbatch(groups[0])
    assert unit is not None
    per_stage = ((0,), (1,))
    free = eager_template(roomy, groups, per_stage)
    assert free is not None
    for allowed in (1, 2, 3):
        room = roomy.static_bytes[0] + allowed * unit.held_bytes[0] + unit.working_bytes[0] + unit.message_bytes
        tight = Surrogate(
            fake_cost(), tiny_state(workload, pp=2, microbatches=8, memory_bytes=room + unit.held_bytes[0] - 1), "pad"
        )
        found = eager_template(tight, groups, per_stage)
        assert found is not None
        assert in_flight(found, 0) == allowed
        assert found.makespan_ns >= free.makespan_ns


def test_a_unit_must_fit_with_its_transient(tiny_state: Any, tiny_workload: Any, fake_cost: Any) -> None:
    workload = tiny_workload(1, samples=(4,))
    roomy = Surrogate(fake_cost(), tiny_state(workload, pp=2, microbatches=4), "pad")
    unit = roomy.microbatch(("t0",))
    assert unit is not None
    gradient = (unit.message_bytes, 0)
    one_unit = [roomy.static_bytes[s] + unit.held_bytes[s] + unit.working_bytes[s] + gradient[s] for s in (0, 1)]
    for memory_bytes, fits in ((max(one_unit), True), (max(one_unit) - 1, False)):
        state = tiny_state(workload, pp=2, microbatches=4, memory_bytes=memory_bytes)
        found = eager_template(Surrogate(fake_cost(), state, "pad"), (("t0",),), ((0,),))
        assert (found is not None) == fits
