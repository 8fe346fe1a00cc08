"""priority: the job of greatest weight first; it may make the one of least weight wait (Gavel names such a policy)."""

from __future__ import annotations

from muxtune.policies.cluster.base import ClusterPolicy, others
from muxtune.spec.fleet import FleetView, JobView
from muxtune.spec.noun import noun


@noun
class PriorityConfig:
    """`preempt`: a heavier job makes the lightest running one wait; of equals, the last to arrive."""

    preempt: bool = True


class Priority(ClusterPolicy):
    """By weight, then by arrival."""

    Config = PriorityConfig

    @property
    def preempts(self) -> bool:  # type: ignore[override]
        """As configured."""
        return bool(self.config.preempt)

    def key(self, job: JobView, fleet: FleetView) -> tuple[float, int]:
        """Heaviest first."""
        return -job.weight, job.arrival_ns

    def victim(self, job: JobView, fleet: FleetView) -> JobView | None:
        """The lightest running job, if it is lighter than this one."""
        lightest = min(others(job, fleet), key=lambda j: (j.weight, -j.arrival_ns, -j.index), default=None)
        return lightest if lightest is not None and lightest.weight < job.weight else None
