"""TaskState: one task's adapters on one rank, their optimizer, clipping and NaN skip."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from muxtune.executor.peft.base import Adapter, Place, make_adapter
from muxtune.executor.stage import StageModel
from muxtune.spec.task import Task

Array = NDArray[np.float32]


@dataclass(slots=True)
class TaskState:
    """Adapters keyed by (layer, BaseOp). `skipped` counts steps that were left out because a gradient was not finite."""

    task: Task
    adapters: dict[tuple[int, str], Adapter]
    replicated: tuple[torch.nn.Parameter, ...]
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    skipped: int = 0

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
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {task.task_id} {layer} {target}".encode()))
        place = Place(
            features=bank.features,
            column_parallel=bank.column_parallel,
            tp=stage.layout.tp,
            tp_rank=stage.tp_rank,
            device=stage.device,
        )
        adapter = make_adapter(task.peft, place, generator)
        bank.adapters[task.task_id] = adapter
        adapters[layer, target] = adapter
        replicated += adapter.replicated()
    parameters = [p for key in sorted(adapters) for p in adapters[key].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=task.weight_decay, foreach=True)
    return TaskState(task=task, adapters=adapters, replicated=tuple(replicated), optimizer=optimizer)


def step_task(state: TaskState, layout_tp: int, group: Any | None) -> None:
    """Clip by the norm over all ranks of the instance and step; a gradient that is not finite skips the step.

    `group` is the process group of one replica, None where it has one rank. Gradients were summed before
    (`peers.sum_gradients`); the norm counts those that tp ranks hold whole once.
    """
    gradients = [p.grad for p in state.parameters if p.grad is not None]
    squares = torch.stack(torch._foreach_norm(gradients)).square().sum() if gradients else torch.zeros(())
    if layout_tp > 1:
        whole = (
            torch.stack(torch._foreach_norm([p.grad for p in state.replicated if p.grad is not None])).square().sum()
        )
        squares = squares - whole * (1 - 1 / layout_tp)
    if group is not None:
        torch.distributed.all_reduce(squares, group=group)
    norm = float(squares.sqrt())
    state.gradient_norms.append(norm)
    if norm != norm or norm == float("inf"):
        state.skipped += 1
    else:
        if norm > state.task.clip_norm:
            torch._foreach_mul_(gradients, state.task.clip_norm / (norm + 1e-6))
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
