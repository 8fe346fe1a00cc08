"""The loop of `execute`: iterations, tasks that come and go at their boundaries, checkpoints."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from muxtune.executor.checkpoint import Checkpoint, find_task
from muxtune.executor.saved_tasks import SavedTasks, require_goes_on
from muxtune.executor.session import Iteration, ReplanReport, Session
from muxtune.experiments.commands.inputs import Progress, load_cost, silent
from muxtune.experiments.commands.metrics import Metrics
from muxtune.experiments.commands.plan import timed_plan
from muxtune.policies.base import SystemState, make_policy
from muxtune.sim.simulate import make_evaluate
from muxtune.sim.traces.workload import read_workload
from muxtune.spec.errors import InputError
from muxtune.spec.plan import Plan
from muxtune.spec.restrict import without_tasks
from muxtune.spec.task import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What happens before which iteration: workload files whose tasks join, tasks that leave; and who plans anew.

    Without a `policy` the plan is kept without the tasks that leave, and none can join. Joining tasks in `saved` go on from
    their checkpoint.
    """

    joins: tuple[tuple[int, Workload], ...] = ()
    saved: SavedTasks = field(default_factory=dict)
    leaves: tuple[tuple[int, str], ...] = ()
    policy: str = ""
    cost: str = "roofline"


@dataclass(slots=True)
class Trained:
    """What the loop did in this process; `last` is the last iteration."""

    times_ns: list[int] = field(default_factory=list)
    billed_tokens: int = 0
    program_digests: list[str] = field(default_factory=list)
    replans: list[ReplanReport] = field(default_factory=list)
    save_seconds: list[float] = field(default_factory=list)
    last: Iteration | None = None


def parse_changes(
    joins: Sequence[str], leaves: Sequence[str], policy: str, cost: str, joins_from: Sequence[str] = ()
) -> Changes:
    """`--join N:FILE`, `--leave N:TASK`, `--join-from N:TASK=DIR`.

    Raises:
        InputError: another form, a join without a policy to plan it, or no whole checkpoint of such a task.
    """
    for option, texts in (("--join", joins), ("--join-from", joins_from)):
        if texts and not policy:
            raise InputError(f"{option} {texts[0]}: the new tasks need a plan: name a policy with --replan")
    read = [(n, read_workload(Path(file))) for n, file in (_numbered("--join", "FILE", x) for x in joins)]
    saved: dict[str, Checkpoint] = {}
    for number, text in (_numbered("--join-from", "TASK=DIR", x) for x in joins_from):
        task, equals, folder = text.partition("=")
        if not equals or task in saved:
            raise InputError(f"--join-from {number}:{text}: give N:TASK=DIR, such as 3:alice=run/state, each task once")
        saved[task] = find_task(Path(folder), task)
        read.append((number, _only(saved[task].manifest.plan.workload, task, text)))
    left = tuple(_numbered("--leave", "TASK", x) for x in leaves)
    return Changes(joins=tuple(read), leaves=left, policy=policy, cost=cost, saved=saved)


def _only(workload: Workload, task_id: str, name: str) -> Workload:
    """One task of a workload and its data set."""
    task = workload.task(task_id)
    return replace(workload, name=name, tasks=(task,), datasets=(workload.lengths(task),))


def _numbered(option: str, what: str, text: str) -> tuple[int, str]:
    found = re.fullmatch(r"([0-9]+):(.+)", text)
    if not found:
        raise InputError(
            f"{option} {text!r}: give N:{what}, such as 3:{what.lower()}, with N the iteration it comes before"
        )
    return int(found[1]), found[2]


def require_reachable(changes: Changes, plan: Plan, iterations: int, seed: int) -> None:
    """Refuse changes that would never come, before anything runs.

    Raises:
        InputError: an iteration beyond the last, a task that is never in training leaves, or one that cannot go on here.
    """
    require_goes_on(changes.saved, plan, seed)
    known = [t.task_id for w in (plan.workload, *(w for _, w in changes.joins)) for t in w.tasks]
    for option, number, what in (
        *(("--join", n, w.name) for n, w in changes.joins),
        *(("--leave", n, t) for n, t in changes.leaves),
    ):
        if number >= iterations:
            raise InputError(
                f"{option} {number}:{what}: there are only iterations 0 to {iterations - 1}: lower {number}"
            )
        if option == "--leave" and what not in known:
            raise InputError(f"--leave {number}:{what}: no such task: known are {', '.join(known)}")


