"""Question: what a re-plan decides on, with tasks named by type and place, so that equal questions are one question.

Two states whose tasks differ in names, tenants or listing order, and whose plans in force differ in the same names, are one
question; its answer is renamed to whoever asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from muxtune.policies.base import SystemState
from muxtune.policies.candidates import Candidate, HTaskIds, candidate_of
from muxtune.policies.objectives.base import require_objective
from muxtune.policies.surrogate import task_type
from muxtune.spec.noun import noun
from muxtune.spec.plan import Instance, MadeBy, Plan, Provenance
from muxtune.spec.task import Task, Workload

Names = Mapping[str, str]


@noun
class Question:
    """`carried` is what the plan in force comes to without the tasks that left, where it is one shared instance.

    `touched` are its hTasks that lost a task. `unchanged` is the plan in force itself, where nothing arrived or left.
    `made_by` says who made it, and is None where none is in force.
    """

    workload: Workload
    carried: Candidate | None = None
    touched: tuple[HTaskIds, ...] = ()
    unchanged: Plan | None = None
    made_by: MadeBy | None = None


@noun
class Change:
    """Who came and who went, by id."""

    arrived: tuple[str, ...]
    left: tuple[str, ...]


def change(state: SystemState) -> Change:
    """Tasks of the workload that the plan in force lacks, and the reverse; a task of another type is both."""
    old = {} if state.current is None else _kinds(state.current.workload)
    new = _kinds(state.workload)
    arrived = sorted(t for t in new if old.get(t) != new[t])
    return Change(arrived=tuple(arrived), left=tuple(sorted(t for t in old if old[t] != new.get(t))))


def _kinds(workload: Workload) -> dict[str, tuple[object, ...]]:
    """What a plan of each task rests on."""
    return {t.task_id: (task_type(t), workload.lengths(t)) for t in workload.tasks}


def question_of(state: SystemState) -> tuple[Question, dict[str, str]]:
    """The question of a state, and the task that each of its names stands for."""
    changed = change(state)
    candidate = None if state.current is None else candidate_of(state.current)
    buckets, touched = _left_over(candidate, frozenset(changed.left))
    names = _names(state, _places(state, candidate, buckets))
    workload = _canonical_workload(state, names)
    unchanged = None
    if state.current is not None and changed == Change(arrived=(), left=()):
        # When and where it was made decides nothing.
        unchanged = replace(renamed(state.current, names, workload), provenance=Provenance())
    carried = None
    if candidate is not None and buckets:
        moved = tuple(tuple(tuple(names[t] for t in h) for h in bucket) for bucket in buckets)
        carried = replace(candidate, buckets=moved).canonical()
    question = Question(
        workload=workload,
        carried=carried,
        touched=tuple(sorted(tuple(sorted(names[t] for t in h)) for h in touched)),
        unchanged=unchanged,
        made_by=None if state.current is None else replace(state.current.made_by, solver=None, layouts=None),
    )
    return question, {name: task for task, name in names.items()}


def _left_over(
    candidate: Candidate | None, left: frozenset[str]
) -> tuple[tuple[tuple[HTaskIds, ...], ...], tuple[HTaskIds, ...]]:
    """(buckets without the tasks that left, hTasks that lost some and are still there)."""
    if candidate is None:
        return (), ()
    touched: list[HTaskIds] = []
    buckets: list[tuple[HTaskIds, ...]] = []
    for bucket in candidate.buckets:
        stay = [(tuple(t for t in h if t not in left), len(h)) for h in bucket]
        touched += [h for h, size in stay if 0 < len(h) < size]
        if kept := tuple(h for h, _ in stay if h):
            buckets.append(kept)
    return tuple(buckets), tuple(touched)


def _places(
    state: SystemState, candidate: Candidate | None, buckets: tuple[tuple[HTaskIds, ...], ...]
) -> dict[str, tuple[int, ...]]:
    """Where each task stands in what is left of the plan in force; arrivals have no place."""
    if state.current is None:
        return {}
    listed = [(i, t) for i, instance in enumerate(state.current.instances) for t in instance.tasks]
    position = {t: n for n, (_, t) in enumerate(listed)}
    if candidate is None:
        return {t: (i, position[t]) for i, t in listed}
    types = {t.task_id: task_type(t) for t in state.workload.tasks}
    places: dict[str, tuple[int, ...]] = {}
    for b, bucket in enumerate(buckets):
        ranked = sorted(bucket, key=lambda h: (sorted(types[t] for t in h), min(position[t] for t in h)))
        places |= {t: (b, rank, position[t]) for rank, h in enumerate(ranked) for t in h}
    return places


def _names(state: SystemState, places: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Task id → canonical name: by type, what the objective reads, place, then id (which decides nothing but the name)."""
    ordered = sorted(
        state.workload.tasks,
        key=lambda t: (task_type(t), _read(state, t), places.get(t.task_id, (1 << 30,)), t.task_id),
    )
    return {t.task_id: f"t{i:04d}" for i, t in enumerate(ordered)}


def _read(state: SystemState, task: Task) -> tuple[float, ...]:
    """The fields of a task that the state's objective looks at."""
    if not require_objective(state.goal.objective).reads_tasks:
        return ()
    deadline_ns = -1 if task.deadline_ns is None else task.deadline_ns
    return task.steps, task.arrival_ns, task.weight, deadline_ns


def _canonical_workload(state: SystemState, names: Names) -> Workload:
    """The workload with canonical names, and without what decides nothing."""
    reads = require_objective(state.goal.objective).reads_tasks
    tasks = []
    for task in sorted(state.workload.tasks, key=lambda t: names[t.task_id]):
        bare = Task(
            task_id=names[task.task_id],
            peft=task.peft,
            dataset=task.dataset,
            billed_len_tokens=task.billed_len_tokens,
            global_batch_samples=task.global_batch_samples,
        )
        if reads:
            bare = replace(
                bare,
                steps=task.steps,
                arrival_ns=task.arrival_ns,
                weight=task.weight,
                deadline_ns=task.deadline_ns,
            )
        tasks.append(bare)
    used = {t.dataset for t in tasks}
    datasets = sorted((d for d in state.workload.datasets if d.name in used), key=lambda d: d.name)
    return Workload(name="online", model=state.workload.model, datasets=tuple(datasets), tasks=tuple(tasks))


def renamed(plan: Plan, names: Names, workload: Workload) -> Plan:
    """The plan with other task ids, for a workload that has them."""
    return replace(plan, workload=workload, instances=tuple(_renamed(i, names) for i in plan.instances), predicted=None)


def _renamed(instance: Instance, names: Names) -> Instance:
    htasks = tuple(replace(h, tasks=tuple(names[t] for t in h.tasks)) for h in instance.htasks)
    buckets = tuple(
        replace(
            bucket,
            units=tuple(replace(u, parts=tuple(replace(p, task=names[p.task]) for p in u.parts)) for u in bucket.units),
        )
        for bucket in instance.buckets
    )
    orders = tuple(
        replace(o, actions=tuple(replace(a, task=names[a.task]) if a.task else a for a in o.actions))
        for o in instance.orders
    )
    return replace(instance, htasks=htasks, buckets=buckets, orders=orders)
