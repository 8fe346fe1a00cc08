"""multiplexing-aware: a job goes where it adds most: Δ = predicted tokens/s of the instance with it − without it."""

from __future__ import annotations

from muxtune.policies.cluster.base import ClusterPolicy, rooms
from muxtune.spec.fleet import FleetView, InstanceView, JobView
from muxtune.spec.noun import noun


@noun
class GainConfig:
    """At most `looks` instances are asked, those with the fewest tasks: each is a plan where its mix is new.

    `least_gain`: a job waits if it adds less than that share of its own rate alone.
    """

    looks: int = 4
    least_gain: float = 0.0

    def __post_init__(self) -> None:
        if self.looks < 1 or self.least_gain < 0:
            raise ValueError(f"looks={self.looks}, least_gain={self.least_gain}: at least 1, and not negative")


class MultiplexingAware(ClusterPolicy):
    """First come, first served; each where the planner expects it to add most billed tokens per second."""

    Config = GainConfig

    def place(self, job: JobView, fleet: FleetView) -> InstanceView | None:
        """The instance of greatest gain; a new one gains the job's rate alone."""
        near = sorted(rooms(job, fleet), key=lambda i: (i.load, i.number))[: self.config.looks]
        if near and not near[0].load:
            return near[0]
        gains = [(fleet.rate(i, job) - fleet.rate(i), i) for i in near]
        best_gain, best = max(gains, key=lambda x: (x[0], -x[1].number), default=(0.0, None))
        fresh = [(fleet.new_rate(job.model, pool, job), -pool) for pool in fleet.launchable(job.model)]
        new_gain, place = max(fresh, default=(0.0, 0))
        if fresh and new_gain >= best_gain:
            return fleet.launch(job.model, -place)
        alone = job.tokens * job.steps / (fleet.alone_ns(job) / 1e9)
        return best if best is not None and best_gain >= self.config.least_gain * alone else None
