"""ilp: equal to listing every partition, never below its bound, `optimal` only where it is, blind to names and order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.policies.base import SystemState, make_policy
from muxtune.policies.columns import Column, Columns, Pattern, columns_of, total_ns
from muxtune.policies.exhaustive import best_of_all
from muxtune.policies.fusion import greedy_partition
from muxtune.policies.ilp import solve, starting_partitions
from muxtune.policies.knapsack import Knapsack, Worth, knapsack, reduced_ns
from muxtune.policies.master import Limits, Listed, Master
from muxtune.policies.solver import Levels, best_partition, linear_partition, usual_backend
from muxtune.policies.surrogate import Surrogate, value_ns
from muxtune.policies.thresholds import close
from muxtune.policies.vectors import cheapest
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.errors import InfeasibleError, InputError, NoAnswerError
from muxtune.spec.plan import Plan
from muxtune.spec.task import Workload

TARGETS = (("qkv", "proj", "fc1", "fc2"), ("proj", "fc2"))
ANY = Limits()
LAZY = Limits(nodes=1, columns=1, rounds=1, steps=1)


@st.composite
def states(draw: st.DrawFn, tiny_state: Any, tiny_workload: Any, most: int) -> SystemState:
    """Up to `most` tasks of a few types, on one to four stages, equal or not, with or without room to fuse all."""
    workload = tiny_workload(
        draw(st.integers(1, most)),
        model="tiny-llama",
        samples=draw(st.sampled_from([(2,), (1, 2, 5), (8, 3)])),
        ranks=draw(st.sampled_from([(4,), (4, 8, 12), (4, 64)])),
        targets=draw(st.sampled_from([TARGETS[:1], TARGETS])),
    )
    state: SystemState = tiny_state(
        workload,
        tp=draw(st.sampled_from([1, 1, 2])),
        pp=draw(st.sampled_from([1, 2, 4])),
        microbatches=draw(st.integers(1, 4)),
        cluster=draw(st.sampled_from(["8xcpu", "8xA40"])),
    )
    if state.layout.pp == 2 and draw(st.booleans()):
        state = replace(state, layout=replace(state.layout, layers_per_stage=(1, 3)))
    if draw(st.booleans()):
        surrogate = Surrogate(Roofline(), state, "pad")
        order = surrogate.sorted_tasks()
        needed = [surrogate.peak_bytes((t,), s) for t in order for s in range(surrogate.stages)]
        room = max(needed) + draw(st.sampled_from([0, 2**18, 2**20]))
        device = replace(state.cluster.device, memory_bytes=room)
        state = replace(state, cluster=replace(state.cluster, device=device))
    return replace(state, evaluate=None)


def forced(columns: Columns, surrogate: Surrogate, limits: Limits = ANY, pricing: bool = True) -> tuple[Master, int]:
    """The search with pricing or with a listing, from single tasks."""
    pricer = Knapsack(columns, surrogate) if pricing else Listed(columns.every())
    alone = columns.of([(t,) for t in columns.type_of])
    master = Master(columns, pricer, usual_backend(), limits, [alone])
    return master, close(master)


@given(data=st.data(), alignment=st.sampled_from(["pad", "varlen"]))
def test_equals_listing_every_partition(
    data: st.DataObject, alignment: Any, tiny_state: Any, tiny_workload: Any
) -> None:
    surrogate = Surrogate(Roofline(), data.draw(states(tiny_state, tiny_workload, 9)), alignment)
    columns = columns_of(surrogate)
    best, _ = best_of_all(columns)
    master, bound_ns = solve(columns, surrogate, starting_partitions(columns), usual_backend(), ANY)
    assert master.value_ns == bound_ns == total_ns(best)
    assert value_ns(surrogate, columns.groups(master.best)) == master.value_ns


@given(data=st.data())
def test_pricing_equals_listing(data: st.DataObject, tiny_state: Any, tiny_workload: Any) -> None:
    surrogate = Surrogate(Roofline(), data.draw(states(tiny_state, tiny_workload, 7)), "pad")
    columns = columns_of(surrogate)
    best, _ = best_of_all(columns)
    master, bound_ns = forced(columns, surrogate)
    assert master.value_ns == bound_ns == total_ns(best)


@given(data=st.data(), pricing=st.booleans(), limits=st.sampled_from([LAZY, Limits(nodes=1), Limits(steps=1)]))
def test_a_limited_solve_claims_no_more_than_it_proved(
    data: st.DataObject, pricing: bool, limits: Limits, tiny_state: Any, tiny_workload: Any
) -> None:
    surrogate = Surrogate(Roofline(), data.draw(states(tiny_state, tiny_workload, 7)), "pad")
    columns = columns_of(surrogate)
    best, _ = best_of_all(columns)
    master, bound_ns = forced(columns, surrogate, limits, pricing)
    assert bound_ns <= total_ns(best) <= master.value_ns


@given(data=st.data())
def test_floors_lie_below_every_column(data: st.DataObject, tiny_state: Any, tiny_workload: Any) -> None:
    surrogate = Surrogate(Roofline(), data.draw(states(tiny_state, tiny_workload, 6)), "pad")
    columns = columns_of(surrogate)
    floors = Knapsack(columns, surrogate).floors
    for column in columns.every():
        types = [k for k, n in enumerate(column.pattern) if n]
        longest = max(surrogate.tasks[columns.types[k][0]].billed_len_tokens for k in types)
        mine = next(f for f in floors if f.length == longest and set(types) <= set(f.types))
        assert mine.steady_ns(column.pattern) <= column.steady_ns
        assert mine.warmup_ns(column.pattern) <= column.warmup_ns


@given(data=st.data())
def test_pricing_finds_what_a_listing_finds(data: st.DataObject, tiny_state: Any, tiny_workload: Any) -> None:
    surrogate = Surrogate(Roofline(), data.draw(states(tiny_state, tiny_workload, 6)), "pad")
    columns = columns_of(surrogate)
    pricer, listing = Knapsack(columns, surrogate), Listed(columns.every())
    alone = {c.pattern: c.steady_ns for c in listing.listing if sum(c.pattern) == 1}
    prices = [alone[tuple(int(i == k) for i in range(len(columns.counts)))] for k in range(len(columns.counts))]
    prices = [data.draw(st.integers(0, 2 * v)) for v in prices]
    warmup_ns = data.draw(st.sampled_from([c.warmup_ns for c in listing.listing]))
    both_ns = data.draw(st.integers(0, 2 * max(c.steady_ns for c in listing.listing)))
    worth = Worth(warmup_ns=warmup_ns, reduced_ns=both_ns // 2, base_ns=warmup_ns // 2, both_ns=both_ns)
    found = pricer.within(prices, worth, 10_000)
    assert found.complete
    assert sorted(c.pattern for c in found.columns) == [
        c.pattern for c in listing.within(prices, worth, 10_000).columns
    ]
    proposed, least = pricer.best(prices, warmup_ns, columns.counts)
    assert all(reduced_ns(c, prices) < 0 and c.warmup_ns <= warmup_ns for c in proposed)
    assert least <= listing.best(prices, warmup_ns, columns.counts)[1]
    assert pricer.least_warmup_ns() <= listing.least_warmup_ns()


@given(st.data())
def test_knapsack_tables_by_brute_force(data: st.DataObject) -> None:
    items = data.draw(
        st.lists(st.tuples(st.integers(-9, 20), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4)
    )
    most = data.draw(st.integers(0, 12))
    best: dict[int, int] = {}
    for counts in product(*(range(n + 1) for _, _, n in items)):
        rows = sum(c * w for c, (_, w, _) in zip(counts, items, strict=True))
        worth = sum(c * v for c, (v, _, _) in zip(counts, items, strict=True))
        best[rows] = max(best.get(rows, worth), worth)
    tables = knapsack(np.array([[v] for v, _, _ in items]), [w for _, w, _ in items], [n for _, _, n in items], most)
    for rows in range(most + 1):
        assert tables[-1][0, rows] == best[rows] if rows in best else tables[-1][0, rows] < -(1 << 50)


def by_count_vectors(columns: Columns) -> int:
    """The optimum of few types: for each threshold on W the cheapest way to each count vector."""
    every = columns.every()
    best = []
    for warmup_ns in sorted({c.warmup_ns for c in every}):
        allowed = [c for c in every if c.warmup_ns <= warmup_ns]
        least: dict[Pattern, int] = {tuple(0 for _ in columns.counts): 0}
        for left in product(*(range(n + 1) for n in columns.counts)):
            ways = [
                least[rest] + c.steady_ns
                for c in allowed
                if (rest := tuple(a - b for a, b in zip(left, c.pattern, strict=True))) in least
            ]
            if ways:
                least[left] = min(ways)
        if columns.counts in least:
            best.append(warmup_ns + least[columns.counts])
    return min(best)


@pytest.mark.parametrize("cluster", ["4xcpu", "4xA40"])
@pytest.mark.parametrize("tasks", [9, 13])
def test_equals_the_count_vector_dp(cluster: str, tasks: int, tiny_state: Any, tiny_workload: Any) -> None:
    state = tiny_state(tiny_workload(tasks), pp=2, microbatches=4, cluster=cluster)
    surrogate = Surrogate(Roofline(), state, "pad")
    columns = columns_of(surrogate)
    assert len(columns.counts) == 3
    for pricing in (True, False):
        master, bound_ns = forced(columns, surrogate, pricing=pricing)
        assert master.value_ns == bound_ns == by_count_vectors(columns)


def record(reference: str, state: SystemState) -> Any:
    """The solver record of a policy's plan; its optional figures are held against each other."""
    found = make_policy(reference, Roofline()).plan(state).made_by.solver
    assert found is not None
    return found


