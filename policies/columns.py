"""Columns of set partitioning: candidate hTasks as patterns, i.e. how many tasks of each type they hold.

Tasks of one type (same PEFT spec, billed length, batch and data set) are interchangeable: min W + Σ_p steady(p)·x_p with
Σ_p p_k·x_p = n_k for each type k, W ≥ warm-up(p) wherever x_p > 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, product
from math import prod

from muxtune.policies.surrogate import Objective, Partition, Surrogate, task_type
from muxtune.spec.noun import noun

Pattern = tuple[int, ...]


@noun
class Column:
    """An admitted pattern with its price."""

    pattern: Pattern
    steady_ns: int
    warmup_ns: int


class Columns:
    """Prices patterns with an objective; every answer is remembered.

    `types` holds the task ids of each type. A type's first tasks stand for any others of it.
    """

    def __init__(self, objective: Objective, types: Sequence[Sequence[str]]) -> None:
        self.objective = objective
        self.types = tuple(map(tuple, types))
        self.counts: Pattern = tuple(len(t) for t in self.types)
        self.type_of = {task: k for k, members in enumerate(self.types) for task in members}
        self.found: dict[Pattern, Column | None] = {}

    @property
    def patterns(self) -> int:
        """How many patterns there are."""
        return prod(n + 1 for n in self.counts) - 1

    def every(self) -> list[Column]:
        """All admitted columns, in lexicographic order of patterns."""
        patterns = product(*(range(n + 1) for n in self.counts))
        return [c for p in patterns if any(p) and (c := self.column(p)) is not None]

    def column(self, pattern: Pattern) -> Column | None:
        """The column of a pattern; None if it is not admitted."""
        if pattern not in self.found:
            tasks = tuple(t for members, n in zip(self.types, pattern, strict=True) for t in members[:n])
            self.found[pattern] = self._price(pattern, tasks) if self.objective.admits(tasks) else None
        return self.found[pattern]

    def _price(self, pattern: Pattern, tasks: tuple[str, ...]) -> Column:
        steady_ns, warmup_ns = self.objective.steady_ns(tasks), self.objective.warmup_ns(tasks)
        return Column(pattern=pattern, steady_ns=steady_ns, warmup_ns=warmup_ns)

    def pattern(self, tasks: Iterable[str]) -> Pattern:
        """How many tasks of each type a group holds."""
        counts = [0] * len(self.types)
        for task in tasks:
            counts[self.type_of[task]] += 1
        return tuple(counts)

    def of(self, groups: Iterable[Sequence[str]]) -> tuple[Column, ...]:
        """The columns of groups that are all admitted."""
        found = [self.column(self.pattern(g)) for g in groups]
        return tuple(c for c in found if c is not None)

    def groups(self, columns: Iterable[Column]) -> Partition:
        """Tasks handed out to columns that use each type as often as it occurs: each type's tasks in their order."""
        left = [iter(members) for members in self.types]
        ordered = sorted(columns, key=lambda c: (c.warmup_ns + c.steady_ns, tuple(-n for n in c.pattern)))
        return tuple(tuple(next(left[k]) for k, n in enumerate(c.pattern) for _ in range(n)) for c in ordered)


def columns_of(surrogate: Surrogate) -> Columns:
    """Columns over the task types of a state, in the order of its sorted tasks."""
    kinds = groupby(surrogate.sorted_tasks(), key=lambda t: task_type(surrogate.tasks[t]))
    return Columns(surrogate, [tuple(members) for _, members in kinds])


def total_ns(columns: Sequence[Column]) -> int:
    """W + Σ steady of a partition."""
    return max(c.warmup_ns for c in columns) + sum(c.steady_ns for c in columns)


def fits(pattern: Pattern, counts: Pattern) -> bool:
    """Whether there are as many tasks of each type as a pattern takes."""
    return all(n <= count for n, count in zip(pattern, counts, strict=True))


class Priced:
    """The objective that `columns` prices with, each pattern once: tasks of a type are interchangeable."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    @property
    def stages(self) -> int:
        """S."""
        return self.columns.objective.stages

    def admits(self, tasks: tuple[str, ...]) -> bool:
        """Whether the group may be an hTask."""
        return self.columns.column(self.columns.pattern(tasks)) is not None

    def warmup_ns(self, tasks: tuple[str, ...]) -> int:
        """2·Σ_{s<S} L^s of an admitted group."""
        return self._column(tasks).warmup_ns

    def steady_ns(self, tasks: tuple[str, ...]) -> int:
        """2C·max_s L^s of an admitted group."""
        return self._column(tasks).steady_ns

    def _column(self, tasks: tuple[str, ...]) -> Column:
        found = self.columns.column(self.columns.pattern(tasks))
        assert found is not None, "an admitted group"
        return found
