"""Functions that tests call inside a worker process (`Call(function="in_worker:…")`, with this folder on its path)."""

from __future__ import annotations

import os
import zlib
from typing import Any

import torch

from muxtune.executor.randomise import randomise

COLUMN_BIASES = ("linear_qkv.bias", "linear_fc1.bias")


def give_biases(worker: Any, name: str) -> int:
    """Random values for every bias and norm weight of a loaded plan, the same under every layout; how many there were."""
    count = 0
    for stage in worker.loaded[name].stages.values():
        layout, first = stage.layout, stage.layout.layers_of(stage.stage)[0]
        for local, parameter in stage.gpt.named_parameters():
            if parameter.dim() > 1:
                continue
            parts = local.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + first)
            shards = layout.tp if local.endswith(COLUMN_BIASES) else 1
            generator = torch.Generator().manual_seed(zlib.crc32(".".join(parts).encode()))
            whole = torch.randn(parameter.numel() * shards, generator=generator) * 0.1
            whole += 0.0 if local.endswith("bias") else 1.0
            parameter.copy_(whole.chunk(shards)[stage.tp_rank if shards > 1 else 0])
            count += 1
    return count


def fall(worker: Any) -> None:
    """Die, with a warning and a reason in the log."""
    os.write(2, b"x.py:1: UserWarning: nothing to see here\n  warnings.warn(x)\nterminate: out of luck\n")
    os._exit(7)


def give_adapters(worker: Any, name: str) -> None:
    """Random values for every adapter of a loaded plan, the same under every layout."""
    loaded = worker.loaded[name]
    randomise(loaded.tasks, loaded.run.bound.plan.workload.model.gated)
