"""max-min-fairness: the tenant with the least share first, share = running tasks / weight, then GPU time had / weight."""

from __future__ import annotations

from collections import Counter

from muxtune.policies.cluster.base import ClusterPolicy, others
from muxtune.spec.fleet import FleetView, JobView
from muxtune.spec.noun import noun
from muxtune.spec.units import seconds_to_ns


@noun
class FairConfig:
    """Every `round_s` seconds a tenant with too little takes a place from the one with most; 0: places are never taken."""

    round_s: float = 360.0

    def __post_init__(self) -> None:
        if not self.round_s >= 0:
            raise ValueError(f"round_s={self.round_s}: must be 0 or above")


class MaxMinFairness(ClusterPolicy):
    """Places go one by one to the tenant that has least (progressive filling); a job's weight is its tenant's."""

    Config = FairConfig

    @property
    def preempts(self) -> bool:  # type: ignore[override]
        """Whether places are taken in rounds."""
        return bool(self.config.round_s > 0)

    @property
    def round_ns(self) -> int:
        """As configured."""
        return seconds_to_ns(self.config.round_s)

    def group(self, job: JobView) -> str:
        """A line a tenant."""
        return job.tenant

    def group_key(self, group: str, head: JobView, fleet: FleetView) -> tuple[float, float]:
        """(running tasks, GPU time had), each over the weight."""
        return fleet.running(group) / head.weight, fleet.service_ns(group) / head.weight

    def victim(self, job: JobView, fleet: FleetView) -> JobView | None:
        """The last job to arrive of the tenant with most, if taking it leaves that tenant no less than this one then has."""
        running = list(others(job, fleet))
        counts = Counter(j.tenant for j in running)
        mine = (fleet.running(job.tenant) + 1) / job.weight
        rich = [j for j in running if (counts[j.tenant] - 1) / j.weight >= mine]
        return max(rich, key=lambda j: (counts[j.tenant] / j.weight, j.arrival_ns, j.index), default=None)
