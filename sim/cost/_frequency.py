"""A cost model at another core clock: every operator's time and energy scaled as its roofline says (spec/frequency.py)."""

from __future__ import annotations

from dataclasses import replace

from muxtune.sim.cost._memory import Memory
from muxtune.sim.cost.base import Cost, CostModel
from muxtune.sim.cost.roofline import BANDWIDTH_FRACTION, COMPUTE_FRACTION
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.frequency import FrequencyStep
from muxtune.spec.ops import Op


class AtFrequency:
    """What-if: another model's figures at a frequency step. Host work, messages and measured remainders keep their times."""

    def __init__(self, cost: CostModel, step: FrequencyStep) -> None:
        self.cost, self.step, self.memory = cost, step, Memory()

    @property
    def model_id(self) -> str:
        """The other model's name with the clock; its own name at the reference clock."""
        return self.cost.model_id if self.step.ratio == 1 else f"{self.cost.model_id}@{self.step.mhz}MHz"

    @property
    def calibrated(self) -> bool:
        """Only the reference clock may have been measured."""
        return self.cost.calibrated and self.step.ratio == 1

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        """The other model's cost, its time scaled by what bounds the operator, its power by the clock."""
        found = self.cost.latency(op, device, share)
        if not op.flops:
            return replace(found, joules=found.joules * self.step.power_scale)
        compute = op.flops / (device.peak_flops(op.dtype) * COMPUTE_FRACTION)
        memory = op.moved_bytes / (device.bandwidth_bytes_per_s * BANDWIDTH_FRACTION)
        scale = self.step.time_scale(compute, memory)
        return replace(found, p50_ns=round(found.p50_ns * scale), joules=found.joules * scale * self.step.power_scale)

    def link_latency(self, op: Op, link: Link) -> Cost:
        """Links have a clock of their own."""
        return self.cost.link_latency(op, link)
