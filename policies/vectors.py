"""Set partitioning of few types, exactly: the cheapest way to every count vector, columns taken by ascending warm-up.

f(v) = min_p f(v − p) + c(p) over the columns so far; each new column updates f in place, so that one pass over the columns tries
every threshold on W: min over k of max(base, W_k) + f_k(counts).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from muxtune.policies.columns import Column, Pattern
from muxtune.policies.floors import NEVER, Ints

#: Count vectors up to which this is quicker than an integer program, and columns that it takes at once.
MOST_VECTORS, MOST_COLUMNS = 1 << 17, 1500


def few(counts: Pattern) -> bool:
    """Whether all count vectors fit."""
    return prod(n + 1 for n in counts) <= MOST_VECTORS


def cheapest(
    columns: Sequence[Column], costs: Sequence[int], counts: Pattern, base_ns: int, levels: bool
) -> tuple[int, list[Column]] | None:
    """(charge + Σ cost, the columns) of the best partition; None if these columns make none.

    The charge is the largest warm-up, at least `base_ns`, or without `levels` always `base_ns`. Costs are below NEVER.
    """
    order = sorted(range(len(columns)), key=lambda i: (columns[i].warmup_ns, columns[i].pattern))
    best: tuple[int, int] | None = None
    table = _empty(counts)
    for k, i in enumerate(order):
        _add(table, columns[i].pattern, costs[i], counts)
        whole = int(table[counts])
        charge_ns = max(base_ns, columns[i].warmup_ns) if levels else base_ns
        if whole < NEVER and (best is None or charge_ns + whole < best[0]):
            best = charge_ns + whole, k
    if best is None:
        return None
    used = order[: best[1] + 1]
    table = _empty(counts)
    for i in used:
        _add(table, columns[i].pattern, costs[i], counts)
    return best[0], _traced(table, [(columns[i], costs[i]) for i in used], counts)


def _empty(counts: Pattern) -> Ints:
    table = np.full([n + 1 for n in counts], NEVER, dtype=np.int64)
    table[(0,) * len(counts)] = 0
    return table


def _add(table: Ints, pattern: Pattern, cost: int, counts: Pattern) -> None:
    """Take a column into account, as often as it fits."""
    target = table[tuple(slice(n, None) for n in pattern)]
    source = table[tuple(slice(None, count + 1 - n) for n, count in zip(pattern, counts, strict=True))]
    for _ in range(min(count // n for n, count in zip(pattern, counts, strict=True) if n)):
        np.minimum(target, np.where(source < NEVER, source + cost, NEVER), out=target)


def _traced(table: Ints, columns: Sequence[tuple[Column, int]], counts: Pattern) -> list[Column]:
    """Columns whose costs add up to the table's value at `counts`."""
    left, found = counts, list[Column]()
    while any(left):
        for column, cost in columns:
            rest = tuple(a - b for a, b in zip(left, column.pattern, strict=True))
            if min(rest) >= 0 and table[rest] < NEVER and table[rest] + cost == table[left]:
                found.append(column)
                left = rest
                break
    return found
