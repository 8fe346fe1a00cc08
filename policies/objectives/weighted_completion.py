"""weighted-completion: Σ w_k·C_k / Σ w_k, with C_k the time at which task k takes its last step (see `completion_ns`)."""

from __future__ import annotations

import math

from muxtune.policies.objectives.base import Objective, completion_ns
from muxtune.spec.estimate import Estimate
from muxtune.spec.task import Workload
from muxtune.spec.units import NS_PER_S


class WeightedCompletion(Objective):
    """Mean completion time by the tasks' weights, if the plan stays in force to the end."""

    unit = "s"
    reads_tasks = True

    def value(self, workload: Workload, found: Estimate) -> float | None:
        """Seconds on the clock of arrivals."""
        times = completion_ns(workload, found)
        # Summed exactly: the order in which tasks are listed must not show in the last digit.
        total = math.fsum(t.weight * times[t.task_id] for t in workload.tasks)
        return total / math.fsum(t.weight for t in workload.tasks) / NS_PER_S
