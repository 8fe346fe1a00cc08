"""Runs inside a worker: a batch through a whole stage, node by node, so that what blocks and stage cost is measured where it is.

Parts are named `forward` and `backward` (all nodes), and `forward.attention`, `backward.mlp` … (the nodes of such blocks).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from muxtune.executor.data import BatchTensors, batch_tensors, noise_source
from muxtune.executor.passage import Passage
from muxtune.executor.solo import drawn_weights
from muxtune.executor.stage import StageModel
from muxtune.executor.tasks import register_task
from muxtune.profiler.cases import Case, block_of, passage_batch, passage_stage
from muxtune.profiler.clocks import Part, timed
from muxtune.spec.model import ModelSpec
from muxtune.spec.task import Task


@cache
def _stage(model: ModelSpec, task: Task, kind: tuple[int, ...], device: torch.device) -> StageModel:
    """One stage of each kind is enough for all sizes."""
    layout, stage = passage_stage(model, kind)
    holder = StageModel(model, layout, stage, 0, device, seed=0, weights=drawn_weights(model, device))
    register_task(holder, task, seed=0)
    return holder


def build_passage(model: ModelSpec, task: Task, case: Case, device: torch.device) -> Callable[[], list[Part]]:
    """The runner of a passage case: forward and backward of one batch of one task, gradients thrown away."""
    stage = _stage(model, task, case.shape, device)
    tensors = batch_tensors(passage_batch(task, case.size[0]), noise_source(model.vocab), device)
    shape, dtype = (case.size[0], 1, model.hidden), next(stage.gpt.parameters()).dtype
    first, last = case.shape
    received = None if first else torch.randn(shape, dtype=dtype, device=device)
    gradient = None if last else torch.randn(shape, dtype=dtype, device=device)
    return partial(_run, stage, task.task_id, tensors, received, gradient)


def _run(
    stage: StageModel, task: str, tensors: BatchTensors, received: Tensor | None, gradient: Tensor | None
) -> list[Part]:
    passage = stage.begin(tensors, received)
    totals: dict[str, list[int]] = {}
    for direction in ("forward", "backward"):
        if direction == "backward":
            passage.gradient = gradient
        for subgraph in stage.subgraphs[direction]:
            (_, wall_ns, cpu_ns), _ = timed(direction, _node(stage, passage, direction, subgraph.index, task))
            block = block_of(stage.layout, stage.stage, subgraph)
            for name in (direction, f"{direction}.{block}") if block else (direction,):
                total = totals.setdefault(name, [0, 0])
                total[0] += wall_ns
                total[1] += cpu_ns
    for bank in stage.banks.values():
        for adapter in bank.adapters.values():
            adapter.zero_grad(set_to_none=True)
    return [(name, wall_ns, cpu_ns) for name, (wall_ns, cpu_ns) in totals.items()]


def _node(stage: StageModel, passage: Passage, direction: str, index: int, task: str) -> Callable[[], None]:
    if direction == "forward":
        return partial(stage.forward, passage, index, {task: 1})
    return partial(stage.backward, passage, index)
