"""budget: tenants within their budget of GPU hours first; one that has spent it is served only from what is left over."""

from __future__ import annotations

from muxtune.policies.cluster.base import ClusterPolicy
from muxtune.spec.fleet import FleetView, JobView
from muxtune.spec.noun import noun
from muxtune.spec.units import NS_PER_S


@noun
class BudgetConfig:
    """Every tenant has `gpu_hours` times the weight of its jobs; `strict`: beyond that its jobs are refused on arrival."""

    gpu_hours: float = 1000.0
    strict: bool = False

    def __post_init__(self) -> None:
        if not self.gpu_hours > 0:
            raise ValueError(f"gpu_hours={self.gpu_hours}: must be above 0")


class Budget(ClusterPolicy):
    """Within budget: in order of arrival. Beyond it: after all others, least overspent first."""

    Config = BudgetConfig

    def admit(self, job: JobView, fleet: FleetView) -> str | None:
        """Refuse a tenant that has spent its budget, where that is strict."""
        if not self.config.strict or self._spent(job, fleet) < 1.0:
            return None
        return "its tenant has spent its budget"

    def group(self, job: JobView) -> str:
        """A line a tenant."""
        return job.tenant

    def group_key(self, group: str, head: JobView, fleet: FleetView) -> tuple[float, int]:
        """(share spent beyond the budget, arrival)."""
        spent = self._spent(head, fleet)
        return (spent if spent >= 1.0 else 0.0), head.arrival_ns

    def _spent(self, job: JobView, fleet: FleetView) -> float:
        budget_ns: float = self.config.gpu_hours * job.weight * 3600 * NS_PER_S
        return fleet.service_ns(job.tenant) / budget_ns
