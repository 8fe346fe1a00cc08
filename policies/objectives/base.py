"""Objective: one figure of an Estimate and its Workload; Goal: the objective of a state, and the slowdown it allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from muxtune.spec.estimate import Estimate, TaskStep
from muxtune.spec.noun import noun
from muxtune.spec.registry import plugin_class, plugins
from muxtune.spec.task import Workload

#: Not met, or not known: behind every plan that has a figure.
WORST = math.inf


class Objective:
    """Base of every objective: a pure function of what is predicted of a plan, and of the workload that it plans.

    `unit` is that of `value`. `reads_tasks`: it looks at steps, arrival, weight or deadline of tasks. `reads_slowdowns`: it
    looks at slowdowns.
    """

    unit: str = ""
    reads_tasks: bool = False
    reads_slowdowns: bool = False

    def value(self, workload: Workload, found: Estimate) -> float | None:
        """The figure that is shown; None where the estimate does not have what it takes."""
        raise NotImplementedError

    def cost(self, workload: Workload, found: Estimate) -> float | None:
        """What is minimised: the value, unless more of it is better."""
        return self.value(workload, found)


@noun
class Goal:
    """What plans of a state are ranked by: an objective (its key), and the most that a task may be slowed, if there is a cap."""

    objective: str = "throughput"
    max_slowdown: float | None = None

    def __post_init__(self) -> None:
        if self.max_slowdown is not None and not self.max_slowdown > 0:
            raise ValueError(f"max_slowdown={self.max_slowdown}: must be above 0")

    @property
    def reads_slowdowns(self) -> bool:
        """Whether estimates need slowdowns to be ranked."""
        return self.max_slowdown is not None or require_objective(self.objective).reads_slowdowns

    def cost(self, workload: Workload, found: Estimate) -> float:
        """Cost of the objective; what is not known is worst."""
        cost = require_objective(self.objective).cost(workload, found)
        return WORST if cost is None else cost

    def rank(self, workload: Workload, found: Estimate) -> tuple[float, float, int]:
        """Least first: what the slowest task is above the cap, the objective's cost, iteration time."""
        return self.excess(found), self.cost(workload, found), found.iteration_ns

    def excess(self, found: Estimate) -> float:
        """By how much the most slowed task is above the cap; 0 where the cap is met or there is none."""
        if self.max_slowdown is None:
            return 0.0
        worst = worst_slowdown(found)
        return WORST if worst is None or worst.slowdown is None else max(0.0, worst.slowdown - self.max_slowdown)

    def refusal(self, workload: Workload, found: Estimate) -> str | None:
        """A sentence where the cap is not met, or the objective has no figure."""
        if self.cost(workload, found) == WORST:
            return f"objective {self.objective}: nothing is known of it under cost model {found.cost_model}"
        if not self.excess(found):
            return None
        worst = worst_slowdown(found)
        if worst is None or worst.slowdown is None:
            return f"the slowdown of some task is not known, and --max-slowdown {self.max_slowdown:g} caps it"
        return (
            f"task {worst.task} is slowed {worst.slowdown:.2f}x against running alone, --max-slowdown allows "
            f"{self.max_slowdown:g}: raise it, take tasks away, or give more devices"
        )


#: The default goal.
THROUGHPUT = Goal()


def worst_slowdown(found: Estimate) -> TaskStep | None:
    """The most slowed task (ties: the first); None where any slowdown is not known."""
    if not found.per_task or any(t.slowdown is None for t in found.per_task):
        return None
    return max(found.per_task, key=lambda t: t.slowdown or 0.0)


def completion_ns(workload: Workload, found: Estimate) -> dict[str, int]:
    """When each task takes its last step, on the clock of `arrival_ns`, if the plan stays in force to the end.

    It starts when the last task has arrived: start + (steps − 1)·period + end of the step in its iteration. What a task
    leaves free when it is done is not given to others, so that this is an upper bound. A task that the estimate does not time
    takes whole iterations.
    """
    start_ns = max(t.arrival_ns for t in workload.tasks)
    paces = {t.task: t for t in found.per_task}
    times: dict[str, int] = {}
    for task in workload.tasks:
        pace = paces.get(task.task_id)
        period_ns = found.iteration_ns if pace is None or pace.period_ns is None else pace.period_ns
        end_ns = period_ns if pace is None or pace.end_ns is None else pace.end_ns
        times[task.task_id] = start_ns + (task.steps - 1) * period_ns + end_ns
    return times


@cache
def objectives() -> dict[str, type[Objective]]:
    """Every objective by key: files of this folder, then entry points in `muxtune.objectives`."""
    return plugins("objectives", Path(__file__).parent, "muxtune.policies.objectives", Objective)


@cache
def require_objective(name: str) -> Objective:
    """The objective of this key, or of a file of one's own (`FILE.py:CLASS`).

    Raises:
        UnknownKeyError: there is none.
    """
    found: type[Objective] = plugin_class("objective", name, Objective, objectives)
    return found()


def values(workload: Workload, found: Estimate, more: Sequence[str] = ()) -> dict[str, float | None]:
    """The value of every objective, and of `more` that are files of one's own."""
    names = dict.fromkeys((*objectives(), *more))
    return {name: require_objective(name).value(workload, found) for name in names}
