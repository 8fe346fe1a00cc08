"""fcfs: first come, first served; each job on the emptiest instance (MuxTune §5.4)."""

from __future__ import annotations

from muxtune.policies.cluster.base import ClusterPolicy
from muxtune.spec.fleet import FleetView, InstanceView
from muxtune.spec.noun import noun


@noun
class FcfsConfig:
    """`grow`: scale up. While no job waits, an instance doubles its devices (data parallel) where that makes it faster."""

    grow: bool = False


class Fcfs(ClusterPolicy):
    """First come, first served."""

    Config = FcfsConfig

    def grows(self, instance: InstanceView, fleet: FleetView) -> bool:
        """As configured, while no job waits."""
        return bool(self.config.grow) and not fleet.waiting()
