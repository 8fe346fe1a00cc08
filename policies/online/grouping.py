"""Grouping: hTasks in their buckets, changed step by step on the surrogate W + Σ_Q 2C·max_s L^s(Q), exactly priced.

A task is inserted where the sum is least; after that single tasks and whole hTasks move, the best move first, as long as one
lowers it. Only hTasks that changed are looked at, and only so many groups are priced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from muxtune.policies.candidates import HTaskIds
from muxtune.policies.columns import Column, columns_of, total_ns
from muxtune.policies.surrogate import Surrogate, task_type
from muxtune.spec.noun import noun

#: The bucket of an hTask that has none yet.
NEW = -1


@noun
class Placed:
    """An hTask, the bucket it stands in, and whether anything about it changed."""

    tasks: HTaskIds
    bucket: int
    touched: bool = False


Placing = tuple[Placed, ...]


class Grouping:
    """Prices and changes placings; `groups` is the most groups that are priced while improving."""

    def __init__(self, surrogate: Surrogate, groups: int) -> None:
        self.surrogate = surrogate
        self.types = {t: task_type(x) for t, x in surrogate.tasks.items()}
        self.order = {t: i for i, t in enumerate(surrogate.sorted_tasks())}
        self.columns = columns_of(surrogate)
        self.groups = groups

    def value_ns(self, placing: Placing) -> int:
        """W + Σ steady."""
        return total_ns([self._known(p.tasks) for p in placing])

    def admits(self, placing: Placing) -> bool:
        """Whether every hTask still fits: other tasks' adapters take memory too."""
        return all(self.columns.column(self.columns.pattern(p.tasks)) is not None for p in placing)

    def insert(self, placing: Placing, tasks: Sequence[str]) -> Placing | None:
        """Tasks join the hTask, or become one, where the sum is least: largest first; ties to fewer, then earlier hTasks.

        None if one of them has no place.
        """
        for task in reversed(self.sorted(tasks)):
            choices = [self._joined(placing, i, (task,)) for i in range(len(placing))]
            choices.append((*placing, Placed(tasks=(task,), bucket=NEW, touched=True)))
            admitted = [c for c in choices if c is not None and self.admits(c)]
            if not admitted:
                return None
            placing = min(admitted, key=lambda c: (self.value_ns(c), len(c)))
        return placing

    def improve(self, placing: Placing, moves: int) -> tuple[Placing, int]:
        """(the placing after the best moves, how many): at most so many, each of which lowers the sum."""
        limit = len(self.columns.found) + self.groups
        value_ns = self.value_ns(placing)
        for done in range(moves):
            best: tuple[int, int] | None = None
            kept: Placing = ()
            for index, found in enumerate(self._neighbours(placing, limit)):
                rank = (self.value_ns(found), index)
                if best is None or rank < best:
                    best, kept = rank, found
            if best is None or best[0] >= value_ns:
                return placing, done
            value_ns, placing = best[0], kept
        return placing, moves

    def _neighbours(self, placing: Placing, limit: int) -> Iterator[Placing]:
        """Changes of touched hTasks: a task goes or comes (tasks of a type are alike), two hTasks merge."""
        for i, source in enumerate(placing):
            for j, target in enumerate(placing):
                if i == j or not (source.touched or target.touched):
                    continue
                for task in self._kinds(source.tasks):
                    if found := self._moved(placing, i, j, task, limit):
                        yield found
                if i < j and (merged := self._joined(placing, i, target.tasks, limit)):
                    yield merged[:j] + merged[j + 1 :]
            if source.touched and len(source.tasks) > 1:
                for task in self._kinds(source.tasks):
                    if rest := self._without(placing, i, task, limit):
                        yield (*rest, Placed(tasks=(task,), bucket=NEW, touched=True))

    def _moved(self, placing: Placing, source: int, target: int, task: str, limit: int) -> Placing | None:
        joined = self._joined(placing, target, (task,), limit)
        return None if joined is None else self._without(joined, source, task, limit)

    def _joined(self, placing: Placing, index: int, tasks: HTaskIds, limit: int | None = None) -> Placing | None:
        """Tasks join an hTask; None if it is not admitted, or not priced within the limit."""
        return self._changed(placing, index, self.sorted((*placing[index].tasks, *tasks)), limit)

    def _without(self, placing: Placing, index: int, task: str, limit: int) -> Placing | None:
        """A task leaves an hTask, which goes with its last."""
        rest = tuple(t for t in placing[index].tasks if t != task)
        if not rest:
            return placing[:index] + placing[index + 1 :]
        return self._changed(placing, index, rest, limit)

    def _changed(self, placing: Placing, index: int, tasks: HTaskIds, limit: int | None) -> Placing | None:
        pattern = self.columns.pattern(tasks)
        if limit is not None and pattern not in self.columns.found and len(self.columns.found) >= limit:
            return None
        if self.columns.column(pattern) is None:
            return None
        new = Placed(tasks=tasks, bucket=placing[index].bucket, touched=True)
        return (*placing[:index], new, *placing[index + 1 :])

    def sorted(self, tasks: Sequence[str]) -> HTaskIds:
        """In the order in which hTasks list their tasks."""
        return tuple(sorted(tasks, key=self.order.__getitem__))

    def _kinds(self, tasks: HTaskIds) -> list[str]:
        """One task of each type."""
        return list({self.types[t]: t for t in reversed(tasks)}.values())[::-1]

    def _known(self, tasks: HTaskIds) -> Column:
        found = self.columns.column(self.columns.pattern(tasks))
        assert found is not None, "an admitted group"
        return found
