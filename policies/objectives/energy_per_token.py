"""energy-per-token: joules of an iteration (idle and dynamic, on the ranks that the plan uses) over its billed tokens."""

from __future__ import annotations

from muxtune.policies.objectives.base import Objective
from muxtune.spec.estimate import Estimate
from muxtune.spec.task import Workload


class EnergyPerToken(Objective):
    """Joules per billed token."""

    unit = "J/token"

    def value(self, workload: Workload, found: Estimate) -> float | None:
        """Joules per billed token; None where the cost model has no energy figures."""
        return found.joules_per_billed_token