def contiguous(order: Sequence[str]) -> Iterator[tuple[tuple[str, ...], ...]]:
    for mask in range(2 ** (len(order) - 1)):
        cuts = [0, *(i + 1 for i in range(len(order) - 1) if mask >> i & 1), len(order)]
        yield tuple(tuple(order[i:j]) for i, j in pairwise(cuts))


@settings(max_examples=30)
@given(data=st.data())
def test_it_is_below_the_dp_and_every_contiguous_partition(
    data: st.DataObject, tiny_state: Any, tiny_workload: Any
) -> None:
    state = data.draw(states(tiny_state, tiny_workload, 8))
    surrogate = Surrogate(Roofline(), state, "pad")
    mine, dp = record("ilp", state), record("muxtune:charge=exact", state)
    allowed = [p for p in contiguous(surrogate.sorted_tasks()) if all(map(surrogate.admits, p))]
    assert mine.value_ns <= mine.dp_value_ns == dp.value_ns == min(value_ns(surrogate, p) for p in allowed)
    greedy = value_ns(surrogate, greedy_partition(surrogate, surrogate.sorted_tasks()))
    values = [greedy, *(record(p, state).value_ns for p in ("muxtune", "muxtune:fusion=false", "exhaustive"))]
    assert mine.bound_ns <= mine.value_ns <= min(values)
    assert mine.greedy_value_ns == greedy


