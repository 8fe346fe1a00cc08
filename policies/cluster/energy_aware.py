"""energy-aware: consolidates tasks on few instances, stops idle ones, and runs at a lower core clock (MuxTune §6).

Predicted at a lower clock: spec/frequency.py says what is assumed.
"""

from __future__ import annotations

from muxtune.policies.cluster.base import ClusterPolicy, pack
from muxtune.spec.fleet import FleetView, InstanceView, JobView
from muxtune.spec.noun import noun
from muxtune.spec.units import seconds_to_ns


@noun
class EnergyConfig:
    """`idle_s`: an instance without tasks for so long is stopped. `clock`: share of the device's reference clock to stay near.

    The clock is lowered only while no job waits.
    """

    idle_s: float = 300.0
    clock: float = 1.0

    def __post_init__(self) -> None:
        if self.idle_s < 0 or not 0 < self.clock <= 1:
            raise ValueError(f"idle_s={self.idle_s}, clock={self.clock}: not negative, and above 0 up to 1")


class EnergyAware(ClusterPolicy):
    """First come, first served, on the fullest instance."""

    Config = EnergyConfig

    @property
    def idle_stop_ns(self) -> int | None:
        """As configured."""
        return seconds_to_ns(self.config.idle_s)

    def place(self, job: JobView, fleet: FleetView) -> InstanceView | None:
        """The fullest instance with room; a new one only if there is none."""
        return pack(job, fleet)

    def clock_mhz(self, instance: InstanceView, fleet: FleetView) -> int:
        """The device's step nearest to the wanted share of the reference, while no job waits."""
        steps = fleet.clocks_mhz(instance)
        if self.config.clock == 1.0 or fleet.waiting() or not steps:
            return 0
        nearest = min(steps, key=lambda mhz: (abs(mhz - self.config.clock * steps[0]), mhz))
        return 0 if nearest == steps[0] else nearest
