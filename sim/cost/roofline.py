"""Roofline: latency = max(flops / attainable flops, bytes / attainable bandwidth), from a data sheet, unmeasured."""

from __future__ import annotations

import math
from functools import cache

from muxtune.sim.cost.base import Cost, CostBase
from muxtune.spec.cluster import LINKS, DeviceSpec, Link, device_presets, parse_cluster
from muxtune.spec.errors import InputError
from muxtune.spec.ops import COLLECTIVES, OVERHEADS, Op
from muxtune.spec.units import NS_PER_S

#: Assumptions. Large GEMMs reach about this share of a data sheet's dense peak, streaming kernels of its bandwidth.
COMPUTE_FRACTION = 0.6
BANDWIDTH_FRACTION = 0.75
#: Assumption: a data sheet says this little about one operator of unknown shape.
RELATIVE_ERROR = 0.5
#: Kernels of one operator where it is not one: a LoRA is two GEMMs, each with up to two more in its backward.
KERNELS = {("lora", "forward"): 2, ("lora", "weights"): 3, ("lora", "backward"): 4}
#: Host work and measured remainders: a data sheet has no figure for them.
UNPRICED = frozenset({"launch", "instruction", *OVERHEADS, "send", "recv"})
#: Families that need a link.
LINKED = frozenset({"p2p", *COLLECTIVES})


class Roofline(CostBase):
    """Cost model of a data sheet at stated attainable fractions; uncalibrated wherever it is shown.

    Operators that run beside each other (`share`) are priced as if alone.
    """

    model_id = "roofline"
    calibrated = False

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        """Device time, host time to issue the operator's kernels, and energy above idle."""
        if op.family in UNPRICED:
            return Cost(p50_ns=0, relative_error=RELATIVE_ERROR)
        if op.family in LINKED:
            return self.link_latency(op, usual_link(device))
        p50_ns = math.ceil(attainable_ns(op, device))
        return Cost(
            p50_ns=p50_ns,
            host_ns=issue_ns(op, device),
            relative_error=RELATIVE_ERROR,
            joules=dynamic_joules(op, device, p50_ns),
        )

    def link_latency(self, op: Op, link: Link) -> Cost:
        """p2p: latency + bytes / bandwidth. Collectives: a ring of messages of bytes / n one after the other."""
        return Cost(p50_ns=link_ns(op, link), relative_error=RELATIVE_ERROR)


def attainable_ns(op: Op, device: DeviceSpec) -> float:
    """Time that an operator takes at the attainable fractions of a device's peaks; above 0 for non-zero work."""
    compute_s = op.flops / (device.peak_flops(op.dtype) * COMPUTE_FRACTION)
    memory_s = op.moved_bytes / (device.bandwidth_bytes_per_s * BANDWIDTH_FRACTION)
    return max(compute_s, memory_s) * NS_PER_S


def issue_ns(op: Op, device: DeviceSpec) -> int:
    """Host time to launch the kernels of a compute operator."""
    return device.launch_ns * KERNELS.get((op.family, op.direction), 1)


def dynamic_joules(op: Op, device: DeviceSpec, p50_ns: int) -> float:
    """Energy above idle: (peak − idle watts) · time, weighted by the larger of the operator's two utilisations."""
    if p50_ns <= 0:
        return 0.0
    seconds = p50_ns / NS_PER_S
    compute = op.flops / (device.peak_flops(op.dtype) * seconds)
    memory = op.moved_bytes / (device.bandwidth_bytes_per_s * seconds)
    return min(1.0, max(compute, memory)) * (device.peak_w - device.idle_w) * seconds


def link_ns(op: Op, link: Link) -> int:
    """Time of a message over a link, at least 1 ns.

    Raises:
        InputError: the operator is no message.
    """
    if op.family not in LINKED:
        raise InputError(f"operator {op.family!r} does not travel over a link: only {sorted(LINKED)} do")
    transfer_ns = op.size[0] * NS_PER_S / link.bandwidth_bytes_per_s
    if op.family == "p2p":
        return max(1, link.latency_ns + math.ceil(transfer_ns))
    ranks = op.shape[0]
    # Round the ring: a reduce-scatter and an all-gather are n−1 messages of bytes / n, an all-reduce is both.
    messages = (2 if op.family == "all_reduce" else 1) * (ranks - 1)
    return max(1, messages * link.latency_ns + math.ceil(transfer_ns * messages / ranks))


@cache
def usual_link(device: DeviceSpec) -> Link:
    """The link inside a node of this device, for callers that name none; PCIe for a device that is no preset."""
    return parse_cluster(device.name).nodes[0].link if device.name in device_presets() else LINKS["pcie"]
