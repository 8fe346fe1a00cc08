"""Fusing tasks into hTasks: the contiguous DP of MuxTune Eq. 6, its exact form for the surrogate, greedy merging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

from muxtune.policies.surrogate import Objective, Partition, value_ns

#: Cost of the group order[i:j].
GroupCost = Callable[[int, int], int]


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

    Ties go to the lower threshold, then to fewer hTasks. Every single task must be admitted by the objective.
    """
    admitted = _admitted(objective, order)
    steady = {group: objective.steady_ns(tuple(order[slice(*group)])) for group in admitted}
    warmup = {group: objective.warmup_ns(tuple(order[slice(*group)])) for group in admitted}
    best: tuple[int, list[int]] | None = None
    for threshold in sorted(set(warmup.values())):
        if best is not None and threshold >= best[0]:
            break
        allowed = [group for group in admitted if warmup[group] <= threshold]
        found = _cheapest(len(order), allowed, steady)
        if found is not None and (best is None or threshold + found[0] < best[0]):
            best = (threshold + found[0], found[1])
    assert best is not None, "single tasks are admitted"
    return _groups(order, best[1])


def greedy_partition(objective: Objective, tasks: Sequence[str]) -> Partition:
    """From one hTask a task, merge the pair that lowers the surrogate most until none does; ties go to the first."""
    groups: list[tuple[str, ...]] = [(t,) for t in tasks]
    value = value_ns(objective, groups)
    while True:
        choices = []
        for i, j in combinations(range(len(groups)), 2):
            if objective.admits(groups[i] + groups[j]):
                choices.append((value_ns(objective, _merged(groups, i, j)), i, j))
        if not choices or min(choices)[0] >= value:
            return tuple(groups)
        value, i, j = min(choices)
        groups = _merged(groups, i, j)


def _merged(groups: list[tuple[str, ...]], i: int, j: int) -> list[tuple[str, ...]]:
    """Group j joins group i (i < j)."""
    return [g + groups[j] if k == i else g for k, g in enumerate(groups) if k != j]


def _admitted(objective: Objective, order: Sequence[str]) -> dict[tuple[int, int], None]:
    """Index pairs (i, j) of the groups order[i:j] that may be hTasks, in lexicographic order."""
    pairs = ((i, j) for i in range(len(order)) for j in range(i + 1, len(order) + 1))
    return {(i, j): None for i, j in pairs if objective.admits(tuple(order[i:j]))}


def _cheapest(
    count: int, allowed: Sequence[tuple[int, int]], cost: dict[tuple[int, int], int]
) -> tuple[int, list[int]] | None:
    """(least sum, cuts from the end) of a packing of 0..count into allowed groups; None if there is none."""
    best: dict[int, tuple[int, int, int]] = {0: (0, 0, 0)}  # m → (sum, hTasks, i)
    for i, j in sorted(allowed):
        if i in best:
            choice = (best[i][0] + cost[i, j], best[i][1] + 1, i)
            best[j] = min(best.get(j, choice), choice)
    if count not in best:
        return None
    cuts = [count]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][2])
    return best[count][0], cuts


def _groups(order: Sequence[str], cuts: Sequence[int]) -> Partition:
    """Groups between cuts that run from the end down to 0."""
    ascending = sorted(cuts)
    return tuple(tuple(order[i:j]) for i, j in pairwise(ascending))
