"""CostModel: latency(op) → Cost. Every model says how sure it is and when it answers from outside its measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from muxtune.sim.cost._memory import Memory
from muxtune.spec.align import Batch
from muxtune.spec.catalogue import StageContext, Way, stage_ops, stage_subgraphs, subgraph_ops
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.errors import UnknownKeyError
from muxtune.spec.isolated import gather, isolated_ops, isolated_subgraphs
from muxtune.spec.noun import noun
from muxtune.spec.ops import ADAPTER_SUM, ADAPTERS, COLLECTIVES, Op, collective_load, host
from muxtune.spec.plan import COMM_CTAS
from muxtune.spec.registry import plugins


@noun
class Cost:
    """Price of one operator call: device time, host time to issue it, and how far to trust them.

    `utilisation` is the share of the device that the call keeps busy (u_a of MuxTune Eq. 3), in (0, 1]: what calls that
    are fused into one leave to each other. `utilisation_guessed` says that it was not measured where `p50_ns` was.
    """

    p50_ns: int
    host_ns: int = 0
    relative_error: float = 0.0
    extrapolated: bool = False
    joules: float = 0.0
    utilisation: float = 1.0
    utilisation_guessed: bool = False


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
    """What simulator and policies need of a cost model. `calibrated` is False where nothing was measured.

    A model with a true attribute `backward_is_forward` has its backward priced by the operators of the forward.
    """

    @property
    def model_id(self) -> str:
        """Name and digest, written into every result."""
        ...

    @property
    def calibrated(self) -> bool:
        """Whether the figures come from measurements on the device."""
        ...

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        """Cost of one call while all of `share` run beside it (none by default): operators, or a `collective_load`.

        Raises:
            ExtrapolationError: the op lies outside what was measured and extrapolation is not allowed.
        """
        ...

    def link_latency(self, op: Op, link: Link) -> Cost:
        """Cost of moving a message (p2p, all_reduce) over a link."""
        ...


def grouped(costs: Sequence[Cost]) -> Cost:
    """Adapters of one BaseOp as one grouped operator: max{Σ u_a·t_a, max t_a} (MuxTune Eq. 3), issued once.

    Each u_a·t_a is rounded to a nanosecond. On a CPU u_a is 1, so that it is the sum.
    """
    if len(costs) == 1:
        return costs[0]
    alone_ns = sum(c.p50_ns for c in costs)
    return Cost(
        p50_ns=max(sum(round(c.utilisation * c.p50_ns) for c in costs), *(c.p50_ns for c in costs)),
        host_ns=max(c.host_ns for c in costs),
        relative_error=sum(c.relative_error * c.p50_ns for c in costs) / alone_ns if alone_ns else 0.0,
        extrapolated=any(c.extrapolated or c.utilisation_guessed for c in costs),
        joules=sum(c.joules for c in costs),
        utilisation=max(c.utilisation for c in costs),
    )


def prices(
    cost: CostModel,
    device: DeviceSpec,
    ops: Iterable[Op],
    *,
    link: Link | None = None,
    share: tuple[Op, ...] = (),
    fuse_adapters: bool = True,
) -> Iterator[tuple[str, Cost]]:
    """(family, cost) of operators run one after the other, `share` beside them; a BaseOp's adapters as one where fused.

    Collectives go over `link`, where none is given over the one that the cost model takes for the device.
    """
    for key, run in groupby(ops, _base_op if fuse_adapters else lambda op: None):
        if key is not None:
            yield str(key[0]), grouped([adapter_cost(cost, device, op, link, share) for op in run])
            continue
        for op in run:
            linked = link is not None and op.family in COLLECTIVES
            yield op.family, cost.link_latency(op, link) if linked else cost.latency(op, device, share)  # type: ignore[arg-type]


def adapter_cost(
    cost: CostModel, device: DeviceSpec, op: Op, link: Link | None = None, share: tuple[Op, ...] = ()
) -> Cost:
    """Price of an adapter's operator; what tp ranks sum inside it is an all-reduce over `link` that nothing hides."""
    if op.family != ADAPTER_SUM:
        return cost.latency(op, device, share)
    message = replace(op, family="all_reduce", direction="forward", shape=op.shape[:1])
    return cost.link_latency(message, link) if link is not None else cost.latency(message, device)


def leaders(ops: Iterable[Op], fuse_adapters: bool = True) -> Iterator[Op]:
    """For each price of `prices` the first operator behind it."""
    for key, run in groupby(ops, _base_op if fuse_adapters else lambda op: None):
        calls = tuple(run)
        yield from calls if key is None else calls[:1]


def comm_load(device: DeviceSpec, link: Link | None, ctas: int = COMM_CTAS) -> tuple[Op, ...]:
    """What runs beside compute while a collective runs over a link; nothing on a CPU, where they take turns."""
    return (collective_load(ctas, link.bandwidth_bytes_per_s),) if link and ctas and not device.is_cpu else ()


def stream_ns(price: Cost, device: DeviceSpec) -> int:
    """Stream time of an operator: on a CPU its host time counts as compute."""
    return price.p50_ns + (price.host_ns if device.is_cpu else 0)


