"""CostModel: latency(op) → Cost. Every model says how sure it is and when it answers from outside its measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from muxtune.spec.align import Batch
from muxtune.spec.catalogue import StageContext, subgraph_ops
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.errors import UnknownKeyError
from muxtune.spec.noun import noun
from muxtune.spec.ops import Op, host
from muxtune.spec.registry import plugins


@noun
class Cost:
    """Price of one operator call: device time, host time to issue it, and how far to trust them."""

    p50_ns: int
    host_ns: int = 0
    relative_error: float = 0.0
    extrapolated: bool = False
    joules: float = 0.0


@noun
class CostSum:
    """Sum of costs. Errors of operators of one family share a cause, so they add up; families are independent."""

    p50_ns: int = 0
    host_ns: int = 0
    extrapolated_ns: int = 0
    joules: float = 0.0
    error_ns: tuple[tuple[str, float], ...] = ()

    @property
    def relative_error(self) -> float:
        """Propagated relative error of the sum (root of summed squares over families)."""
        total = self.p50_ns + self.host_ns
        return math.sqrt(sum(e * e for _, e in self.error_ns)) / total if total else 0.0


@runtime_checkable
class CostModel(Protocol):
    """What simulator and policies need of a cost model. `calibrated` is False where nothing was measured."""

    @property
    def model_id(self) -> str:
        """Name and digest, written into every result."""
        ...

    @property
    def calibrated(self) -> bool:
        """Whether the figures come from measurements on the device."""
        ...

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        """Cost of one call; `share` are operators that run beside it (none by default).

        Raises:
            ExtrapolationError: the op lies outside what was measured and extrapolation is not allowed.
        """
        ...

    def link_latency(self, op: Op, link: Link) -> Cost:
        """Cost of moving a message (p2p, all_reduce) over a link."""
        ...


def total(cost: CostModel, device: DeviceSpec, ops: Iterable[Op]) -> CostSum:
    """Sum of the latencies of operators run one after the other."""
    p50_ns = host_ns = extrapolated_ns = 0
    joules = 0.0
    errors: dict[str, float] = {}
    for op in ops:
        price = cost.latency(op, device)
        p50_ns += price.p50_ns
        host_ns += price.host_ns
        joules += price.joules
        extrapolated_ns += price.p50_ns if price.extrapolated else 0
        errors[op.family] = errors.get(op.family, 0.0) + price.relative_error * price.p50_ns
    return CostSum(
        p50_ns=p50_ns,
        host_ns=host_ns,
        extrapolated_ns=extrapolated_ns,
        joules=joules,
        error_ns=tuple(sorted(errors.items())),
    )


def batch_ops(context: StageContext, batch: Batch, direction: Literal["forward", "backward"]) -> tuple[Op, ...]:
    """Every operator of a stage for a batch, one after the other, with one launch a subgraph."""
    return tuple(op for group in subgraph_ops(context, batch, direction) for op in (host("launch", direction), *group))


def stage_latency_ns(
    cost: CostModel, device: DeviceSpec, context: StageContext, batch: Batch, direction: Literal["forward", "backward"]
) -> int:
    """Time of one batch on one stage with nothing beside it: Σ operators (MuxTune Eq. 3 with measured directions)."""
    price = total(cost, device, batch_ops(context, batch, direction))
    return price.p50_ns + (price.host_ns if device.is_cpu else 0)


def cost_models() -> dict[str, type[Any]]:
    """Every cost model by key."""
    return plugins("cost", Path(__file__).parent, "muxtune.sim.cost", CostBase)


@noun
class NoConfig:
    """A cost model without options."""


class CostBase:
    """Marks the class of a cost-model file that the registry picks up; `Config` has the options of `NAME:key=value,…`."""

    Config: type[Any] = NoConfig


def require_cost_model(key: str) -> type[Any]:
    """One cost-model class.

    Raises:
        UnknownKeyError: there is none of this name.
    """
    models = cost_models()
    if key not in models:
        raise UnknownKeyError("cost model", key, models)
    return models[key]
