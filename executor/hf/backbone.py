"""Weights of a Hugging Face folder (one safetensors file or shards with an index) under Megatron's names, unsharded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from muxtune.executor.hf.families import MEGATRON, Family, family
from muxtune.spec.errors import InputError
from muxtune.spec.hf_config import read_config, read_model
from muxtune.spec.model import ModelSpec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class HfBackbone:
    """Reads tensors one by one, so that no more than one is held beside the model."""

    def __init__(self, folder: Path, model: ModelSpec) -> None:
        """
        Raises:
            InputError: no weights there, or another model than `model` (names of the presets may differ).
        """
        self.folder, self.model = folder, model
        self.family: Family = family(read_config(folder)["model_type"])
        require_same(folder, model)
        self.files = _files(folder)

    def full(self, name: str) -> Tensor:
        """A whole tensor by its Megatron name with a global layer number; its dtype is the file's.

        Raises:
            InputError: the folder lacks it.
        """
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            tied = self.model.tied_embeddings or name.startswith("embedding")
            return self._read(f"{self.family.embedding if tied else self.family.head}.weight")
        if name == "embedding.position_embeddings.weight":
            return self._read(f"{self.family.positions}.weight")[self.family.position_offset :]
        if name.startswith("decoder.final_layernorm."):
            return self._read(f"{self.family.final_norm}.{name.rsplit('.', 1)[1]}")
        _, _, layer, *middle, kind = name.split(".")
        part = MEGATRON[".".join(middle)]
        pieces = [self._linear(m, kind, part) for m in self.family.modules(int(layer), part)]
        if part == "qkv":
            return fuse_qkv(pieces, self.model)
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _linear(self, module: str, kind: str, part: str) -> Tensor:
        found = self._read(f"{module}.{kind}")
        flip = self.family.transposed and kind == "weight" and not part.startswith("norm")
        return found.T.contiguous() if flip else found

    def _read(self, name: str) -> Tensor:
        """A tensor by its name there; a base model saved alone lacks the first part of every name."""
        for key in (name, name.split(".", 1)[1]):
            if key in self.files:
                path = self.files[key]
                try:
                    with safe_open(path, framework="pt") as file:
                        return file.get_tensor(key)  # type: ignore[no-any-return]
                except (SafetensorError, OSError) as error:
                    raise InputError(f"{path}: cannot be read: {error}: download it again") from error
        raise InputError(f"{self.folder}: has no tensor {name}: the weights are not those of its config.json")


def require_same(folder: Path, model: ModelSpec) -> None:
    """Refuse a folder whose model has other shapes than the plan's; name and dtype may differ.

    Raises:
        InputError: which field differs.
    """
    found = read_model(folder)
    for field in ModelSpec.__dataclass_fields__:
        here, planned = getattr(found, field), getattr(model, field)
        if field not in ("name", "dtype") and here != planned:
            raise InputError(
                f"{folder}: its model has {field}={here}, the plan's {model.name} has {planned}: "
                f"plan with `model: {folder}`, or give the weights that were planned for"
            )


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name → its file."""
    if (folder / INDEX).is_file():
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        missing = sorted({s for s in shards.values() if not (folder / s).is_file()})
        if missing:
            raise InputError(f"{folder}: shard {missing[0]} is missing ({len(missing)} in all): download it again")
        return {name: folder / shard for name, shard in shards.items()}
    if not (folder / SINGLE).is_file():
        raise InputError(f"{folder}: holds neither {SINGLE} nor {INDEX}: save the model as safetensors")
    try:
        with safe_open(folder / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / SINGLE}: cannot be read: {error}: download it again") from error


def fuse_qkv(pieces: list[Tensor], model: ModelSpec) -> Tensor:
    """Megatron's rows: a group after the other, each its queries, key and value; from (q, k, v) or one stacked [q; k; v]."""
    sizes = [model.heads * model.head_dim, *[model.kv_heads * model.head_dim] * 2]
    q, k, v = pieces if len(pieces) == 3 else pieces[0].split(sizes)
    groups = model.kv_heads
    rest = q.shape[1:]
    parts = [x.reshape(groups, -1, *rest) for x in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *rest)


def split_qkv(fused: Tensor, model: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `fuse_qkv`."""
    share = model.heads // model.kv_heads * model.head_dim
    rest = fused.shape[1:]
    groups = fused.reshape(model.kv_heads, -1, *rest)
    q, k, v = groups.split([share, model.head_dim, model.head_dim], dim=1)
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)
