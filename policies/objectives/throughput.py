"""throughput: billed tokens per second; every plan bills the same tokens a step, so the least iteration time is best."""

from __future__ import annotations

from muxtune.policies.objectives.base import Objective
from muxtune.spec.estimate import Estimate
from muxtune.spec.task import Workload


class Throughput(Objective):
    """Billed tokens per second (the default)."""

    unit = "tokens/s"

    def value(self, workload: Workload, found: Estimate) -> float | None:
        """Billed tokens per second."""
        return found.rate_per_s(found.billed_tokens)

    def cost(self, workload: Workload, found: Estimate) -> float | None:
        """Iteration time in ns."""
        return found.iteration_ns
