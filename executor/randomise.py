"""Random adapters for tests, equal under every layout: each rank cuts its shard from the same whole."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from muxtune.executor.peft.base import Place
from muxtune.executor.tasks import TaskState

SCALE = 0.05


def randomise(tasks: Mapping[str, TaskState], gated: bool) -> None:
    """Give every parameter a random value (B too), so that every gradient is different from zero.

    `gated`: the model's fc1 is [gate; up], of which a tp rank holds a part of each.
    """
    for task, state in sorted(tasks.items()):
        for (layer, target), adapter in sorted(state.adapters.items()):
            whole = {id(p) for p in adapter.replicated()}
            for name, parameter in adapter.named_parameters():
                seed = zlib.crc32(f"{task} {layer} {target} {name}".encode())
                generator = torch.Generator().manual_seed(seed)
                shards = 1 if id(parameter) in whole else adapter.place.tp
                halves = 2 if gated and target == "fc1" else 1
                parameter.copy_(_shard(parameter, adapter.place, shards, halves, generator) * SCALE)


def _shard(parameter: Tensor, place: Place, shards: int, halves: int, generator: torch.Generator) -> Tensor:
    """This rank's part of a random whole; the sharded axis is the one as wide as the BaseOp's sharded side."""
    if shards == 1:
        return torch.randn(parameter.shape, generator=generator)
    axis = list(parameter.shape).index(place.features[1 if place.column_parallel else 0])
    shape = [n * shards if i == axis else n for i, n in enumerate(parameter.shape)]
    parts = torch.randn(shape, generator=generator).chunk(halves, axis)
    return torch.cat([part.chunk(shards, axis)[place.tp_rank] for part in parts], axis)
