"""Pricing of columns under `pad`: a bounded knapsack over the rows of a micro-batch for each family of patterns.

Given prices π of the types, T(r) = max Σ_k p_k·(π_k − adapters_k) over patterns of r rows, and a pattern's reduced cost
steady(p) − π·p is at least max over forms of fixed(r) − T(r) (policies/floors.py). All integers, so that nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from muxtune.policies.columns import Column, Columns, Pattern
from muxtune.policies.floors import NEVER, Floor, Floors, Ints
from muxtune.policies.surrogate import Surrogate
from muxtune.spec.noun import noun

#: Steps of a search for each column that it may return.
STEPS_PER_COLUMN = 20
#: Columns proposed for each longest length in a round of pricing.
PROPOSALS = 8


@noun
class Worth:
    """Limits on a column: its warm-up, its reduced cost, and `both_ns` on their sum, a warm-up counting at least `base_ns`."""

    warmup_ns: int
    reduced_ns: int
    base_ns: int = 0
    both_ns: int = NEVER

    def admits(self, reduced_ns: int, warmup_ns: int) -> bool:
        """Whether a column, or a floor of it, lies within."""
        within = warmup_ns <= self.warmup_ns and reduced_ns <= self.reduced_ns
        return within and max(self.base_ns, warmup_ns) + reduced_ns <= self.both_ns


@noun
class Found:
    """Columns of a search, and whether they are all there are."""

    columns: tuple[Column, ...]
    complete: bool


@noun
class Reduced:
    """A family at some prices: knapsack tables (forms, rows) of the first 0, 1, … types, and the least reduced cost by rows."""

    floor: Floor
    values: Ints
    tables: tuple[Ints, ...]
    least_ns: Ints


class Knapsack:
    """Search for columns of low reduced cost over all patterns."""

    def __init__(self, columns: Columns, surrogate: Surrogate) -> None:
        self.columns = columns
        self.floors = Floors(columns, surrogate).every()
        self.least_first_ns = [_least_first_ns(floor) for floor in self.floors]

    def least_warmup_ns(self) -> int:
        """Below every W: each type is in some column."""
        least = [NEVER] * len(self.columns.counts)
        for floor in self.floors:
            for k, rows, adapters_ns in zip(floor.types, floor.rows, floor.first_adapters_ns, strict=True):
                with_it = int(floor.first_ns[rows:].min(initial=NEVER)) + max(int(adapters_ns), floor.first_least_ns)
                least[k] = min(least[k], with_it)
        return max(least)

    def best(self, prices: Sequence[int], warmup_ns: int, counts: Pattern) -> tuple[list[Column], int]:
        """Some columns of negative reduced cost within the limits, and what is below every such reduced cost."""
        found: dict[Pattern, Column] = {}
        least = 0
        lowest: dict[int, dict[int, tuple[int, Reduced]]] = {}
        for reduced in self._reduced(prices, warmup_ns, counts):
            least = min(least, int(reduced.least_ns.min()))
            rows = lowest.setdefault(reduced.floor.length, {})
            for row in np.flatnonzero(reduced.least_ns < 0).tolist():
                if row not in rows or reduced.least_ns[row] < rows[row][0]:
                    rows[row] = (int(reduced.least_ns[row]), reduced)
        for rows in lowest.values():
            for row in sorted(rows, key=lambda r: (rows[r][0], r))[:PROPOSALS]:
                column = self.columns.column(self._traced(rows[row][1], row))
                if column is not None and column.warmup_ns <= warmup_ns and reduced_ns(column, prices) < 0:
                    found[column.pattern] = column
        return list(found.values()), least

    def within(self, prices: Sequence[int], worth: Worth, most: int, *, partial: bool = False) -> Found:
        """All columns that are worth it if they are few: at most `most` patterns look so, within a number of steps.

        Otherwise none, or with `partial` those that were seen.
        """
        looked: dict[Pattern, None] = {}
        steps = STEPS_PER_COLUMN * most
        for pattern in self._patterns(prices, worth):
            steps -= 1
            if pattern is not None:
                looked[pattern] = None
            if steps < 0 or len(looked) > most:
                break
        complete = steps >= 0 and len(looked) <= most
        columns = [c for p in looked if (complete or partial) and (c := self.columns.column(p)) is not None]
        worthy = tuple(c for c in columns if worth.admits(reduced_ns(c, prices), c.warmup_ns))
        return Found(columns=worthy, complete=complete)

    def _reduced(self, prices: Sequence[int], warmup_ns: int, counts: Pattern) -> Iterator[Reduced]:
        for floor, least_first_ns in zip(self.floors, self.least_first_ns, strict=True):
            values = np.array([prices[k] for k in floor.types], dtype=np.int64)[:, None] - floor.adapters_ns
            tables = knapsack(values, floor.rows, [counts[k] for k in floor.types], floor.most)
            least = (floor.fixed_ns - tables[-1]).max(axis=0)
            least[least_first_ns > warmup_ns] = NEVER
            yield Reduced(floor=floor, values=values, tables=tables, least_ns=least)

    def _traced(self, reduced: Reduced, row: int) -> Pattern:
        """A pattern that attains the last table's value at `row`, in the form that decides there."""
        floor = reduced.floor
        form = int((floor.fixed_ns[:, row] - reduced.tables[-1][:, row]).argmax())
        pattern = [0] * len(self.columns.counts)
        for i in range(len(floor.types) - 1, -1, -1):
            unit, value, table = floor.rows[i], int(reduced.values[i, form]), reduced.tables[i][form]
            whole = reduced.tables[i + 1][form, row]
            n = next(n for n in range(row // unit + 1) if table[row - n * unit] + n * value == whole)
            pattern[floor.types[i]] = n
            row -= n * unit
        return tuple(pattern)

    def _patterns(self, prices: Sequence[int], worth: Worth) -> Iterator[Pattern | None]:
        """Patterns whose floors are worth it, depth first from the last type; None for a step without one."""
        for reduced in self._reduced(prices, worth.warmup_ns, self.columns.counts):
            pattern = [0] * len(self.columns.counts)
            fixed_ns, types = reduced.floor.fixed_ns, len(reduced.floor.types)
            for row in np.flatnonzero(reduced.least_ns <= worth.reduced_ns).tolist():
                yield from _descend(reduced, worth, pattern, types, row, row, fixed_ns[:, row], 0)


def _descend(
    reduced: Reduced, worth: Worth, pattern: list[int], i: int, row: int, rows: int, cost_ns: Ints, first_ns: int
) -> Iterator[Pattern | None]:
    """Counts of the first i types that fill `row` of `rows`; reduced cost and warm-up adapters of the others are given."""
    floor = reduced.floor
    if i == 0:
        yield tuple(pattern)
        return
    yield None
    unit, values, table = floor.rows[i - 1], reduced.values[i - 1], reduced.tables[i - 1]
    adapters_ns, least_first_ns = int(floor.first_adapters_ns[i - 1]), int(floor.first_ns[rows])
    most = min(floor.counts[i - 1], row // unit)
    costs = cost_ns - np.arange(most + 1)[:, None] * values
    rest = table[:, row - most * unit : row + 1 : unit].T[::-1]
    for n, least_ns in enumerate((costs - rest).max(axis=1).tolist()):
        first = first_ns + n * adapters_ns
        if worth.admits(least_ns, least_first_ns + max(first, floor.first_least_ns)):
            pattern[floor.types[i - 1]] = n
            yield from _descend(reduced, worth, pattern, i - 1, row - n * unit, rows, costs[n], first)
    pattern[floor.types[i - 1]] = 0


def reduced_ns(column: Column, prices: Sequence[int]) -> int:
    """steady − π·p."""
    return column.steady_ns - sum(n * v for n, v in zip(column.pattern, prices, strict=True))


def knapsack(values: Ints, weights: Sequence[int], counts: Sequence[int], most: int) -> tuple[Ints, ...]:
    """Tables T_i[form, r]: the largest value of the first i types with exactly r rows, each type up to its count times.

    `values` is (types, forms); what cannot be reached is about −NEVER.
    """
    table = np.full((values.shape[1], most + 1), -NEVER, dtype=np.int64)
    table[:, 0] = 0
    tables = [table]
    for value, weight, count in zip(values, weights, counts, strict=True):
        best = table.copy()
        for n in range(1, min(count, most // weight) + 1):
            shifted = table[:, : most + 1 - n * weight] + n * value[:, None]
            np.maximum(best[:, n * weight :], shifted, out=best[:, n * weight :])
        table = best
        tables.append(table)
    return tuple(tables)


def _least_first_ns(floor: Floor) -> Ints:
    """Warm-up and drain at least, by rows."""
    least = -knapsack(-floor.first_adapters_ns[:, None], floor.rows, floor.counts, floor.most)[-1][0]
    first: Ints = np.minimum(floor.first_ns + np.maximum(least, floor.first_least_ns), NEVER)
    return first