def partition(plan: Plan) -> list[list[tuple[object, ...]]]:
    """hTasks as lists of task types: names left out."""
    (instance,) = plan.instances
    tasks = [[plan.workload.task(t) for t in h.tasks] for h in instance.htasks]
    return [[(t.billed_len_tokens, t.global_batch_samples, t.dataset, repr(t.peft)) for t in h] for h in tasks]


@settings(max_examples=20)
@given(order=st.permutations(range(8)), names=st.permutations(range(8)))
def test_neither_order_nor_names_of_equal_tasks_matter(
    order: list[int], names: list[int], tiny_state: Any, tiny_workload: Any
) -> None:
    state = replace(tiny_state(tiny_workload(8), pp=2, cluster="4xA40"), evaluate=None)
    tasks = state.workload.tasks
    plan = make_policy("ilp", Roofline()).plan(state)

    def of(workload: Workload) -> Plan:
        return make_policy("ilp", Roofline()).plan(replace(state, workload=workload))

    moved = of(replace(state.workload, tasks=tuple(tasks[i] for i in order)))
    assert moved.instances == plan.instances
    renamed = of(replace(state.workload, tasks=tuple(replace(t, task_id=f"n{names[i]}") for i, t in enumerate(tasks))))
    assert partition(renamed) == partition(plan)


def test_a_plan_carries_what_was_reached_and_simulated(tiny_state: Any, tiny_workload: Any) -> None:
    state = tiny_state(tiny_workload(7), pp=2, cluster="4xA40")
    found = record("ilp", state)
    assert found.name == "set-partitioning/highs"
    assert (found.status, found.gap, found.deterministic) == ("optimal", 0.0, True)
    assert found.bound_ns == found.value_ns <= min(found.dp_value_ns, found.greedy_value_ns)
    assert found.columns > 0
    assert found.simulated_ns == state.evaluate(make_policy("ilp", Roofline()).plan(state)).iteration_ns
    assert found.inversions in range(4)
    assert record("ilp", replace(state, evaluate=None)).simulated_ns is None


def test_the_clock_is_asked_on_demand_only(tiny_state: Any) -> None:
    assert not record("ilp:seconds=60", tiny_state(pp=2)).deterministic


def test_beyond_listing_without_pricing_nothing_is_claimed(tiny_state: Any, tiny_workload: Any) -> None:
    workload = tiny_workload(14, ranks=tuple(range(4, 18)))
    state = replace(tiny_state(workload, pp=2, microbatches=4, cluster="4xA40"), evaluate=None)
    found = record("ilp:alignment=varlen", state)
    assert (found.status, found.bound_ns, found.gap) == ("feasible", None, None)
    assert found.value_ns <= min(found.dp_value_ns, found.greedy_value_ns)
    padded = record("ilp", state)
    assert padded.bound_ns is not None
    assert (padded.status == "optimal") == (padded.bound_ns == padded.value_ns)


def test_without_room_the_rank_is_named(tiny_state: Any) -> None:
    with pytest.raises(
        InfeasibleError, match=r"task t\d does not fit as an hTask of its own: rank 0 needs .* has 8\.00"
    ):
        make_policy("ilp", Roofline()).plan(tiny_state(pp=2, memory_bytes=8 * 2**20))


