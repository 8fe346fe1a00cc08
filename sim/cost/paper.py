"""MuxTune's own cost model (§3.3): compute only, backward = forward, communication left out.

(3) L^s(H) = Σ_BaseOps t_o(Σ n)/N_g + Σ_adapters max{Σ u_a·t_a(n), max t_a(n)};  (4) L(H) = 2·Σ_{s<S} L^s + 2C·max_s L^s.
A layout's shards are the operators divided by N_g. t_o, t_a and u_a are a base model's; host work is left out as well.
"""

from __future__ import annotations

from dataclasses import replace

from muxtune.sim.cost._links import require_message
from muxtune.sim.cost.base import Cost, CostModel, WrapBase
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec import ops
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.noun import noun
from muxtune.spec.ops import OVERHEADS, Op
from muxtune.spec.units import DTYPE_BYTES


@noun
class PaperConfig:
    """`base` prices single operators: a cost model's name, or a profile's folder or file."""

    base: str = "roofline"


class Paper(WrapBase):
    """Eq. 3-5 over the operators of a base model; as uncalibrated as that is."""

    Config = PaperConfig
    backward_is_forward = True

    def __init__(self, config: PaperConfig | None = None, base: CostModel | None = None) -> None:
        self.base = base or Roofline()
        self.model_id = f"paper:{self.base.model_id}"
        self.calibrated = self.base.calibrated

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        """The base's device time of the operator's forward, whatever runs beside it; messages and host work take none.

        Raises:
            ExtrapolationError: the base has no figure for the operator.
        """
        if op.dtype in ("bytes", "host"):
            return Cost(p50_ns=0)
        return replace(self.base.latency(forward_of(op), device), host_ns=0)

    def link_latency(self, op: Op, link: Link) -> Cost:
        """Nothing: communication is taken for overlapped.

        Raises:
            InputError: the operator is no message.
        """
        require_message(op)
        return Cost(p50_ns=0)


def forward_of(op: Op) -> Op:
    """The forward that an operator is the backward (or the weight gradients) of; a forward itself."""
    if op.direction == "forward":
        return op
    if op.family == "linear":
        features = (op.shape[0], op.shape[1])
        return ops.linear(op.size[0], features, bool(op.shape[2]), "forward", op.dtype, DTYPE_BYTES[op.dtype])
    if op.family in ops.ADAPTERS:
        return ops.adapter(op.family, op.size[0], op.shape, "forward", op.dtype, DTYPE_BYTES[op.dtype])
    if op.family == "attention":
        (rows, length, queries), (heads, kv, width) = op.size, op.shape
        return ops.attention(rows, length, (heads, kv, width), "forward", op.dtype, DTYPE_BYTES[op.dtype], queries)
    if op.family in OVERHEADS:
        return replace(op, direction="forward")
    return replace(op, direction="forward", flops=op.flops // 2, moved_bytes=op.moved_bytes // 2)