def train(
    session: Session,
    iterations: int,
    changes: Changes,
    metrics: Metrics,
    every: int,
    keep: int,
    progress: Progress = silent,
) -> Trained:
    """Run until `iterations` or until every task has finished; saves every `every` iterations and at the end."""
    done = Trained()
    saved = session.iteration
    while session.iteration < iterations:
        if not _change(session, changes, metrics, done):
            break
        done.last = session.iterate()
        _count(done)
        metrics.iteration(done.last)
        if session.checkpoint is not None and session.iteration % every == 0:
            _save(session, metrics, keep, done)
            saved = session.iteration
        progress("execute", session.iteration, iterations)
    if session.checkpoint is not None and saved != session.iteration:
        _save(session, metrics, keep, done)
    return done


def _count(done: Trained) -> None:
    assert done.last is not None
    done.times_ns.append(done.last.iteration_ns)
    done.program_digests.append(done.last.bound.program.digest())
    tasks = done.last.bound.plan.workload.tasks
    done.billed_tokens += sum(t.billed_len_tokens * t.global_batch_samples for t in tasks)


def _save(session: Session, metrics: Metrics, keep: int, done: Trained) -> None:
    started_s = time.perf_counter()
    folder = session.save(keep)
    done.save_seconds.append(time.perf_counter() - started_s)
    metrics.checkpoint(session.iteration, folder, done.save_seconds[-1])


def _change(session: Session, changes: Changes, metrics: Metrics, done: Trained) -> bool:
    """Let tasks leave that have finished or are told to, and others join; False where nothing is left to train."""
    here = session.iteration
    gone = {*session.finished(), *(t for n, t in changes.leaves if n == here and t not in session.left)}
    coming = [w for n, w in changes.joins if n == here]
    plan = session.plan
    if not gone and not coming:
        return True
    if gone >= {t.task_id for t in plan.workload.tasks} and not coming:
        return False
    started_s = time.perf_counter()
    if changes.policy:
        plan = replanned(plan, changed_workload(plan.workload, gone, coming), changes, session.seed)
    else:
        plan = without_tasks(plan, gone)
    done.replans.append(session.replan(plan, time.perf_counter() - started_s, changes.saved))
    metrics.replan(done.replans[-1])
    return True


def changed_workload(workload: Workload, gone: set[str], coming: Sequence[Workload]) -> Workload:
    """The workload without some tasks and with those of others.

    Raises:
        InputError: another model, a task_id or a data set's name that means two things, or an unknown task leaves.
    """
    unknown = gone - {t.task_id for t in workload.tasks}
    if unknown:
        raise InputError(
            f"--leave: task {min(unknown)!r} is not in training: {', '.join(t.task_id for t in workload.tasks)}"
        )
    tasks = [t for t in workload.tasks if t.task_id not in gone]
    datasets = {d.name: d for d in workload.datasets}
    for other in coming:
        if other.model != workload.model:
            raise InputError(f"--join: workload {other.name} is for {other.model.name}, not for {workload.model.name}")
        for found in other.datasets:
            if datasets.setdefault(found.name, found) != found:
                raise InputError(
                    f"--join: workload {other.name}: data set {found.name} differs from the one in training"
                )
        tasks += other.tasks
    used = {t.dataset for t in tasks}
    try:
        kept = tuple(d for name, d in datasets.items() if name in used)
        return replace(workload, tasks=tuple(tasks), datasets=kept)
    except ValueError as error:
        raise InputError(f"--join: {error}") from error


def replanned(plan: Plan, workload: Workload, changes: Changes, seed: int) -> Plan:
    """A plan of the policy for another workload, on the layout and micro-batches of the present one."""
    cost = load_cost(changes.cost, plan.cluster)
    state = SystemState(
        workload=workload,
        cluster=plan.cluster,
        layout=plan.instances[0].layout,
        microbatches=plan.instances[0].microbatches,
        seed=seed,
        evaluate=make_evaluate(cost, seed),
    )
    return timed_plan(make_policy(changes.policy, cost), state)
