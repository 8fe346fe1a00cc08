"""LoRA adapters in the format of Hugging Face `peft`: adapter_config.json and adapter_model.safetensors.

W x + (alpha / r) · B (A x): a fused qkv (or gate and up) becomes one adapter a module, each with the whole A and its rows of B.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from muxtune.executor.hf.backbone import split_qkv
from muxtune.executor.hf.families import Family
from muxtune.spec.errors import InputError
from muxtune.spec.files import write_text
from muxtune.spec.model import ModelSpec
from muxtune.spec.peft import PeftSpec
from muxtune.spec.peft.lora import LoRA

Shards = Sequence[Mapping[str, NDArray[np.float32]]]
COLUMN_PARALLEL = ("qkv", "fc1")


def export_lora(folder: Path, peft: PeftSpec, model: ModelSpec, family: Family, shards: Shards, base: str) -> None:
    """Write one task's adapter. `shards` has the parameters `layer.target.a` and `.b` of each tp rank, of all layers.

    `base` is the name or folder of the backbone that the config names.

    Raises:
        InputError: not a LoRA.
    """
    if not isinstance(peft, LoRA):
        raise InputError(f"peft kind {peft.kind}: only lora has the format of Hugging Face peft here")
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": value
        for layer in range(model.layers)
        for target in peft.targets
        for module, side, value in _modules(layer, target, model, family, shards)
    }
    modules = sorted({name for target in peft.targets for name in family.layer[target]})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": peft.rank,
        "lora_alpha": peft.alpha,
        "lora_dropout": peft.dropout,
        "target_modules": modules,
        "fan_in_fan_out": family.transposed,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "adapter_model.safetensors.part"
    save_file({k: v.contiguous() for k, v in sorted(tensors.items())}, part)
    os.replace(part, folder / "adapter_model.safetensors")
    write_text(folder / "adapter_config.json", json.dumps(config, indent=1) + "\n")


def _modules(
    layer: int, target: str, model: ModelSpec, family: Family, shards: Shards
) -> Iterator[tuple[str, str, Tensor]]:
    """(module, A or B, tensor) of the modules that a BaseOp is there."""
    parts = [{side: torch.as_tensor(shard[f"{layer}.{target}.{side}"]) for side in "ab"} for shard in shards]
    if target in COLUMN_PARALLEL:
        a, b = parts[0]["a"], _joined_rows([p["b"] for p in parts], model.gated and target == "fc1")
    else:
        a, b = torch.cat([p["a"] for p in parts], dim=1), parts[0]["b"]
    names = family.modules(layer, target)
    rows = _split(b, target, model)
    if len(names) == 1:
        rows = (torch.cat(rows),)
    for name, own in zip(names, rows, strict=True):
        yield name, "A", a.clone()
        yield name, "B", own


def _joined_rows(parts: Sequence[Tensor], gated: bool) -> Tensor:
    """Rows of all ranks; of a gated fc1 every rank has [gate; up] of its own columns."""
    halves = [p.chunk(2 if gated else 1) for p in parts]
    return torch.cat([torch.cat(side) for side in zip(*halves, strict=True)])


def _split(b: Tensor, target: str, model: ModelSpec) -> tuple[Tensor, ...]:
    if target == "qkv":
        return split_qkv(b, model)
    return tuple(b.chunk(2)) if target == "fc1" and model.gated else (b,)
