"""Fusing tasks into hTasks: the contiguous DP of MuxTune Eq. 6, its exact form for the surrogate, greedy merging."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from muxtune.policies.surrogate import Objective, Partition, value_ns

Ints = NDArray[np.int64]
#: Beyond every price, and far from overflow.
NEVER = 1 << 60
#: Thresholds that are tried side by side: the table of their DPs fits in a cache.
THRESHOLDS = 512


def paper_partition(objective: Objective, order: Sequence[str]) -> Partition:
    """Eq. 6: F(m, n) = min_i F(i, n−1) + L(H_{i+1..m}) / S, F(m, 1) = L(H_{1..m}); the best F(M, N) over N.

    Latencies are scaled by S to stay integer. Ties go to fewer hTasks, then to the smallest i. Every single task must
    be admitted by the objective.
    """
    admitted = _admitted(objective, order)

    def latency_ns(i: int, j: int) -> int:
        return objective.warmup_ns(tuple(order[i:j])) + objective.steady_ns(tuple(order[i:j]))

    count = len(order)
    # rows[n][m] = (scaled F(m, n + 1), i); a missing m has no feasible packing.
    first = {m: (objective.stages * latency_ns(0, m), 0) for m in range(1, count + 1) if (0, m) in admitted}
    rows = [first]
    for n in range(1, count):
        row: dict[int, tuple[int, int]] = {}
        for m in range(n + 1, count + 1):
            choices = [
                (rows[-1][i][0] + latency_ns(i, m), i) for i in range(n, m) if i in rows[-1] and (i, m) in admitted
            ]
            if choices:
                row[m] = min(choices)
        rows.append(row)
    best = min((row[count][0], n) for n, row in enumerate(rows) if count in row)[1]
    cuts = [count]
    for row in reversed(rows[: best + 1]):
        cuts.append(row[cuts[-1]][1])
    return _groups(order, cuts)


def exact_partition(objective: Objective, order: Sequence[str]) -> Partition:
    """The contiguous partition of least W + Σ_Q 2C·max_s L^s(Q): one DP for each threshold on the warm-up W.

    The DPs of many thresholds run side by side. Ties go to the lower threshold, then to fewer hTasks, then to the smallest
    cut. Every single task must be admitted by the objective.
    """
    count = len(order)
    # A sum in nanoseconds and the number of hTasks in one integer.
    cost = np.full((count + 1, count + 1), NEVER, dtype=np.int64)
    warmup = np.full((count + 1, count + 1), NEVER, dtype=np.int64)
    for i, j in _admitted(objective, order):
        group = tuple(order[i:j])
        cost[i, j] = objective.steady_ns(group) * (count + 1) + 1
        warmup[i, j] = objective.warmup_ns(group)
    thresholds = np.unique(warmup[warmup < NEVER])
    best: tuple[int, list[int]] | None = None
    for start in range(0, len(thresholds), THRESHOLDS):
        block = thresholds[start : start + THRESHOLDS]
        if best is not None and block[0] >= best[0]:
            break
        sums, cuts = _packings(cost, warmup, block)
        values = np.where(sums[count] < NEVER, block + sums[count] // (count + 1), NEVER)
        lowest = int(values.argmin())
        if values[lowest] < NEVER and (best is None or values[lowest] < best[0]):
            found = [count]
            while found[-1]:
                found.append(int(cuts[found[-1], lowest]))
            best = int(values[lowest]), found
    assert best is not None, "single tasks are admitted"
    return _groups(order, best[1])


def _packings(cost: Ints, warmup: Ints, thresholds: Ints) -> tuple[Ints, Ints]:
    """(least cost, last cut) of packing the first m tasks, by m and threshold."""
    count = len(cost) - 1
    sums = np.full((count + 1, len(thresholds)), NEVER, dtype=np.int64)
    cuts = np.zeros_like(sums)
    sums[0] = 0
    for m in range(1, count + 1):
        allowed = warmup[:m, m, None] <= thresholds
        choices = np.where(allowed & (sums[:m] < NEVER), sums[:m] + np.where(allowed, cost[:m, m, None], 0), NEVER)
        cuts[m] = choices.argmin(axis=0)
        sums[m] = choices.min(axis=0)
    return sums, cuts


def greedy_partition(objective: Objective, tasks: Sequence[str]) -> Partition:
    """From one hTask a task, merge the pair that lowers the surrogate most until none does; ties go to the first.

    An hTask lists its tasks in the order of `tasks`.
    """
    place = {t: i for i, t in enumerate(tasks)}
    groups: list[tuple[str, ...]] = [(t,) for t in tasks]
    steady = np.array([objective.steady_ns(g) for g in groups], dtype=np.int64)
    warmup = np.array([objective.warmup_ns(g) for g in groups], dtype=np.int64)
    merged = np.full((2, len(groups), len(groups)), NEVER, dtype=np.int64)

    def price(i: int, j: int) -> None:
        group = tuple(sorted(groups[i] + groups[j], key=place.__getitem__))
        if objective.admits(group):
            merged[:, i, j] = objective.steady_ns(group), objective.warmup_ns(group)

    for i, j in combinations(range(len(groups)), 2):
        price(i, j)
    value = value_ns(objective, groups)
    while len(groups) > 1:
        values = int(steady.sum()) - steady[:, None] - steady + merged[0] + np.maximum(merged[1], _others(warmup))
        values[merged[0] >= NEVER] = NEVER
        i, j = divmod(int(values.argmin()), len(groups))
        if values[i, j] >= value:
            break
        value, steady[i], warmup[i] = int(values[i, j]), merged[0, i, j], merged[1, i, j]
        groups[i] = tuple(sorted(groups[i] + groups[j], key=place.__getitem__))
        del groups[j]
        steady, warmup = np.delete(steady, j), np.delete(warmup, j)
        merged = np.delete(np.delete(merged, j, axis=1), j, axis=2)
        merged[:, i, :], merged[:, :, i] = NEVER, NEVER
        for k in range(len(groups)):
            if k != i:
                price(min(i, k), max(i, k))
    return tuple(groups)


def _others(warmup: Ints) -> Ints:
    """The largest warm-up of the groups other than i and j, by (i, j); 0 if there is none."""
    order = [int(i) for i in np.argsort(-warmup, kind="stable")[:2]]
    ranked = [int(w) for w in np.sort(warmup)[::-1][:3]] + [0, 0, 0]
    found = np.full((len(warmup), len(warmup)), ranked[0], dtype=np.int64)
    found[order[0], :], found[:, order[0]] = ranked[1], ranked[1]
    if len(order) > 1:
        first, second = order
        found[first, second] = found[second, first] = ranked[2]
    return found


def _admitted(objective: Objective, order: Sequence[str]) -> dict[tuple[int, int], None]:
    """Index pairs (i, j) of the groups order[i:j] that may be hTasks, in lexicographic order."""
    pairs = ((i, j) for i in range(len(order)) for j in range(i + 1, len(order) + 1))
    return {(i, j): None for i, j in pairs if objective.admits(tuple(order[i:j]))}


def _groups(order: Sequence[str], cuts: Sequence[int]) -> Partition:
    """Groups between cuts that run from the end down to 0."""
    ascending = sorted(cuts)
    return tuple(tuple(order[i:j]) for i, j in pairwise(ascending))
