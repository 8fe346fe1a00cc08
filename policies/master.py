"""Set partitioning by column generation: linear bound by pricing, integer solutions over the columns that can still matter.

At prices π of the types at which no column has a negative reduced cost steady(p) − π·p, a partition costs W + Σ n_k·π_k and the
reduced costs of its columns. Prices are integers, so that the bound is exact.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from muxtune.policies.columns import Column, Columns, Pattern, fits, total_ns
from muxtune.policies.floors import NEVER
from muxtune.policies.knapsack import Found, Worth, reduced_ns
from muxtune.policies.solver import Backend, Levels, best_partition, linear_partition
from muxtune.policies.vectors import cheapest, few
from muxtune.spec.noun import noun

#: Columns and nodes of an integer program that only has to find a good start.
ROUGH_COLUMNS, ROUGH_NODES = 400, 20
#: Columns of a search that is likely to end.
LEVEL_COLUMNS = 500
#: Columns of a search for negative reduced costs that their floors do not exclude.
PRICED_COLUMNS = 60
#: Branch-and-bound nodes of one integer program of most columns: a wider or narrower one may do better.
MOST_NODES = 100


@noun
class Limits:
    """When to give up a proof: branch-and-bound nodes and steps in all, columns of an integer program, pricing rounds.

    A node counts by its program's columns, as a part of the most columns: nodes of small programs are quick.
    `seconds` is a wall-clock limit; with it an answer depends on the machine's speed.
    """

    nodes: int = 250
    columns: int = 800
    rounds: int = 60
    steps: int = 60
    seconds: float | None = None


class Pricer(Protocol):
    """Search over all columns."""

    def best(self, prices: Sequence[int], warmup_ns: int, counts: Pattern) -> tuple[list[Column], int]:
        """Some columns of negative reduced cost within the limits, and what is below every such reduced cost."""
        ...

    def within(self, prices: Sequence[int], worth: Worth, most: int, *, partial: bool = False) -> Found:
        """All columns that are worth it if they are at most about `most`; otherwise none, or with `partial` some."""
        ...

    def least_warmup_ns(self) -> int:
        """Below every W."""
        ...


class Listed:
    """Some columns, listed: all there are, or those that are to be considered."""

    def __init__(self, listing: Sequence[Column]) -> None:
        self.listing = sorted(listing, key=lambda c: c.pattern)

    def best(self, prices: Sequence[int], warmup_ns: int, counts: Pattern) -> tuple[list[Column], int]:
        """The columns of lowest reduced cost, exactly."""
        fitting = (c for c in self.listing if c.warmup_ns <= warmup_ns and fits(c.pattern, counts))
        allowed = [(reduced_ns(c, prices), c.pattern, c) for c in fitting]
        lowest = sorted(x for x in allowed if x[0] < 0)[:50]
        return [c for _, _, c in lowest], lowest[0][0] if lowest else 0

    def within(self, prices: Sequence[int], worth: Worth, most: int, *, partial: bool = False) -> Found:
        """The columns that are worth it, in lexicographic order."""
        found = [c for c in self.listing if worth.admits(reduced_ns(c, prices), c.warmup_ns)]
        return Found(columns=tuple(found[:most]), complete=len(found) <= most)

    def least_warmup_ns(self) -> int:
        """The largest, over types, of the least warm-up of a column with the type."""
        kinds = range(len(self.listing[0].pattern))
        return max(min(c.warmup_ns for c in self.listing if c.pattern[k]) for k in kinds)


@noun
class Dual:
    """Prices at which no column has a negative reduced cost: Σ n_k·π_k = `bound_ns` is below every Σ steady.

    `used_ns` is the largest warm-up among the columns of the linear optimum.
    """

    prices: tuple[int, ...]
    bound_ns: int
    used_ns: int


class Master:
    """Columns found so far and the best partition known."""

    def __init__(
        self, columns: Columns, pricer: Pricer, backend: Backend, limits: Limits, start: Iterable[Sequence[Column]]
    ) -> None:
        self.columns, self.pricer, self.backend, self.limits = columns, pricer, backend, limits
        self.tasks, self.few_vectors = sum(columns.counts), few(columns.counts)
        known = list(start)
        self.best = min(known, key=lambda p: (total_ns(p), sorted(c.pattern for c in p)))
        self.value_ns = total_ns(self.best)
        self.pool: dict[Pattern, Column] = {c.pattern: c for p in known for c in p}
        self.nodes = self.work = 0
        self.started_s = 0.0 if limits.seconds is None else time.monotonic()

    @property
    def late(self) -> bool:
        """Whether the wall-clock limit, if there is one, has passed."""
        return self.limits.seconds is not None and time.monotonic() - self.started_s > self.limits.seconds

    @property
    def has_nodes(self) -> bool:
        """Whether an integer program may still be solved."""
        return self.work < self.limits.nodes * self.limits.columns

    def linear(self, warmup_ns: int, enough_ns: int) -> Dual:
        """A dual for columns of warm-up up to `warmup_ns`, at the linear optimum or once it proves `enough_ns`."""
        for _ in range(self.limits.rounds):
            prices, used = self.prices(warmup_ns, self.columns.counts)
            proposed, least = self.pricer.best(prices, warmup_ns, self.columns.counts)
            new = [c for c in proposed if c.pattern not in self.pool]
            if not new and least < 0:
                negative = Worth(warmup_ns=warmup_ns, reduced_ns=-1)
                exact = self.pricer.within(prices, negative, PRICED_COLUMNS, partial=True)
                new = [c for c in exact.columns if c.pattern not in self.pool]
                least = 0 if exact.complete and not exact.columns else least
            if not new or self._value(prices) + self.tasks * least >= enough_ns or self.late:
                break
            self.pool.update((c.pattern, c) for c in new)
        used_ns = max((c.warmup_ns for c, _ in used), default=0)
        lowered = self._lowered(prices, least, warmup_ns, min((c.steady_ns for c, _ in used), default=1))
        return Dual(prices=lowered, bound_ns=self._value(lowered), used_ns=used_ns)

    def _lowered(self, prices: tuple[int, ...], least_ns: int, warmup_ns: int, steady_ns: int) -> tuple[int, ...]:
        """Prices lowered by a common factor until no column has a negative reduced cost (Farley's bound)."""
        lowered, part = prices, -least_ns / steady_ns
        while least_ns < 0:
            lowered = tuple(math.floor(v * (1 - min(1.0, part))) for v in prices)
            _, least_ns = self.pricer.best(lowered, warmup_ns, self.columns.counts)
            part *= 2
        return lowered

    def _value(self, prices: Sequence[int]) -> int:
        return sum(n * v for n, v in zip(self.columns.counts, prices, strict=True))

    def prices(self, warmup_ns: int, counts: Pattern) -> tuple[tuple[int, ...], list[tuple[Column, float]]]:
        """(prices, columns in use) of the linear optimum over the pool, for so many tasks of each type.

        A task left out costs the best value known, so that there is always a solution.
        """
        allowed = [c for c in self.pool.values() if c.warmup_ns <= warmup_ns and fits(c.pattern, counts)]
        kinds = range(len(counts))
        alone = [tuple(int(i == k) for i in kinds) for k in kinds]
        costs = [c.steady_ns for c in allowed] + [self.value_ns] * len(alone)
        found = linear_partition(costs, [c.pattern for c in allowed] + alone, counts, self.backend)
        return found.prices, [(allowed[i], amount) for i, amount in found.used if i < len(allowed)]

    def offer(self, partition: Sequence[Column]) -> None:
        """Keep a partition if it is the best so far."""
        if total_ns(partition) < self.value_ns:
            self.best, self.value_ns = partition, total_ns(partition)

    def improve(self, dual: Dual, warmup_ns: int) -> None:
        """Look for a better partition among some columns of lowest reduced cost."""
        found: Sequence[Column] = ()
        most_ns = self.value_ns - dual.bound_ns
        reach_ns = max(1, most_ns >> 10)
        while (more := self.mattering(dual, 0, warmup_ns, reach_ns, ROUGH_COLUMNS)) is not None:
            found = more
            if reach_ns >= most_ns:
                break
            reach_ns *= 2
        pool = (c for c in self.pool.values() if c.warmup_ns <= warmup_ns)
        lowest = sorted(pool, key=lambda c: (reduced_ns(c, dual.prices), c.pattern))[:ROUGH_COLUMNS]
        columns = {c.pattern: c for c in (*found, *lowest)}
        self.solve(tuple(columns.values()), dual, 0, levels=False, most_nodes=ROUGH_NODES)

    def mattering(
        self, dual: Dual, base_ns: int, warmup_ns: int, reach_ns: int, most: int
    ) -> tuple[Column, ...] | None:
        """Every column of reduced cost up to the reach in a partition better than the best known with base ≤ W ≤ warm-up.

        None if they are more than `most`.
        """
        both_ns = self.value_ns - 1 - dual.bound_ns
        worth = Worth(warmup_ns=warmup_ns, reduced_ns=reach_ns, base_ns=base_ns, both_ns=both_ns)
        found = self.pricer.within(dual.prices, worth, most)
        return found.columns if found.complete else None

    def solve(
        self, columns: Sequence[Column], dual: Dual, base_ns: int, *, levels: bool, most_nodes: int = NEVER
    ) -> int | None:
        """Partition into these columns; returns what no better one than known costs less than (None: nothing is proven).

        With `levels` W ≥ base is decided on, otherwise it counts as base. A task left out costs what makes the whole as dear
        as the best known. Reduced costs keep the numbers small.
        """
        if not self.has_nodes:
            return None
        if self.few_vectors:
            return self._by_vectors(columns, dual, base_ns, levels)
        kinds = range(len(self.columns.counts))
        size = len(columns) + len(kinds)
        spare = max(1, self.value_ns - base_ns - dual.bound_ns)
        ordered = sorted(columns, key=lambda c: c.pattern)
        answer = best_partition(
            [reduced_ns(c, dual.prices) for c in ordered] + [spare] * len(kinds),
            [c.pattern for c in ordered] + [tuple(int(i == k) for i in kinds) for k in kinds],
            self.columns.counts,
            _levels(ordered, base_ns, len(kinds)) if levels else Levels(),
            self.backend,
            min(most_nodes, (MOST_NODES * self.limits.columns) // size + 1),
            self.limits.seconds,
        )
        self.nodes += answer.nodes
        self.work += answer.nodes * size
        least_ns = None if answer.bound is None else base_ns + dual.bound_ns + answer.bound
        if answer.counts and not any(answer.counts[len(ordered) :]):
            found = [c for c, n in zip(ordered, answer.counts, strict=False) for _ in range(n)]
            if answer.proven:
                charged = max([base_ns, *(c.warmup_ns for c in found)]) if levels else base_ns
                least_ns = charged + sum(c.steady_ns for c in found)
            self.offer(found)
        elif answer.proven:
            least_ns = self.value_ns
        return least_ns

    def _by_vectors(self, columns: Sequence[Column], dual: Dual, base_ns: int, levels: bool) -> int:
        """The same without an integer program; counts as a node of one in the limits."""
        self.work += len(columns)
        costs = [reduced_ns(c, dual.prices) for c in columns]
        answer = cheapest(columns, costs, self.columns.counts, base_ns, levels)
        if answer is None:
            return self.value_ns
        before_ns = self.value_ns
        self.offer(answer[1])
        return min(before_ns, answer[0] + dual.bound_ns)


def _levels(columns: Sequence[Column], base_ns: int, others: int) -> Levels:
    """Steps of W above a base, and the level of each column; `others` follow that have none."""
    warmups = sorted({c.warmup_ns for c in columns if c.warmup_ns > base_ns})
    level = {w: j + 1 for j, w in enumerate(warmups)}
    steps = tuple(w - before for w, before in zip(warmups, [base_ns, *warmups], strict=False))
    return Levels(steps=steps, of=(*(level.get(c.warmup_ns, 0) for c in columns), *(0 for _ in range(others))))
