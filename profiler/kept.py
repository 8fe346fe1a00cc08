"""What a layer really keeps from forward to backward: distinct storages that autograd saves; and what shapes predict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from muxtune.executor.data import batch_tensors, noise_source
from muxtune.executor.stage import StageModel
from muxtune.profiler.cases import one_task_batch
from muxtune.spec.catalogue import StageContext
from muxtune.spec.footprint import exact_bytes
from muxtune.spec.noun import noun
from muxtune.spec.task import Task
from muxtune.spec.tensors import layer_tensors


@noun
class Kept:
    """Bytes that the last layer of a stage keeps for a batch, measured by piece and predicted from shapes."""

    tokens: int
    pieces: tuple[tuple[str, int], ...]
    predicted_bytes: int

    @property
    def measured_bytes(self) -> int:
        """Of all pieces of the layer."""
        return sum(size_bytes for _, size_bytes in self.pieces)

    @property
    def error(self) -> float:
        """predicted / measured − 1."""
        return self.predicted_bytes / self.measured_bytes - 1


def layer_kept(stage: StageModel, task: Task, rows: int, length: int) -> Kept:
    """Run rows of one registered task forward through a whole-model stage and see what is saved for the backward."""
    batch = one_task_batch(task, rows, length)
    passage = stage.begin(batch_tensors(batch, noise_source(stage.model.vocab), stage.device), None)
    known = {p.untyped_storage().data_ptr() for p in stage.gpt.parameters()}
    for bank in stage.banks.values():
        known |= {p.untyped_storage().data_ptr() for a in bank.adapters.values() for p in a.parameters()}
    found: dict[int, tuple[str, int, Tensor]] = {}
    here: dict[str, Any] = {}

    def pack(x: Tensor) -> Tensor:
        # The tensor is kept, so that no other storage can take its place in memory meanwhile.
        place = x.untyped_storage().data_ptr()
        if place not in known:
            found.setdefault(place, (here["piece"], x.untyped_storage().nbytes(), x))
        return x

    last = max(stage.layers)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for subgraph in stage.subgraphs["forward"]:
            for piece in subgraph.pieces:
                here["piece"] = piece.name if piece.layer == last else ""
                stage.forward_piece(passage, piece, {task.task_id: 1})
    pieces: dict[str, int] = {}
    for name, size_bytes, _ in found.values():
        if name:
            pieces[name] = pieces.get(name, 0) + size_bytes
    context = StageContext(
        model=stage.model, layout=stage.layout, stage=stage.stage, adapters=((task.task_id, task.peft),)
    )
    predicted = exact_bytes(layer_tensors(context, batch))
    return Kept(tokens=batch.tokens, pieces=tuple(pieces.items()), predicted_bytes=predicted)
