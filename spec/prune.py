"""without_tasks: the plan that is left when tasks leave: every other decision stays as it was, no cost is needed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from muxtune.spec.errors import PlanError
from muxtune.spec.plan import Bucket, HTask, Instance, Plan, StageOrder, Unit, unit_chunks
from muxtune.spec.task import Workload

#: Old number → new number of what is left.
Renumbered = dict[int, int]


def without_tasks(plan: Plan, gone: Collection[str]) -> Plan:
    """Take tasks out of a plan; hTasks, units, buckets and instances that are left empty go with them.

    Orders, feeds and launch lists keep their sequence. The prediction and what a solver proved are dropped: they were made
    for more tasks.

    Raises:
        PlanError: a task is not in the plan, or none would be left.
    """
    known = [t.task_id for t in plan.workload.tasks]
    for task_id in gone:
        if task_id not in known:
            raise PlanError(f"task {task_id!r} is not in the plan: it has {', '.join(known)}")
    left = tuple(t for t in plan.workload.tasks if t.task_id not in gone)
    if not left:
        raise PlanError(f"without {', '.join(known)} no task is left")
    used = {t.dataset for t in left}
    datasets = tuple(d for d in plan.workload.datasets if d.name in used)
    workload = replace(plan.workload, tasks=left, datasets=datasets)
    kept = [i for i in plan.instances if any(t not in gone for t in i.tasks)]
    return replace(
        plan,
        workload=workload,
        instances=tuple(_instance(workload, i, gone) for i in kept),
        made_by=replace(plan.made_by, solver=None, layouts=None),
        predicted=None,
    )


def _instance(workload: Workload, instance: Instance, gone: Collection[str]) -> Instance:
    if not any(t in gone for t in instance.tasks):
        return instance
    members = [tuple(t for t in h.tasks if t not in gone) for h in instance.htasks]
    htask_of = _renumbered(members)
    htasks = tuple(replace(h, tasks=m) for h, m in zip(instance.htasks, members, strict=True) if m)
    units = [[_unit(workload, htasks, u, htask_of, gone) for u in b.units] for b in instance.buckets]
    unit_of = [_renumbered([u.parts for u in row]) for row in units]
    bucket_of = _renumbered([[h for h in b.htasks if h in htask_of] for b in instance.buckets])
    buckets = tuple(
        _bucket(b, tuple(u for u in row if u.parts), htask_of)
        for i, (b, row) in enumerate(zip(instance.buckets, units, strict=True))
        if i in bucket_of
    )
    chunks = {(b, n): row[u].chunks for b, row in enumerate(units) for u, n in unit_of[b].items()}
    feed = tuple((bucket_of[b], unit_of[b][u]) for b, u in instance.feed if u in unit_of[b])
    orders = tuple(_order(o, bucket_of, unit_of, chunks, gone) for o in instance.orders)
    return replace(instance, htasks=htasks, buckets=buckets, feed=feed, orders=orders)


def _renumbered(parts: Sequence[Sequence[object]]) -> Renumbered:
    kept = [old for old, part in enumerate(parts) if part]
    return {old: new for new, old in enumerate(kept)}


def _unit(workload: Workload, htasks: Sequence[HTask], unit: Unit, htask_of: Renumbered, gone: Collection[str]) -> Unit:
    parts = tuple(replace(p, htask=htask_of[p.htask]) for p in unit.parts if p.task not in gone)
    return Unit(parts=parts, chunks=unit_chunks(workload, htasks, parts))


def _bucket(bucket: Bucket, units: tuple[Unit, ...], htask_of: Renumbered) -> Bucket:
    launches = tuple(
        replace(x, launches=tuple(replace(y, htask=htask_of[y.htask]) for y in x.launches if y.htask in htask_of))
        for x in bucket.launches
    )
    htasks = tuple(htask_of[h] for h in bucket.htasks if h in htask_of)
    return Bucket(htasks=htasks, units=units, launches=launches)


def _order(
    order: StageOrder,
    bucket_of: Renumbered,
    unit_of: Sequence[Renumbered],
    chunks: dict[tuple[int, int], int],
    gone: Collection[str],
) -> StageOrder:
    """`chunks` are those of the units that are left, by old bucket and new unit."""
    actions = []
    for x in order.actions:
        if x.op == "step":
            actions += [] if x.task in gone else [x]
            continue
        unit = unit_of[x.bucket].get(x.unit)
        if unit is not None and x.chunk < chunks[x.bucket, unit]:
            actions.append(replace(x, bucket=bucket_of[x.bucket], unit=unit))
    return StageOrder(stage=order.stage, actions=tuple(actions))