def test_exhaustive_refuses_too_many_tasks(tiny_state: Any, tiny_workload: Any) -> None:
    with pytest.raises(NoAnswerError, match=r"11 tasks have too many partitions to list: it takes at most 10; ask ilp"):
        make_policy("exhaustive", Roofline()).plan(tiny_state(tiny_workload(11)))


def test_exhaustive_lists_every_partition(tiny_state: Any, tiny_workload: Any) -> None:
    # Five different tasks: Bell number 52. Three equal ones: the partitions of 3.
    different = columns_of(Surrogate(Roofline(), tiny_state(tiny_workload(5, ranks=(4, 5, 6, 7, 8))), "pad"))
    equal = tiny_workload(3, datasets=("sst2",), samples=(2,), ranks=(4,))
    assert best_of_all(different)[1] == 52
    assert best_of_all(columns_of(Surrogate(Roofline(), tiny_state(equal), "pad")))[1] == 3


@pytest.mark.parametrize("option", ["solver=best", "nodes=0", "columns=0", "steps=0", "seconds=0", "chunk=64"])
def test_wrong_options(option: str) -> None:
    with pytest.raises(InputError, match=option.partition("=")[0]):
        make_policy(f"ilp:{option}", Roofline())


PATTERNS = [(1, 0), (0, 1), (1, 1), (2, 1), (0, 2)]
COSTS = [5, 5, 8, 9, 3]


@pytest.mark.parametrize("backend", ["highs", "cbc"])
@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_solvers_by_hand(backend: Any) -> None:
    # Three of the first type and four of the second: 8 + 9 + 3 = 20; in fractions 1.5 · 9 + 1.25 · 3 = 17.25.
    answer = best_partition(COSTS, PATTERNS, (3, 4), Levels(), backend, 100)
    assert (answer.proven, answer.counts) == (True, (0, 0, 1, 1, 1))
    linear = linear_partition(COSTS, PATTERNS, (3, 4), backend)
    assert [(i, round(amount, 6)) for i, amount in linear.used] == [(3, 1.5), (4, 1.25)]
    # The pair (2, 1) is on a level that costs 4: without it 3 · 5 + 2 · 3 = 21 or 8 + ... is dearer than 24.
    levels = Levels(steps=(4,), of=(0, 0, 0, 1, 0))
    assert best_partition(COSTS, PATTERNS, (3, 4), levels, backend, 100).counts == (3, 0, 0, 0, 2)


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_no_nodes_no_proof(backend: Any) -> None:
    patterns = [(i % 3, i // 3 % 3, i // 9 % 3, i // 27 % 3) for i in range(1, 81)]
    costs = [97 * sum(p) + 31 * (7 * i % 11) for i, p in enumerate(patterns)]
    counts = (7, 5, 6, 5)
    full = best_partition(costs, patterns, counts, Levels(), backend, 10_000)
    assert full.proven
    none = best_partition(costs, patterns, counts, Levels(), backend, 0)
    assert not none.proven


@given(data=st.data(), levels=st.booleans())
def test_count_vectors_equal_listing_every_partition(data: st.DataObject, levels: bool) -> None:
    counts = data.draw(st.sampled_from([(3,), (2, 2), (1, 2, 1), (4, 1)]))
    every = [p for p in product(*(range(n + 1) for n in counts)) if any(p)]
    patterns = data.draw(st.lists(st.sampled_from(every), unique=True, min_size=1))
    numbers = st.integers(0, 20)
    columns = [Column(pattern=p, steady_ns=data.draw(numbers), warmup_ns=data.draw(numbers)) for p in patterns]
    base_ns = data.draw(numbers)

    def listed(left: Pattern, start: int) -> Iterator[list[Column]]:
        if not any(left):
            yield []
        for i in range(start, len(columns)):
            rest = tuple(a - b for a, b in zip(left, columns[i].pattern, strict=True))
            if min(rest) >= 0:
                yield from ([columns[i], *more] for more in listed(rest, i))

    def value(partition: Sequence[Column]) -> int:
        charge_ns = max([base_ns, *(c.warmup_ns for c in partition)]) if levels else base_ns
        return charge_ns + sum(c.steady_ns for c in partition)

    found = cheapest(columns, [c.steady_ns for c in columns], counts, base_ns, levels)
    best = min(map(value, listed(counts, 0)), default=None)
    assert (found is None) == (best is None)
    if found is not None:
        assert found[0] == best == value(found[1])
        assert tuple(map(sum, zip(*(c.pattern for c in found[1]), strict=True))) == counts


def test_a_solver_writes_nothing_on_standard_output() -> None:
    code = (
        "from muxtune.policies.solver import linear_partition, usual_backend\n"
        "print(linear_partition([3], [(1,)], (1,), 'highs').prices, usual_backend())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n") == ["(3,) highs", ""]
    assert found.stderr == ""
