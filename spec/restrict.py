"""Smaller plans that decide alike: without tasks that left, or with fewer samples to find the least that shows an effect."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from muxtune.spec.errors import InputError, PlanError
from muxtune.spec.plan import Bucket, Instance, LaunchList, Part, Plan, StageOrder, Unit, unit_chunks
from muxtune.spec.task import Workload


def without_tasks(plan: Plan, gone: Collection[str]) -> Plan:
    """The plan that is left when tasks leave; what they leave empty goes with them.

    Raises:
        PlanError: a task is not in the plan, or none would be left.
    """
    known = [t.task_id for t in plan.workload.tasks]
    for task_id in gone:
        if task_id not in known:
            raise PlanError(f"task {task_id!r} is not in the plan: it has {', '.join(known)}")
    if set(known) <= set(gone):
        raise PlanError(f"without {', '.join(known)} no task is left")
    return restrict(plan, dict.fromkeys(gone, 0))


def restrict(plan: Plan, samples: Mapping[str, int]) -> Plan:
    """The plan with the first `samples[task]` slots of each task; a task with none is left out, and so is what it empties.

    Layout, alignment, orders, feeds and launch lists stay as they are for what is left. The prediction and what a solver
    proved are dropped: they were made for more.

    Raises:
        InputError: an unknown task, more samples than its global batch, or nothing is left.
    """
    for task_id, count in samples.items():
        batch = plan.workload.task(task_id).global_batch_samples
        if not 0 <= count <= batch:
            raise InputError(f"task {task_id}: {count} samples: give 0 to {batch}, its global batch")
    kept = {t.task_id: samples.get(t.task_id, t.global_batch_samples) for t in plan.workload.tasks}
    tasks = tuple(replace(t, global_batch_samples=kept[t.task_id]) for t in plan.workload.tasks if kept[t.task_id])
    if not tasks:
        raise InputError("no task has a sample left: keep at least one")
    used = {t.dataset for t in tasks}
    datasets = tuple(d for d in plan.workload.datasets if d.name in used)
    workload = replace(plan.workload, tasks=tasks, datasets=datasets)
    instances = tuple(_instance(workload, i, kept) for i in plan.instances if any(kept[t] for t in i.tasks))
    made_by = replace(plan.made_by, solver=None, layouts=None)
    return replace(plan, workload=workload, instances=instances, made_by=made_by, predicted=None)


def _instance(workload: Workload, instance: Instance, kept: Mapping[str, int]) -> Instance:
    tasks = [tuple(t for t in h.tasks if kept[t]) for h in instance.htasks]
    place = {h: i for i, h in enumerate(h for h, mine in enumerate(tasks) if mine)}
    left = tuple(replace(instance.htasks[h], tasks=tasks[h]) for h in place)
    buckets: list[Bucket] = []
    moved: dict[tuple[int, int], tuple[int, int]] = {}
    for b, bucket in enumerate(instance.buckets):
        parts = [_parts(unit, place, kept) for unit in bucket.units]
        numbers = [u for u, found in enumerate(parts) if found]
        if not numbers:
            continue
        moved |= {(b, u): (len(buckets), n) for n, u in enumerate(numbers)}
        units = tuple(Unit(parts=parts[u], chunks=unit_chunks(workload, left, parts[u])) for u in numbers)
        inside = tuple(place[h] for h in bucket.htasks if h in place)
        launches = tuple(_launches(x, place) for x in bucket.launches)
        buckets.append(replace(bucket, htasks=inside, units=units, launches=launches))
    return replace(
        instance,
        htasks=left,
        buckets=tuple(buckets),
        feed=tuple(moved[key] for key in instance.feed if key in moved),
        orders=tuple(_order(o, moved, buckets, kept) for o in instance.orders),
    )


def _parts(unit: Unit, place: Mapping[int, int], kept: Mapping[str, int]) -> tuple[Part, ...]:
    found = (
        Part(htask=place[p.htask], task=p.task, slots=tuple(s for s in p.slots if s < kept[p.task]))
        for p in unit.parts
        if kept[p.task]
    )
    return tuple(p for p in found if p.slots)


def _launches(listing: LaunchList, place: Mapping[int, int]) -> LaunchList:
    launches = tuple(replace(x, htask=place[x.htask]) for x in listing.launches if x.htask in place)
    return replace(listing, launches=launches)


def _order(
    order: StageOrder,
    moved: Mapping[tuple[int, int], tuple[int, int]],
    buckets: Sequence[Bucket],
    kept: Mapping[str, int],
) -> StageOrder:
    """The same order without what is gone; a unit that lost its last chunks loses their actions."""
    actions = []
    for action in order.actions:
        if action.op == "step":
            if kept[action.task]:
                actions.append(action)
        elif (action.bucket, action.unit) in moved:
            bucket, unit = moved[action.bucket, action.unit]
            if action.chunk < buckets[bucket].units[unit].chunks:
                actions.append(replace(action, bucket=bucket, unit=unit))
    return replace(order, actions=tuple(actions))
