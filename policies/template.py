"""Buckets and pipeline template (MuxTune §3.4, Eq. 7, §3.4.1): balance hTasks, largest first, launch eagerly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from muxtune.policies.balance import Buckets, balance, balance_gap
from muxtune.policies.launches import unit_cost
from muxtune.policies.surrogate import Partition, Surrogate
from muxtune.spec.noun import noun
from muxtune.spec.order import ChunkKey, Template, eager
from muxtune.spec.plan import StageOrder


@noun
class Schedule:
    """hTask indices of each bucket, buckets in launch order, and the template that runs them.

    `balance_gap` is how far Eq. 7 may be from its optimum (see `balance_gap`).
    """

    buckets: Buckets
    template: Template
    balance_gap: float


def schedule(surrogate: Surrogate, groups: Partition) -> Schedule:
    """Sweep the number of buckets from 1 to one an hTask and keep the template of least makespan.

    A bucket whose unit does not fit in memory rules its number out. Ties go to more buckets: their units hold less.
    """
    loads = [surrogate.first_stage_ns(g) for g in groups]
    found: list[Schedule] = []
    for parts in range(len(groups), 0, -1):
        packed = balance(loads, parts)
        buckets = tuple(sorted(packed, key=lambda b: (-sum(loads[h] for h in b), b)))
        template = eager_template(surrogate, groups, buckets)
        if template is not None:
            gap = balance_gap(loads, packed)
            found.append(Schedule(buckets=buckets, template=template, balance_gap=gap))
    assert found, "one bucket an hTask fits, because every hTask does"
    return min(found, key=lambda s: s.template.makespan_ns)


@noun
class Units:
    """Chunks of units in feed order, what they hold (from forward to backward) and take on each stage, and the byte budgets."""

    keys: tuple[ChunkKey, ...]
    held_bytes: dict[tuple[int, ChunkKey], int]
    latency_ns: dict[tuple[int, ChunkKey, str], int]
    budget_bytes: tuple[int, ...]


def priced_units(surrogate: Surrogate, groups: Partition, buckets: Buckets) -> Units | None:
    """The units of some buckets; None if one alone does not fit."""
    units = _units(surrogate, groups, buckets)
    held: dict[tuple[int, ChunkKey], int] = {}
    transient: dict[tuple[int, ChunkKey], int] = {}
    latency: dict[tuple[int, ChunkKey, str], int] = {}
    for key, members in units.items():
        found = unit_cost(surrogate, members, key[1], key[2])
        for s in range(surrogate.stages):
            held[s, key], transient[s, key] = found.held_bytes[s], found.transient_bytes[s]
            latency[s, key, "forward"], latency[s, key, "backward"] = found.forward_ns[s], found.backward_ns[s]
    free = [surrogate.memory_bytes - static for static in surrogate.static_bytes]
    for (b, c), count in Counter(key[:2] for key in units).items():
        whole = [(b, c, j) for j in range(count)]
        for s in range(surrogate.stages):
            if sum(held[s, key] for key in whole) + max(transient[s, key] for key in whole) > free[s]:
                return None
    budget = (free[s] - max(transient[s, key] for key in units) for s in range(surrogate.stages))
    return Units(keys=tuple(units), held_bytes=held, latency_ns=latency, budget_bytes=tuple(budget))


def eager_template(surrogate: Surrogate, groups: Partition, buckets: Buckets) -> Template | None:
    """The eager order of buckets, a bucket's units consecutive, and its makespan; None if a unit alone does not fit."""
    units = priced_units(surrogate, groups, buckets)
    return None if units is None else eager_order(units, surrogate.stages, surrogate.state.layout.dp)


def eager_order(units: Units, stages: int, replicas: int) -> Template:
    """The eager order of priced units, replica by replica."""
    chunks = dict(Counter(key[:2] for key in units.keys))
    return side_by_side(
        [
            eager(
                [key for key in chunks if key[1] % replicas == replica],
                stages,
                lambda stage, key, direction: units.latency_ns[stage, key, direction],
                lambda stage, key: units.held_bytes[stage, key],
                units.budget_bytes,
                chunks,
            )
            for replica in range(replicas)
        ]
    )


def side_by_side(replicas: Sequence[Template]) -> Template:
    """The orders of data-parallel replicas as one listing a stage: each replica finds its own units in it in its order."""
    stages = zip(*(t.orders for t in replicas), strict=True)
    orders = (StageOrder(stage=s, actions=sum((o.actions for o in each), ())) for s, each in enumerate(stages))
    return Template(orders=tuple(orders), makespan_ns=max(t.makespan_ns for t in replicas))


def _units(surrogate: Surrogate, groups: Partition, buckets: Buckets) -> dict[ChunkKey, Partition]:
    """The hTasks with samples in each chunk of each unit, bucket after bucket; what has no samples is left out."""
    units: dict[ChunkKey, Partition] = {}
    for b, bucket in enumerate(buckets):
        for c in range(surrogate.state.microbatches):
            for j in range(max(surrogate.chunks(groups[h], c) for h in bucket)):
                if present := tuple(groups[h] for h in bucket if surrogate.microbatch(groups[h], c, j) is not None):
                    units[b, c, j] = present
    return units
