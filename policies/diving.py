"""Diving: round the linear optimum up column by column, pricing new columns for the tasks that are left."""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.policies.columns import Column, Pattern
from muxtune.policies.master import Master

#: Rounds of pricing for what is left: the last columns of a bound are not needed here.
ROUNDS = 4


def dive(master: Master, warmup_ns: int) -> None:
    """Offer `master` a partition into columns of warm-up up to a limit, if there is one this way."""
    left, chosen = master.columns.counts, list[Column]()
    while any(left):
        used = _priced(master, warmup_ns, left)
        if not used:
            return
        whole = [c for c, amount in used for _ in range(int(amount + 1e-6))]
        if not whole:
            whole = [max(used, key=lambda x: (round(x[1], 6), x[0].pattern))[0]]
        for column in whole:
            left = _without(left, column.pattern)
            chosen.append(column)
    master.offer(chosen)


def _priced(master: Master, warmup_ns: int, left: Pattern) -> list[tuple[Column, float]]:
    """Columns in use in a linear solution for the tasks left."""
    used: list[tuple[Column, float]] = []
    for _ in range(ROUNDS):
        prices, used = master.prices(warmup_ns, left)
        found, _ = master.pricer.best(prices, warmup_ns, left)
        new = [c for c in found if c.pattern not in master.pool]
        if not new:
            break
        master.pool.update((c.pattern, c) for c in new)
    return used


def _without(left: Sequence[int], pattern: Pattern) -> Pattern:
    return tuple(a - b for a, b in zip(left, pattern, strict=True))
