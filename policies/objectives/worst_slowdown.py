"""worst-slowdown: the largest of all tasks' slowdowns, i.e. time from step to step against running alone."""

from __future__ import annotations

from muxtune.policies.objectives.base import Objective, worst_slowdown
from muxtune.spec.estimate import Estimate
from muxtune.spec.task import Workload


class WorstSlowdown(Objective):
    """Time from step to step of the most slowed task, against running alone."""

    unit = "x"
    reads_slowdowns = True

    def value(self, workload: Workload, found: Estimate) -> float | None:
        """A factor; None where a task cannot run alone or nobody asked how it would."""
        worst = worst_slowdown(found)
        return None if worst is None else worst.slowdown