def _base_op(op: Op) -> tuple[object, ...] | None:
    """What neighbouring adapters of one BaseOp have in common; None for other operators."""
    return (op.family, op.direction, op.dtype, op.shape[:2]) if op.family in ADAPTERS else None


def total(cost: CostModel, device: DeviceSpec, ops: Iterable[Op], link: Link | None = None) -> CostSum:
    """Sum of the latencies of operators run one after the other, a BaseOp's adapters as one grouped operator."""
    p50_ns = host_ns = extrapolated_ns = 0
    joules = 0.0
    errors: dict[str, float] = {}
    for family, price in prices(cost, device, ops, link=link):
        p50_ns += price.p50_ns
        host_ns += price.host_ns
        joules += price.joules
        extrapolated_ns += price.p50_ns if price.extrapolated else 0
        errors[family] = errors.get(family, 0.0) + price.relative_error * price.p50_ns
    return CostSum(
        p50_ns=p50_ns,
        host_ns=host_ns,
        extrapolated_ns=extrapolated_ns,
        joules=joules,
        error_ns=tuple(sorted(errors.items())),
    )


def priced_groups(
    cost: CostModel, context: StageContext, batch: Batch, direction: Way, isolated: bool = False
) -> tuple[tuple[Op, ...], ...]:
    """The operators of each subgraph of a stage by which a cost model prices it; `isolated`: with adapters apart."""
    if direction == "backward" and getattr(cost, "backward_is_forward", False):
        return _mirrored_isolated(context, batch) if isolated else _mirrored(context, batch)
    return isolated_ops(context, batch, direction) if isolated else subgraph_ops(context, batch, direction)


def _mirrored_isolated(context: StageContext, batch: Batch) -> tuple[tuple[Op, ...], ...]:
    """As `_mirrored`, with adapters apart."""
    rows = stage_ops(context, batch)
    subgraphs = isolated_subgraphs(context.layout, context.stage, "backward")
    found = list(gather(subgraphs, {piece: (ops, ops[::-1]) for piece, ops, _ in rows}, "backward"))
    last = max(s.index for s in subgraphs if s.collective is None)
    found[last] += tuple(op for piece, ops, _ in rows if piece.name == "embed" for op in ops)
    return tuple(found)


def _mirrored(context: StageContext, batch: Batch) -> tuple[tuple[Op, ...], ...]:
    """Backward subgraphs that run the forward's operators; the embedding, which has no backward, is in the last one.

    Collectives are left empty.
    """
    forward = {piece: tuple(reversed(ops)) for piece, ops, _ in stage_ops(context, batch)}
    subgraphs = stage_subgraphs(context.layout, context.stage, "backward")
    found: list[tuple[Op, ...]] = [() for _ in subgraphs]
    for subgraph in subgraphs:
        if subgraph.collective is None:
            found[subgraph.index] = tuple(op for piece in subgraph.pieces for op in forward.pop(piece))
    last = max(s.index for s in subgraphs if s.collective is None)
    found[last] += tuple(op for ops in forward.values() for op in ops)
    return tuple(found)


def batch_ops(context: StageContext, batch: Batch, direction: Way, cost: CostModel | None = None) -> tuple[Op, ...]:
    """Every operator of a stage for a batch, one after the other, with one launch a subgraph; as `cost` prices it."""
    groups = subgraph_ops(context, batch, direction) if cost is None else priced_groups(cost, context, batch, direction)
    return tuple(op for group in groups for op in (host("launch", direction), *group))


def stage_latency_ns(
    cost: CostModel,
    device: DeviceSpec,
    context: StageContext,
    batch: Batch,
    direction: Way,
    link: Link | None = None,
) -> int:
    """Time of one batch on one stage with nothing beside it (MuxTune Eq. 3 with measured directions).

    BaseOps one after the other on all tokens, and the adapters of each as one grouped operator.
    """
    priced = prices(cost, device, batch_ops(context, batch, direction, cost), link=link)
    return sum(stream_ns(price, device) for _, price in priced)


def memory_of(cost: CostModel) -> Memory:
    """What is remembered of a cost model's figures; nothing where it has no `memory`."""
    found = getattr(cost, "memory", None)
    return found if isinstance(found, Memory) else Memory()


def cost_models() -> dict[str, type[Any]]:
    """Every cost model by key."""
    return plugins("cost", Path(__file__).parent, "muxtune.sim.cost", CostBase)


@noun
class NoConfig:
    """A cost model without options."""


class CostBase:
    """Marks the class of a cost-model file that the registry picks up; `Config` has the options of `NAME:key=value,…`."""

    Config: type[Any] = NoConfig

    @cached_property
    def memory(self) -> Memory:
        """What planners derived from this model's figures, which must not change while it lives."""
        return Memory()


class WrapBase(CostBase):
    """A cost model that asks another about single operators; its `Config` names that one as `base`.

    It is as calibrated as its base.
    """

    base: CostModel
    calibrated = False


def require_cost_model(key: str) -> type[Any]:
    """One cost-model class.

    Raises:
        UnknownKeyError: there is none of this name.
    """
    models = cost_models()
    if key not in models:
        raise UnknownKeyError("cost model", key, models)
    return models[key]
