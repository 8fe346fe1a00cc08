"""Tasks that go on from where another run saved them: which checkpoints allow it, and what they hold of the task."""

from __future__ import annotations

from collections.abc import Mapping

from muxtune.executor.checkpoint import Checkpoint
from muxtune.executor.reports import StepReport
from muxtune.executor.tensor_files import history_reports, read_tensors
from muxtune.spec.errors import InputError
from muxtune.spec.plan import Plan

#: task_id → the checkpoint to go on from.
SavedTasks = Mapping[str, Checkpoint]


def saved_history(checkpoint: Checkpoint, task: str) -> list[StepReport]:
    """Every step that a task has behind it."""
    found = checkpoint.manifest.plan.workload.task(task)
    return history_reports(found, read_tensors(checkpoint.paths(task, 0)))


def saved_steps(saved: SavedTasks) -> dict[str, int]:
    """Steps that tasks have behind them."""
    return {t: next(x.steps for x in c.manifest.done if x.task == t) for t, c in saved.items()}


def require_goes_on(saved: SavedTasks, plan: Plan, seed: int) -> None:
    """Refuse a task that could not go on in a run of this plan's backbone and layout as if it had never stopped.

    Raises:
        InputError: another seed (samples, dropout and random backbones would be others), another backbone or tp, a task
            that was changed, or no step left.
    """
    places = {t: i.layout.tp for i in plan.instances for t in i.tasks}
    for task, checkpoint in saved.items():
        there, folder = checkpoint.manifest, checkpoint.folder
        before = there.plan.workload
        steps, tp = saved_steps({task: checkpoint})[task], places.get(task, plan.instances[0].layout.tp)
        shards = next(i.layout.tp for i in there.plan.instances if task in i.tasks)
        if there.seed != seed:
            raise InputError(f"{folder}: task {task} was trained with seed {there.seed}: run with --seed {there.seed}")
        if before.model != plan.workload.model:
            raise InputError(
                f"{folder}: task {task} was trained on {before.model.name}, this run trains {plan.workload.model.name}"
            )
        if any(t != before.task(task) for t in plan.workload.tasks if t.task_id == task):
            raise InputError(f"{folder}: task {task} differs from the one that was saved: keep it as it was")
        if shards != tp:
            raise InputError(
                f"{folder}: task {task} was saved with tp={shards}, this run has tp={tp}: plan with that tp"
            )
        if steps >= before.task(task).steps:
            raise InputError(f"{folder}: task {task} has taken all its {steps} steps: nothing is left to train")
