"""Task and Workload: PEFT fine-tuning tasks that share one backbone."""

from __future__ import annotations

import math
from typing import Literal

from muxtune.spec.lengths import LengthDistribution
from muxtune.spec.model import ModelSpec
from muxtune.spec.noun import noun
from muxtune.spec.peft import PeftSpec
from muxtune.spec.schedule import Schedule
from muxtune.spec.units import check_range


@noun
class Task:
    """One tenant's fine-tuning task.

    `dataset` names an entry of the Workload's `datasets`. `billed_len_tokens` is the padded length l that the tenant pays
    for; longer samples lose the left end of their prompt. One optimizer step uses `global_batch_samples` samples.
    Gradients are cut to norm `clip_norm`. The loss is multiplied by `loss_scale` before its backward and gradients are divided
    by it; with `loss_scale_growth_steps` n > 0 it is doubled after n good steps in a row and halved at each skipped one.
    """

    task_id: str
    peft: PeftSpec
    dataset: str
    billed_len_tokens: int
    global_batch_samples: int
    tenant: str = "default"
    steps: int = 1000
    arrival_ns: int = 0
    weight: float = 1.0
    deadline_ns: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    schedule: Schedule = Schedule()
    loss_scale: float = 1.0
    loss_scale_growth_steps: int = 0

    def __post_init__(self) -> None:
        if not self.task_id:
            raise ValueError("task_id is empty: give each task a name")
        for field in ("billed_len_tokens", "global_batch_samples", "steps"):
            check_range(field, getattr(self, field), 1)
        for field in ("learning_rate", "weight", "clip_norm"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)}: must be above 0")
        for field in ("arrival_ns", "deadline_ns"):
            check_range(field, getattr(self, field), 0)
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay}: must not be negative")
        if self.schedule.warmup_steps >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps}: must be below steps={self.steps}, or the full rate is "
                "never reached"
            )
        if not self.loss_scale > 0 or math.frexp(self.loss_scale)[0] != 0.5:
            raise ValueError(f"loss_scale={self.loss_scale}: must be a power of two, so that scaling loses no bit")
        if self.loss_scale_growth_steps < 0:
            raise ValueError(f"loss_scale_growth_steps={self.loss_scale_growth_steps}: must not be negative; 0: fixed")


@noun
class Workload:
    """Tasks on one backbone, with the length distributions that they draw from."""

    name: str
    model: ModelSpec
    datasets: tuple[LengthDistribution, ...]
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        ids = [t.task_id for t in self.tasks]
        if not ids:
            raise ValueError("tasks is empty: a workload has at least one task")
        for task_id in ids:
            if ids.count(task_id) > 1:
                raise ValueError(f"task_id {task_id!r} occurs {ids.count(task_id)} times: give each task its own name")
        names = [d.name for d in self.datasets]
        for task in self.tasks:
            if names.count(task.dataset) != 1:
                raise ValueError(
                    f"task {task.task_id}: dataset {task.dataset!r} stands {names.count(task.dataset)} times in datasets"
                )
            if task.billed_len_tokens > self.model.max_positions:
                raise ValueError(
                    f"task {task.task_id}: billed_len_tokens={task.billed_len_tokens} exceeds the "
                    f"{self.model.max_positions} positions of {self.model.name}; lower it"
                )

    def task(self, task_id: str) -> Task:
        """The task of this id (KeyError if there is none)."""
        for task in self.tasks:
            if task.task_id == task_id:
                return task
        raise KeyError(task_id)

    def lengths(self, task: Task) -> LengthDistribution:
        """The length distribution that a task draws from."""
        return next(d for d in self.datasets if d.name == task.dataset)
