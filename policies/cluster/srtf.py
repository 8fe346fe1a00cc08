"""srtf: shortest remaining time first, with preemption: key = remaining steps × solo step time."""

from __future__ import annotations

from muxtune.policies.cluster.base import ClusterPolicy, others
from muxtune.spec.fleet import FleetView, JobView
from muxtune.spec.noun import noun


@noun
class SrtfConfig:
    """`preempt`: a shorter job makes the longest running one wait. `slack`: only if that is so many times longer."""

    preempt: bool = True
    slack: float = 1.0

    def __post_init__(self) -> None:
        if self.slack < 1.0:
            raise ValueError(f"slack={self.slack}: must be at least 1, or two jobs preempt each other for ever")


class Srtf(ClusterPolicy):
    """Shortest remaining time first, time being that alone."""

    Config = SrtfConfig

    @property
    def preempts(self) -> bool:  # type: ignore[override]
        """As configured."""
        return bool(self.config.preempt)

    def key(self, job: JobView, fleet: FleetView) -> float:
        """Time that is left, alone."""
        return _left_ns(job, fleet)

    def victim(self, job: JobView, fleet: FleetView) -> JobView | None:
        """The running job with the most left, if that is more than this one's."""
        longest = max(others(job, fleet), key=lambda j: (_left_ns(j, fleet), j.index), default=None)
        if longest is None or _left_ns(longest, fleet) <= self.config.slack * _left_ns(job, fleet):
            return None
        return longest


def _left_ns(job: JobView, fleet: FleetView) -> float:
    return fleet.alone_ns(job) / job.steps * fleet.remaining_steps(job)
