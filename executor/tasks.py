"""TaskState: one task's adapters on one rank, their optimizer, learning rate, loss scale, clipping and NaN skip."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from muxtune.executor.peft.base import Adapter, Place, make_adapter
from muxtune.executor.reports import HISTORY, Array, StepReport, step_reports
from muxtune.executor.stage import StageModel
from muxtune.spec.schedule import learning_rate
from muxtune.spec.task import Task

MOMENTUM = 0.9
#: A growing loss scale stays between these; both are ours.
MIN_LOSS_SCALE, MAX_LOSS_SCALE = 2.0**-16, 2.0**24


@dataclass(slots=True)
class TaskState:
    """Adapters keyed by (layer, BaseOp). `skips` are the steps left out because a gradient was not finite.

    Steps are counted from 0, skipped ones included. From `last_step` on nothing is stepped or recorded: the task has finished
    (None: it goes on whatever its `steps`, as measurements want it). `good_steps` counts those since the loss scale moved.
    """

    task: Task
    adapters: dict[tuple[int, str], Adapter]
    replicated: tuple[torch.nn.Parameter, ...]
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    skips: list[int] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    loss_scale: float = 1.0
    good_steps: int = 0
    last_step: int | None = None

    @property
    def steps(self) -> int:
        """Steps so far, skipped ones included."""
        return len(self.gradient_norms)

    def add_loss(self, loss: float) -> None:
        """Record the loss of a step, unless the task has finished."""
        if self.last_step is None or len(self.losses) < self.last_step:
            self.losses.append(loss)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return learning_rate(self.task.schedule, self.task.learning_rate, step, self.task.steps)

    def reports(self, first: int) -> list[StepReport]:
        """What happened in the steps from `first` on."""
        return step_reports(self.task, {name: getattr(self, name) for name in HISTORY}, first)

    def __post_init__(self) -> None:
        # A dropout draws anew in each step: adapters ask their task how many it has taken.
        for adapter in self.adapters.values():
            adapter.steps_taken = lambda: len(self.gradient_norms)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Every trainable tensor of the task on this rank, in a fixed order."""
        return [p for _, p in self.named()]

    def named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters by name `layer.target.tensor`, in a fixed order."""
        for (layer, target), adapter in sorted(self.adapters.items()):
            for name, parameter in adapter.named_parameters():
                yield f"{layer}.{target}.{name}", parameter

    def state(self) -> dict[str, Array]:
        """Copies of the parameters by name."""
        return {name: as_array(p) for name, p in self.named()}

    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors by `kind/parameter`, such as `exp_avg/0.qkv.a`; empty before the first step."""
        found = self.optimizer.state
        return {
            f"{kind}/{name}": value
            for name, parameter in self.named()
            for kind, value in found.get(parameter, {}).items()
            if isinstance(value, torch.Tensor)
        }

    def gradients(self) -> dict[str, Array]:
        """Copies of the accumulated gradients by name; parameters without one are left out."""
        return {name: as_array(p.grad) for name, p in self.named() if p.grad is not None}


def as_array(tensor: torch.Tensor) -> Array:
    """A copy that can travel between processes."""
    array: Array = tensor.detach().float().cpu().numpy().copy()
    return array


def register_task(stage: StageModel, task: Task, seed: int) -> TaskState:
    """Create a task's adapters on a stage and hang them into its banks; initial values depend on seed, task and place only."""
    adapters: dict[tuple[int, str], Adapter] = {}
    replicated: list[torch.nn.Parameter] = []
    for (layer, target), bank in sorted(stage.banks.items()):
        if target not in task.peft.targets:
            continue
        key = zlib.crc32(f"{seed} {task.task_id} {layer} {target}".encode())
        generator = torch.Generator().manual_seed(key)
        place = Place(
            features=bank.features,
            column_parallel=bank.column_parallel,
            tp=stage.layout.tp,
            tp_rank=stage.tp_rank,
            device=stage.device,
            blocks=bank.blocks,
            weight=bank.weight,
            bias=bank.bias,
            late_bias=bank.late_bias,
            group=stage.peers.tp,
            key=key,
        )
        adapter = make_adapter(task.peft, place, generator)
        bank.adapters[task.task_id] = adapter
        adapters[layer, target] = adapter
        replicated += adapter.replicated()
    parameters = [p for key in sorted(adapters) for p in adapters[key].parameters()]
    return TaskState(
        task=task,
        adapters=adapters,
        replicated=tuple(replicated),
        optimizer=make_optimizer(task, parameters),
        loss_scale=task.loss_scale,
    )


