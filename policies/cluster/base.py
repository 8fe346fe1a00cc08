"""ClusterPolicy: who waits in which order, where a job runs, who makes room. One file a policy; the file name is its key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from muxtune.spec.fleet import FleetView, InstanceView, JobView
from muxtune.spec.noun import noun
from muxtune.spec.registry import parse_config, plugin_class, plugins, split_reference


@noun
class NoConfig:
    """A cluster policy without options."""


class ClusterPolicy:
    """Base of every cluster policy, and the plainest one: in order of arrival, on the emptiest instance.

    A subclass says what it does otherwise. Every method is pure: it reads the job and the fleet, and keeps nothing; only
    `place` may change something, by `fleet.launch`.
    """

    Config: type[Any] = NoConfig
    preempts = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def round_ns(self) -> int:
        """Time between two rounds of preemption; 0: only when jobs come and go."""
        return 0

    @property
    def idle_stop_ns(self) -> int | None:
        """An instance without tasks for so long gives its devices back; None: only when another backbone needs them."""
        return None

    def admit(self, job: JobView, fleet: FleetView) -> str | None:
        """None, or why the job is refused on arrival."""
        return None

    def group(self, job: JobView) -> str:
        """The line in which a job waits."""
        return ""

    def key(self, job: JobView, fleet: FleetView) -> Any:
        """Place in its line, least first; fixed while the job waits."""
        return job.arrival_ns

    def group_key(self, group: str, head: JobView, fleet: FleetView) -> Any:
        """Which line is served first, least first."""
        return 0

    def place(self, job: JobView, fleet: FleetView) -> InstanceView | None:
        """Where the job runs now; None: it waits. A new instance as long as there are devices, then the emptiest one."""
        return spread(job, fleet)

    def victim(self, job: JobView, fleet: FleetView) -> JobView | None:
        """A running job of the same backbone that makes room for this one; asked only where `preempts`."""
        return None

    def grows(self, instance: InstanceView, fleet: FleetView) -> bool:
        """Whether an instance takes twice its devices now, if they are free; one that has grown and no longer grows shrinks."""
        return False

    def clock_mhz(self, instance: InstanceView, fleet: FleetView) -> int:
        """Core clock of an instance; 0: the device's reference clock."""
        return 0


def rooms(job: JobView, fleet: FleetView) -> Iterator[InstanceView]:
    """Instances that the job may join."""
    return (i for i in fleet.instances(job.model) if fleet.has_room(i, job))


def spread(job: JobView, fleet: FleetView) -> InstanceView | None:
    """An instance without tasks, else a new one, else the one with the fewest tasks; ties: the oldest."""
    best = min(rooms(job, fleet), key=lambda i: (i.load, i.number), default=None)
    if best is not None and not best.load:
        return best
    pools = fleet.launchable(job.model)
    return fleet.launch(job.model, pools[0]) if pools else best


def pack(job: JobView, fleet: FleetView) -> InstanceView | None:
    """The instance with the most tasks that has room, else a new one; ties: the oldest."""
    best = min(rooms(job, fleet), key=lambda i: (-i.load, i.number), default=None)
    if best is not None:
        return best
    pools = fleet.launchable(job.model)
    return fleet.launch(job.model, pools[0]) if pools else None


def others(job: JobView, fleet: FleetView) -> Iterable[JobView]:
    """Tasks of the job's backbone that run (or join next) and are not about to leave."""
    return (j for i in fleet.instances(job.model) for j in i.jobs)


def cluster_policies() -> dict[str, type[ClusterPolicy]]:
    """Every cluster policy by key: files of this folder, then entry points in `muxtune.cluster-policies`."""
    return plugins("cluster-policies", Path(__file__).parent, "muxtune.policies.cluster", ClusterPolicy)


def make_cluster_policy(reference: str) -> ClusterPolicy:
    """Build a cluster policy from `NAME`, `NAME:key=value,…` or `FILE.py:CLASS`.

    Raises:
        UnknownKeyError: no such policy or option.
    """
    name, options = split_reference(reference)
    found: type[ClusterPolicy] = plugin_class("cluster policy", name, ClusterPolicy, cluster_policies)
    return found(parse_config("cluster policy", name, found.Config, options))
