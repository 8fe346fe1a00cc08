"""deadline-misses: tasks whose last step (see `completion_ns`) comes after their deadline."""

from __future__ import annotations

from muxtune.policies.objectives.base import Objective, completion_ns
from muxtune.spec.estimate import Estimate
from muxtune.spec.task import Workload


class DeadlineMisses(Objective):
    """Tasks that end after their deadline, if the plan stays in force to the end."""

    unit = "tasks"
    reads_tasks = True

    def value(self, workload: Workload, found: Estimate) -> float | None:
        """A count; tasks without a deadline miss none."""
        times = completion_ns(workload, found)
        late = [t for t in workload.tasks if t.deadline_ns is not None and times[t.task_id] > t.deadline_ns]
        return float(len(late))
