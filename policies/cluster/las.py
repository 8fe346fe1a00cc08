"""las: least attained service first (Tiresias): queues by GPU time had so far, first come first served inside each."""

from __future__ import annotations

from muxtune.policies.cluster.base import ClusterPolicy, others
from muxtune.spec.fleet import FleetView, JobView
from muxtune.spec.noun import noun
from muxtune.spec.units import NS_PER_S, seconds_to_ns


@noun
class LasConfig:
    """A job sinks one queue each time its GPU time passes `first_s` · `factor`^k; every `round_s` higher queues may preempt."""

    first_s: float = 3600.0
    factor: float = 4.0
    round_s: float = 360.0

    def __post_init__(self) -> None:
        if not self.first_s > 0 or not self.factor > 1 or not self.round_s > 0:
            raise ValueError(
                f"first_s={self.first_s}, factor={self.factor}, round_s={self.round_s}: above 0, above 1, above 0"
            )


class Las(ClusterPolicy):
    """Least attained service first, in rounds."""

    Config = LasConfig
    preempts = True

    @property
    def round_ns(self) -> int:
        """As configured."""
        return seconds_to_ns(self.config.round_s)

    def key(self, job: JobView, fleet: FleetView) -> tuple[int, int]:
        """(queue, arrival)."""
        return self._queue(job, fleet), job.arrival_ns

    def victim(self, job: JobView, fleet: FleetView) -> JobView | None:
        """Of the jobs in the lowest queue, below this one's, the last to arrive."""
        lowest = max(others(job, fleet), key=lambda j: (self._queue(j, fleet), j.arrival_ns, j.index), default=None)
        return lowest if lowest is not None and self._queue(lowest, fleet) > self._queue(job, fleet) else None

    def _queue(self, job: JobView, fleet: FleetView) -> int:
        attained_ns, limit_ns, queue = fleet.attained_ns(job), self.config.first_s * NS_PER_S, 0
        while attained_ns >= limit_ns:
            limit_ns *= self.config.factor
            queue += 1
        return queue
