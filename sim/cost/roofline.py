"""Roofline: latency = max(flops / attainable flops, bytes / attainable bandwidth), from a data sheet, unmeasured.

GEMMs count whole tiles and waves (sim/cost/_tiles.py). Beside a collective that holds h of H SMs and moves bytes at link rate
l, an operator has (H − h)/H of the flops and 1 − 2·l/b of the bandwidth b.
"""

from __future__ import annotations

import math
from typing import get_args

from muxtune.sim.cost._links import LINKED, Algorithm, link_ns, usual_link
from muxtune.sim.cost._tiles import gemms, taken_flops, utilisation
from muxtune.sim.cost.base import Cost, CostBase
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.noun import noun
from muxtune.spec.ops import OVERHEADS, Op
from muxtune.spec.units import NS_PER_S

#: Assumptions. Large GEMMs reach about this share of a data sheet's dense peak, streaming kernels of its bandwidth.
COMPUTE_FRACTION = 0.6
BANDWIDTH_FRACTION = 0.75
#: Assumption: a collective reads each byte it sends from memory and writes each byte it receives ...
COLLECTIVE_PASSES = 2
#: ... and never gets more than this share of the bandwidth from an operator beside it.
COLLECTIVE_BANDWIDTH = 0.5
#: Assumption: a data sheet says this little about one operator of unknown shape.
RELATIVE_ERROR = 0.5
#: Prices that are remembered.
KEPT = 1 << 16
#: Host work and measured remainders: a data sheet has no figure for them.
UNPRICED = frozenset({"launch", "instruction", *OVERHEADS, "send", "recv"})


@noun
class RooflineConfig:
    """`all_reduce`: a `ring`, a `tree`, or the `cheapest` of the two for its size."""

    all_reduce: Algorithm = "cheapest"

    def __post_init__(self) -> None:
        if self.all_reduce not in get_args(Algorithm):
            raise ValueError(f"all_reduce={self.all_reduce!r}: known are {list(get_args(Algorithm))}")


class Roofline(CostBase):
    """Cost model of a data sheet at stated attainable fractions; uncalibrated wherever it is shown."""

    Config = RooflineConfig
    calibrated = False

    def __init__(self, config: RooflineConfig | None = None) -> None:
        self.config = config or RooflineConfig()
        chosen = self.config.all_reduce
        self.model_id = "roofline" if chosen == "cheapest" else f"roofline:all_reduce={chosen}"
        self._known = self.memory.table(KEPT, "latency")

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        """Device time, host time to issue the operator's kernels, and energy above idle."""
        key = (op, device, share)
        found: Cost | None = self._known.get(key)
        if found is None:
            found = self._known[key] = self._price(op, device, share)
        return found

    def _price(self, op: Op, device: DeviceSpec, share: tuple[Op, ...]) -> Cost:
        if op.family in UNPRICED:
            return Cost(p50_ns=0, relative_error=RELATIVE_ERROR)
        if op.family in LINKED:
            return self.link_latency(op, usual_link(device))
        p50_ns = math.ceil(attainable_ns(op, device))
        return Cost(
            p50_ns=math.ceil(attainable_ns(op, device, share)) if share else p50_ns,
            host_ns=issue_ns(op, device),
            relative_error=RELATIVE_ERROR,
            joules=dynamic_joules(op, device, p50_ns),
            utilisation=utilisation(op, device),
        )

    def link_latency(self, op: Op, link: Link) -> Cost:
        """Time of a message: sim/cost/_links.py has the formulas.

        Raises:
            InputError: the operator is no message.
        """
        return Cost(p50_ns=link_ns(op, link, self.config.all_reduce), relative_error=RELATIVE_ERROR)


def attainable_ns(op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> float:
    """Time that an operator takes at the attainable fractions of a device's peaks; above 0 for non-zero work.

    Operators of `share` take turns with it where together they would keep more than all SMs, or more than the whole
    bandwidth, busy.
    """
    compute_s, memory_s = _seconds(op, device, share)
    beside = [x for x in (op, *share) if x.family != "collective_load"] if share else []
    busy = max(1.0, sum(utilisation(x, device) for x in beside), sum(_bandwidth_share(x, device) for x in beside))
    return max(compute_s, memory_s) * NS_PER_S * busy


def _seconds(op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> tuple[float, float]:
    """Time by flops and time by bytes, with what collectives leave of the device."""
    compute_left, memory_left = _left(device, share)
    compute_s = taken_flops(op, device) / (device.peak_flops(op.dtype) * COMPUTE_FRACTION * compute_left)
    return compute_s, op.moved_bytes / (device.bandwidth_bytes_per_s * BANDWIDTH_FRACTION * memory_left)


def _bandwidth_share(op: Op, device: DeviceSpec) -> float:
    """Share of the attainable bandwidth that an operator takes alone: 1 where it is bound by it."""
    compute_s, memory_s = _seconds(op, device)
    return memory_s / max(compute_s, memory_s) if memory_s else 0.0


def slowdown(op: Op, device: DeviceSpec, share: tuple[Op, ...]) -> float:
    """The stated default of time beside `share` / time alone, at least 1; 1 for what a data sheet has no figure for."""
    alone_ns = attainable_ns(op, device)
    return attainable_ns(op, device, share) / alone_ns if share and alone_ns else 1.0


def _left(device: DeviceSpec, share: tuple[Op, ...]) -> tuple[float, float]:
    """Shares of flops and bandwidth that collectives leave; on a CPU they run in turn with everything else."""
    loads = [x for x in share if x.family == "collective_load" and not device.is_cpu]
    held = min(device.sm_count - 1, sum(x.size[0] for x in loads)) / device.sm_count
    traffic = sum(COLLECTIVE_PASSES * x.shape[0] for x in loads) / device.bandwidth_bytes_per_s
    return 1.0 - held, 1.0 - min(COLLECTIVE_BANDWIDTH, traffic)


def issue_ns(op: Op, device: DeviceSpec) -> int:
    """Host time to launch the kernels of a compute operator: one, or one a matrix product (a LoRA has two to four)."""
    return device.launch_ns * max(1, len(gemms(op)))


def dynamic_joules(op: Op, device: DeviceSpec, p50_ns: int) -> float:
    """Energy above idle: (peak − idle watts) · time, weighted by the larger of the operator's two utilisations."""
    if p50_ns <= 0:
        return 0.0
    seconds = p50_ns / NS_PER_S
    compute = op.flops / (device.peak_flops(op.dtype) * seconds)
    memory = op.moved_bytes / (device.bandwidth_bytes_per_s * seconds)
    return min(1.0, max(compute, memory)) * (device.peak_w - device.idle_w) * seconds
