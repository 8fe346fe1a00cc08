"""Session: a plan in training. Every call stands at an iteration boundary: iterate, let tasks join or leave, save, go on."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from muxtune.executor import messages
from muxtune.executor.checkpoint import (
    Checkpoint,
    FileRecord,
    Manifest,
    TaskSteps,
    iteration_folder,
    prune_checkpoints,
    read_checkpoint,
    task_folder,
    write_checkpoint,
)
from muxtune.executor.group import WorkerGroup, measured_timeline
from muxtune.executor.reports import StepReport
from muxtune.executor.saved_tasks import SavedTasks, require_goes_on, saved_history, saved_steps
from muxtune.spec.bind import bind_draw
from muxtune.spec.check import require_valid
from muxtune.spec.draw import draw_onward
from muxtune.spec.errors import InputError
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan
from muxtune.spec.program import Bound
from muxtune.spec.restrict import without_tasks
from muxtune.spec.timeline import Timeline

NAME = "session"


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """One pass of the Program: its number from 0, when it ran on each rank, and the steps that the tasks took."""

    number: int
    bound: Bound
    results: tuple[messages.RankResult, ...]
    steps: tuple[StepReport, ...]

    @property
    def span_ns(self) -> int:
        """From the first start to the last end on any rank."""
        marks = [m for r in self.results for m in r.marks]
        return max(m.end_ns for m in marks) - min(m.start_ns for m in marks)

    @property
    def iteration_ns(self) -> int:
        """Time over the optimizer steps of the Program."""
        return round(self.span_ns / self.bound.program.steps)

    def timeline(self) -> Timeline:
        """The measured Timeline."""
        return measured_timeline(self.bound, list(self.results))


@noun
class ReplanReport:
    """Tasks that came and went before iteration `iteration`, and what it cost; `continued` came from a checkpoint.

    `check_seconds` went into checking the new plan and drawing its next Program, `save_seconds` into saving tasks that left,
    `apply_seconds` into building what is new on the ranks; planning itself is the planner's (`plan_seconds`).
    """

    iteration: int
    joined: tuple[str, ...]
    left: tuple[str, ...]
    continued: tuple[str, ...] = ()
    plan_digest: str
    plan_seconds: float
    check_seconds: float
    save_seconds: float
    apply_seconds: float


class Session:
    """One plan on one group of workers, whose layout must be the plan's.

    With a `checkpoint` folder, tasks that leave are saved there before their adapters go.
    """

    def __init__(self, group: WorkerGroup, plan: Plan, seed: int = 0, checkpoint: Path | None = None) -> None:
        require_valid(plan, seed)
        self.group, self.plan, self.seed, self.checkpoint = group, plan, seed, checkpoint
        self.run_digest = plan.decision_digest()
        self.iteration = 0
        self.done = {t.task_id: 0 for t in plan.workload.tasks}
        self.left: dict[str, tuple[StepReport, ...]] = {}
        self.history: dict[str, list[StepReport]] = {t: [] for t in self.done}
        self.ready: Bound | None = self._bound(plan, self.done)
        group.load(NAME, self.ready, seed, ending=True)

    def _bound(self, plan: Plan, done: dict[str, int]) -> Bound:
        """The next Program of a plan: every task draws from where it is."""
        steps = math.lcm(*(i.steps for i in plan.instances))
        return bind_draw(plan, draw_onward(plan.workload, self.seed, steps, done))

    def finished(self) -> tuple[str, ...]:
        """Tasks that have taken all their steps."""
        return tuple(t.task_id for t in self.plan.workload.tasks if self.done[t.task_id] >= t.steps)

    def iterate(self) -> Iteration:
        """Run the next Program once."""
        bound = self.ready
        if bound is None:
            bound = self._bound(self.plan, self.done)
            self.group.ask(messages.Rebind(name=NAME, bound=bound))
        self.ready = None
        results = self.group.run(NAME, reference=False)
        steps = merge_steps(results)
        for report in steps:
            self.done[report.task] = report.step + 1
            self.history[report.task].append(report)
        self.iteration += 1
        return Iteration(number=self.iteration - 1, bound=bound, results=tuple(results), steps=steps)

    def register_tasks(
        self, plan: Plan, plan_seconds: float = 0.0, saved: SavedTasks = MappingProxyType({})
    ) -> ReplanReport:
        """Go on with a plan that has further tasks; they start at their step 0, those in `saved` where they were saved.

        Raises:
            InputError: the plan has no new task, or is not one to go on with (`replan`).
        """
        if not {t.task_id for t in plan.workload.tasks} - set(self.done):
            raise InputError("register_tasks: the plan has no task that is not here already")
        return self.replan(plan, plan_seconds, saved)

    def remove_task(self, task_id: str, plan: Plan | None = None) -> ReplanReport:
        """Go on without a task, by another plan or by the present one without it.

        Raises:
            PlanError: no such task, or it is the last one. InputError: see `replan`.
        """
        return self.leave([task_id]) if plan is None else self.replan(plan)

    def leave(self, tasks: Collection[str]) -> ReplanReport:
        """Go on without some tasks, by the present plan without them."""
        started_s = time.perf_counter()
        plan = without_tasks(self.plan, tasks)
        return self.replan(plan, time.perf_counter() - started_s)

    def replan(self, plan: Plan, plan_seconds: float = 0.0, saved: SavedTasks = MappingProxyType({})) -> ReplanReport:
        """Go on with another plan: tasks that it lacks leave, new ones join; backbones and all other tasks stay as they are.

        A new task in `saved` goes on from that checkpoint, curve included.

        Raises:
            PlanError: the plan cannot be executed. InputError: another model or layout, a task was changed, or one cannot go
                on from its checkpoint.
        """
        started_s = time.perf_counter()
        require_continues(self.plan, plan, self.left)
        require_valid(plan, self.seed)
        after = [t.task_id for t in plan.workload.tasks]
        joined, left = [t for t in after if t not in self.done], [t for t in self.done if t not in after]
        saved = {t: checkpoint for t, checkpoint in saved.items() if t in joined}
        require_goes_on(saved, plan, self.seed)
        done = {t: self.done.get(t, 0) for t in after} | saved_steps(saved)
        bound = self._bound(plan, done)
        checked_s = time.perf_counter()
        self.retire(left)
        saved_s = time.perf_counter()
        self.group.ask(messages.Replan(name=NAME, bound=bound, seed=self.seed, saved=saved))
        self.done, self.ready, self.plan = done, bound, plan
        self.history |= {t: saved_history(saved[t], t) if t in saved else [] for t in joined}
        return ReplanReport(
            iteration=self.iteration,
            joined=tuple(joined),
            left=tuple(left),
            continued=tuple(saved),
            plan_digest=plan.decision_digest(),
            plan_seconds=plan_seconds,
            check_seconds=checked_s - started_s,
            save_seconds=saved_s - checked_s,
            apply_seconds=time.perf_counter() - saved_s,
        )

    def retire(self, tasks: Sequence[str]) -> None:
        """Keep the curves of tasks that leave and, with a checkpoint folder, save them under `tasks/`."""
        for task in tasks:
            if self.checkpoint is not None:
                self.save_task(task, task_folder(self.checkpoint, task))
            self.left[task] = tuple(self.history.pop(task))

    def save_task(self, task_id: str, folder: Path) -> Path:
        """Save one task as a checkpoint of its own."""
        return write_checkpoint(folder, partial(self._manifest, tasks=(task_id,)), self.group.agree)

    def curves(self) -> dict[str, list[StepReport]]:
        """The steps of every task so far, those that left included."""
        return {**{t: list(steps) for t, steps in self.left.items()}, **self.history}

    def save(self, keep: int = 3) -> Path:
        """Save the whole run as the checkpoint of this iteration, and remove all but the newest `keep`.

        Raises:
            InputError: the session has no checkpoint folder, or the disk is full.
        """
        if self.checkpoint is None:
            raise InputError("save: the session was made without a checkpoint folder")
        folder = iteration_folder(self.checkpoint, self.iteration)
        write_checkpoint(folder, partial(self._manifest, tasks=None), self.group.agree)
        self.group.agree(partial(prune_checkpoints, self.checkpoint, keep))
        return folder

    def _manifest(self, part: Path, tasks: tuple[str, ...] | None) -> Manifest:
        written: list[tuple[FileRecord, ...]] = self.group.ask(messages.Save(name=NAME, folder=part, tasks=tasks))
        return Manifest(
            run_digest=self.run_digest,
            seed=self.seed,
            iteration=self.iteration,
            plan=self.plan,
            done=tuple(TaskSteps(task=t, steps=n) for t, n in self.done.items()),
            left=tuple(TaskSteps(task=t, steps=len(steps)) for t, steps in self.left.items()),
            files=tuple(record for records in written for record in records),
        )

    @classmethod
    def resume(cls, group: WorkerGroup, checkpoint: Checkpoint, root: Path) -> Session:
        """The session as it was when the checkpoint was saved; curves and all following steps are the uninterrupted ones.

        Raises:
            InputError: a task that left is not whole on disk.
        """
        manifest = checkpoint.manifest
        session = cls(group, manifest.plan, manifest.seed, root)
        session.run_digest, session.iteration = manifest.run_digest, manifest.iteration
        session.done = {x.task: x.steps for x in manifest.done}
        session.ready = session._bound(manifest.plan, session.done)
        restored = group.ask(messages.Restore(name=NAME, checkpoint=checkpoint, bound=session.ready))
        session.history = {t: [] for t in session.done}
        for report in merge_reports(restored):
            session.history[report.task].append(report)
        for left in manifest.left:
            saved = read_checkpoint(task_folder(root, left.task))
            session.left[left.task] = tuple(saved_history(saved, left.task))
        return session


def merge_steps(results: Sequence[messages.RankResult]) -> tuple[StepReport, ...]:
    """The steps of one run over all ranks."""
    return merge_reports([r.steps for r in results])


def merge_reports(ranks: Sequence[Sequence[StepReport]]) -> tuple[StepReport, ...]:
    """One report a (task, step) from those of all ranks: the loss is known on the last stage, all else is common."""
    found: dict[tuple[str, int], StepReport] = {}
    for report in (r for reports in ranks for r in reports):
        at = (report.task, report.step)
        if at not in found or found[at].loss is None:
            found[at] = report
    return tuple(found.values())


def require_continues(old: Plan, new: Plan, left: Collection[str]) -> None:
    """Refuse a plan that a running session cannot go on with.

    Raises:
        InputError: another backbone, layout or device list, a task that was changed, or one that has already left.
    """
    if new.workload.model != old.workload.model:
        raise InputError(f"the new plan is for {new.workload.model.name}, the session trains {old.workload.model.name}")
    places = {t: (i.layout, i.devices) for i in old.instances for t in i.tasks}
    for instance in new.instances:
        mine = (instance.layout, instance.devices)
        if mine not in places.values() or any(places.get(t, mine) != mine for t in instance.tasks):
            layout, devices = next((places[t] for t in instance.tasks if t in places), next(iter(places.values())))
            raise InputError(
                f"instance {instance.name}: layout {instance.layout.name} on devices {list(instance.devices)}: its tasks "
                f"train as {layout.name} on {list(devices)}, layers {list(layout.layers_per_stage)}: plan with that layout"
            )
    before = {t.task_id: t for t in old.workload.tasks}
    for task in new.workload.tasks:
        if task.task_id in left:
            raise InputError(f"task {task.task_id} has already left: give the new task another task_id")
        if before.get(task.task_id, task) != task:
            raise InputError(
                f"task {task.task_id} differs from the one in training: keep it, or give the new one another task_id"
            )
