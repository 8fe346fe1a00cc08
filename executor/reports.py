"""What a rank tells of a run: when things ran, and what each optimizer step did. Plain data, readable without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muxtune.spec.schedule import learning_rate
from muxtune.spec.task import Task

Array = NDArray[np.float32]
#: What a task has been through, a number a step; `skips` are step numbers.
HISTORY = ("losses", "gradient_norms", "scales", "skips")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """When an instruction (subgraph −1) or one launch inside it ran on this rank, by the machine's monotonic clock."""

    index: int
    subgraph: int
    htask: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step of a task on one rank. `loss` is known on the last stage; `skipped`: a gradient was not finite."""

    task: str
    step: int
    loss: float | None
    gradient_norm: float
    learning_rate: float
    loss_scale: float
    skipped: bool


def step_reports(task: Task, history: Mapping[str, Sequence[float]], first: int) -> list[StepReport]:
    """The steps of a task from `first` on, from its HISTORY."""
    losses, norms, scales, skips = (history[name] for name in HISTORY)
    return [
        StepReport(
            task=task.task_id,
            step=step,
            loss=losses[step] if step < len(losses) else None,
            gradient_norm=norms[step],
            learning_rate=learning_rate(task.schedule, task.learning_rate, step, task.steps),
            loss_scale=scales[step],
            skipped=step in skips,
        )
        for step in range(first, len(norms))
    ]
