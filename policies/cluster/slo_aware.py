"""slo-aware: admits what can meet its deadline, earliest deadline first, placed where no neighbour then misses its own.

finish(job) = now + remaining steps × predicted iteration of its instance with the newcomer.
"""

from __future__ import annotations

from muxtune.policies.cluster.base import ClusterPolicy, rooms
from muxtune.spec.fleet import FleetView, InstanceView, JobView
from muxtune.spec.noun import noun

#: Jobs without a deadline come after all others, in order of arrival.
NEVER_NS = 2**63


@noun
class SloConfig:
    """`reject`: refuse on arrival what would miss its deadline even alone at once; else it is served all the same.

    `margin`: predicted time is multiplied by this. At most `looks` instances are asked, those with the fewest tasks.
    """

    reject: bool = True
    margin: float = 1.1
    looks: int = 4

    def __post_init__(self) -> None:
        if not self.margin > 0 or self.looks < 1:
            raise ValueError(f"margin={self.margin}, looks={self.looks}: above 0, and at least 1")


class SloAware(ClusterPolicy):
    """Earliest deadline first, with admission."""

    Config = SloConfig

    def admit(self, job: JobView, fleet: FleetView) -> str | None:
        """Refuse what cannot be in time even alone."""
        if not self.config.reject or job.deadline_ns is None:
            return None
        needed_ns = self.config.margin * fleet.alone_ns(job)
        return "would miss its deadline even alone" if fleet.now_ns + needed_ns > job.deadline_ns else None

    def key(self, job: JobView, fleet: FleetView) -> tuple[int, int]:
        """Earliest deadline first."""
        return NEVER_NS if job.deadline_ns is None else job.deadline_ns, job.arrival_ns

    def place(self, job: JobView, fleet: FleetView) -> InstanceView | None:
        """An empty or new instance, else the one on which the most jobs are in time, the job's own first; it never waits for room
        that is there, for waiting makes no deadline."""
        near = sorted(rooms(job, fleet), key=lambda i: (i.load, i.number))[: self.config.looks]
        if near and not near[0].load:
            return near[0]
        pools = fleet.launchable(job.model)
        if pools:
            return fleet.launch(job.model, pools[0])
        return max(near, key=lambda i: (*self._in_time(i, job, fleet), -i.load, -i.number), default=None)

    def _in_time(self, instance: InstanceView, job: JobView, fleet: FleetView) -> tuple[int, bool]:
        """(jobs of the instance that would not miss because of the newcomer, whether the newcomer is in time)."""
        each_ns = self.config.margin * fleet.iteration_ns(instance, job)
        missed = sum(self._misses(j, each_ns, fleet) for j in instance.jobs)
        return -missed, not self._misses(job, each_ns, fleet)

    @staticmethod
    def _misses(job: JobView, each_ns: float, fleet: FleetView) -> bool:
        return job.deadline_ns is not None and fleet.now_ns + fleet.remaining_steps(job) * each_ns > job.deadline_ns
