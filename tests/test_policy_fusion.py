"""Fusion: Eq. 6 by hand, the exact DP against brute force, greedy merging."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.policies.fusion import exact_partition, greedy_partition, paper_partition
from muxtune.policies.surrogate import Partition, value_ns


@dataclass(frozen=True)
class Table:
    """An objective whose groups have a listed time t on every stage: 2·L^s = 2t."""

    stages: int
    microbatches: int
    stage_ns: dict[frozenset[str], tuple[int, ...]] = field(default_factory=dict)

    def admits(self, tasks: tuple[str, ...]) -> bool:
        return frozenset(tasks) in self.stage_ns

    def warmup_ns(self, tasks: tuple[str, ...]) -> int:
        return 2 * sum(self.stage_ns[frozenset(tasks)][:-1])

    def steady_ns(self, tasks: tuple[str, ...]) -> int:
        return 2 * self.microbatches * max(self.stage_ns[frozenset(tasks)])


def all_or_single(single_ns: int, fused_ns: int) -> Table:
    """Four equal tasks on S=4, C=4 that run alone or all together."""
    stage_ns = {frozenset(t): (single_ns,) * 4 for t in "abcd"}
    return Table(stages=4, microbatches=4, stage_ns={**stage_ns, frozenset("abcd"): (fused_ns,) * 4})


def contiguous(order: str) -> Iterator[Partition]:
    """Every contiguous partition of the letters."""
    for mask in range(2 ** (len(order) - 1)):
        cuts = [0, *(i + 1 for i in range(len(order) - 1) if mask >> i & 1), len(order)]
        yield tuple(tuple(order[i:j]) for i, j in pairwise(cuts))


def random_table(order: str, stages: int, seed: int) -> Table:
    """Random stage times that grow with the group; some groups of several tasks are not admitted."""
    random = Random(seed)
    stage_ns = {}
    for i in range(len(order)):
        for j in range(i + 1, len(order) + 1):
            if j - i == 1 or random.random() < 0.8:
                stage_ns[frozenset(order[i:j])] = tuple(random.randint(1, 9) + 3 * (j - i) for _ in range(stages))
    return Table(stages=stages, microbatches=random.randint(1, 4), stage_ns=stage_ns)


TABLES = st.builds(
    lambda size, stages, seed: ("abcdefg"[:size], random_table("abcdefg"[:size], stages, seed)),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(0, 10**6),
)


def paper_value(table: Table, groups: Partition) -> int:
    """Eq. 6 scaled by S: the first hTask is charged S·L, every other one L."""
    latency = [table.warmup_ns(g) + table.steady_ns(g) for g in groups]
    return table.stages * latency[0] + sum(latency[1:])


def test_paper_breaks_even_at_1_75_t() -> None:
    # L = 6t + 8t = 14t; four hTasks cost 14t + 3·14t/4 = 24.5t = 14·(1.75t).
    assert paper_partition(all_or_single(100, 174), "abcd") == (tuple("abcd"),)
    assert paper_partition(all_or_single(100, 176), "abcd") == tuple((t,) for t in "abcd")


def test_exact_breaks_even_at_2_71_t() -> None:
    # Four hTasks cost 6t + 4·8t = 38t = 14·(2.714…t).
    assert exact_partition(all_or_single(100, 271), "abcd") == (tuple("abcd"),)
    assert exact_partition(all_or_single(100, 272), "abcd") == tuple((t,) for t in "abcd")


def test_ties() -> None:
    # Eq. 6: fewer hTasks. Exact: the lower warm-up (6·700 against 6·1900), then fewer hTasks.
    assert paper_partition(all_or_single(100, 175), "abcd") == (tuple("abcd"),)
    assert exact_partition(all_or_single(700, 1900), "abcd") == tuple((t,) for t in "abcd")
    one_stage = Table(stages=1, microbatches=1, stage_ns={frozenset(k): (len(k),) for k in ("a", "b", "ab")})
    assert exact_partition(one_stage, "ab") == (("a", "b"),)


def test_warmup_is_charged_once_and_for_the_largest() -> None:
    # S=2, C=1: value = 2·max(first stage) + 2·Σ max. {a,b},{c}: 2·5 + 2·(5+4) = 28; separate: 2·4 + 2·(3+3+4) = 28;
    # all: 2·9 + 2·9 = 36; {a},{b,c}: 2·6 + 2·(3+6) = 30. The tie goes to the lower threshold on W: separate.
    times = {"a": 3, "b": 3, "c": 4, "ab": 5, "bc": 6, "abc": 9}
    table = Table(stages=2, microbatches=1, stage_ns={frozenset(k): (v, v) for k, v in times.items()})
    assert [value_ns(table, p) for p in contiguous("abc")] == [36, 30, 28, 28]
    assert exact_partition(table, "abc") == (("a",), ("b",), ("c",))


@given(TABLES)
def test_exact_equals_brute_force(case: tuple[str, Table]) -> None:
    order, table = case
    found = exact_partition(table, order)
    allowed = [p for p in contiguous(order) if all(map(table.admits, p))]
    assert found in allowed
    assert value_ns(table, found) == min(value_ns(table, p) for p in allowed)


@given(TABLES)
def test_paper_equals_brute_force_on_its_recurrence(case: tuple[str, Table]) -> None:
    order, table = case
    found = paper_partition(table, order)
    allowed = [p for p in contiguous(order) if all(map(table.admits, p))]
    assert found in allowed
    assert paper_value(table, found) == min(paper_value(table, p) for p in allowed)


@given(TABLES)
def test_one_stage_makes_both_charges_equal(case: tuple[str, Table]) -> None:
    order, table = case
    one = Table(stages=1, microbatches=table.microbatches, stage_ns={g: (max(t),) for g, t in table.stage_ns.items()})
    assert value_ns(one, paper_partition(one, order)) == value_ns(one, exact_partition(one, order))


@given(TABLES)
def test_greedy_never_ends_above_its_start_nor_where_a_merge_helps(case: tuple[str, Table]) -> None:
    order, table = case
    found = greedy_partition(table, order)
    value = value_ns(table, found)
    assert sorted(t for g in found for t in g) == sorted(order)
    assert value <= value_ns(table, [(t,) for t in order])
    for i in range(len(found)):
        for j in range(i + 1, len(found)):
            merged = found[i] + found[j]
            if table.admits(merged):
                rest = [g for k, g in enumerate(found) if k not in (i, j)]
                assert value_ns(table, [merged, *rest]) >= value


def test_greedy_merges_across_the_order() -> None:
    stage_ns = {frozenset(t): (5,) for t in "abc"} | {frozenset("ac"): (6,), frozenset("ab"): (9,)}
    table = Table(stages=1, microbatches=1, stage_ns=stage_ns)
    assert greedy_partition(table, "abc") == (("a", "c"), ("b",))
    with pytest.raises(KeyError):
        table.steady_ns(tuple("bc"))