def make_optimizer(task: Task, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """`adamw`, or `sgd` with momentum 0.9; the rate is set anew before each step."""
    common: dict[str, Any] = {"lr": task.learning_rate, "weight_decay": task.weight_decay, "foreach": True}
    if task.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=MOMENTUM, **common)
    return torch.optim.AdamW(parameters, **common)


def hang(state: TaskState, stage: StageModel) -> None:
    """Put a task's adapters into the banks of a stage of the same layers."""
    for key, adapter in state.adapters.items():
        stage.banks[key].adapters[state.task.task_id] = adapter


def take_down(task_id: str, stages: Iterable[StageModel]) -> None:
    """Take a task's adapters out of every bank."""
    for stage in stages:
        for bank in stage.banks.values():
            bank.adapters.pop(task_id, None)


def step_task(state: TaskState, layout_tp: int, group: Any | None) -> None:
    """Clip by the norm over all ranks of the instance and step; a gradient that is not finite skips the step.

    `group` is the process group of one replica, None where it has one rank. Gradients were summed before
    (`peers.sum_gradients`); the norm counts those that tp ranks hold whole once.
    """
    if state.last_step is None or state.steps < state.last_step:
        norm = _gradient_norm(state, layout_tp, group)
        finite = math.isfinite(norm)
        if finite:
            if norm > state.task.clip_norm:
                torch._foreach_mul_(_gradients(state), state.task.clip_norm / (norm + 1e-6))
            for options in state.optimizer.param_groups:
                options["lr"] = state.rate(state.steps)
            state.optimizer.step()
        else:
            state.skips.append(state.steps)
        state.gradient_norms.append(norm)
        state.scales.append(state.loss_scale)
        _move_scale(state, finite)
    state.optimizer.zero_grad(set_to_none=True)


def _gradients(state: TaskState) -> list[torch.Tensor]:
    return [p.grad for p in state.parameters if p.grad is not None]


def _gradient_norm(state: TaskState, layout_tp: int, group: Any | None) -> float:
    """Take the loss scale out of a task's gradients, and return their norm over the replica."""
    gradients = _gradients(state)
    if state.loss_scale != 1.0:
        torch._foreach_mul_(gradients, 1.0 / state.loss_scale)
    squares = torch.stack(torch._foreach_norm(gradients)).square().sum() if gradients else torch.zeros(())
    if layout_tp > 1 and state.replicated:
        whole = (
            torch.stack(torch._foreach_norm([p.grad for p in state.replicated if p.grad is not None])).square().sum()
        )
        squares = squares - whole * (1 - 1 / layout_tp)
    if group is not None:
        torch.distributed.all_reduce(squares, group=group)
    return float(squares.sqrt())


def _move_scale(state: TaskState, finite: bool) -> None:
    """Double the loss scale after enough good steps in a row, halve it at a skipped one; every rank saw the same norm."""
    growth_steps = state.task.loss_scale_growth_steps
    if not growth_steps:
        return
    state.good_steps = state.good_steps + 1 if finite else 0
    if not finite:
        state.loss_scale = max(MIN_LOSS_SCALE, state.loss_scale / 2)
    elif state.good_steps == growth_steps:
        state.loss_scale, state.good_steps = min(MAX_LOSS_SCALE, state.loss_scale * 2), 0
