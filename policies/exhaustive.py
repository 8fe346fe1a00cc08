"""exhaustive: every set partition of at most MOST_TASKS tasks, on the objective W + Σ 2C·max_s L^s: the oracle of `ilp`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from muxtune.policies.arrange import arrange
from muxtune.policies.base import Policy, SystemState
from muxtune.policies.build import make_plan, require_alignment, require_feasible
from muxtune.policies.columns import Column, Columns, Pattern, columns_of, total_ns
from muxtune.policies.surrogate import Surrogate
from muxtune.spec.align import Alignment
from muxtune.spec.errors import NoAnswerError
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan, SolverRecord

#: Ten tasks have 115,975 partitions, eleven 678,570.
MOST_TASKS = 10


@noun
class ExhaustiveConfig:
    """Alignment and chunk size as for `greedy`; `orchestration` off: one bucket an hTask, plain 1F1B."""

    alignment: Alignment = "pad"
    chunk: int = 0
    orchestration: bool = True

    def __post_init__(self) -> None:
        require_alignment(self.alignment, self.chunk)


class Exhaustive(Policy):
    """The best of all partitions; ties go to fewer hTasks, then to the first in lexicographic order of patterns."""

    Config = ExhaustiveConfig

    def plan(self, state: SystemState) -> Plan:
        """One shared instance, arranged as `muxtune` does.

        Raises:
            NoAnswerError: more than MOST_TASKS tasks.
            InfeasibleError: a task alone does not fit, or (orchestration off) the units in flight do not.
            ExtrapolationError: the cost model does not answer for a task alone.
        """
        if len(state.workload.tasks) > MOST_TASKS:
            raise NoAnswerError(
                f"policy exhaustive: {len(state.workload.tasks)} tasks have too many partitions to list: "
                f"it takes at most {MOST_TASKS}; ask ilp"
            )
        surrogate = Surrogate(self.cost, state, self.config.alignment, self.config.chunk)
        surrogate.require_single_tasks()
        columns = columns_of(surrogate)
        best, listed = best_of_all(columns)
        value = total_ns(best)
        instance, gap = arrange(surrogate, columns.groups(best), orchestration=self.config.orchestration)
        solver = SolverRecord(
            name="listing",
            status="optimal",
            bound_ns=value,
            gap=0.0,
            value_ns=value,
            evaluations=listed,
            columns=len(columns.found),
            balance_gap=gap,
        )
        return require_feasible(make_plan(self, "exhaustive", state, [instance], solver))


def best_of_all(columns: Columns) -> tuple[tuple[Column, ...], int]:
    """The best partition and how many there are; partitions that differ in tasks of one type count once."""
    listed = 0
    best: tuple[int, int, tuple[Pattern, ...], tuple[Column, ...]] | None = None
    for partition in _partitions(columns, columns.counts, columns.counts):
        listed += 1
        rank = (total_ns(partition), len(partition), tuple(c.pattern for c in partition), partition)
        if best is None or rank[:3] < best[:3]:
            best = rank
    assert best is not None, "single tasks are admitted"
    return best[3], listed


def _partitions(columns: Columns, left: Pattern, last: Pattern) -> Iterator[tuple[Column, ...]]:
    """Partitions of the tasks left into admitted patterns that do not rise in lexicographic order."""
    if not any(left):
        yield ()
        return
    first = next(k for k, n in enumerate(left) if n)
    for pattern in product(*(range(n + 1) for n in left)):
        if pattern[first] and pattern <= last and (column := columns.column(pattern)) is not None:
            rest = tuple(a - b for a, b in zip(left, pattern, strict=True))
            for others in _partitions(columns, rest, pattern):
                yield column, *others
