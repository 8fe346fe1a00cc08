"""config.json of a Hugging Face model → ModelSpec; what the executor would compute otherwise is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.model import ModelSpec

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
#: Names of activations there → here.
ACTIVATIONS = {
    "silu": "swiglu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def read_config(folder: Path) -> Mapping[str, Any]:
    """The folder's config.json.

    Raises:
        InputError: none there, or no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: holds no config.json: give the folder of a Hugging Face model")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: is not JSON: {error.msg}") from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise InputError(f"{path}: model_type is missing: give the config of a Hugging Face model")
    return found


def read_model(folder: Path) -> ModelSpec:
    """Shapes of the model in a folder.

    Raises:
        UnknownKeyError: an architecture that is not known. InputError: a setting that the executor does not have.
    """
    config = read_config(folder)
    name = config["model_type"]
    if name not in SHAPES:
        raise UnknownKeyError("architecture", name, SHAPES)
    place = folder / "config.json"
    shapes = SHAPES[name](config)
    _refuse(place, config, name)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise InputError(f"{place}: dtype {dtype!r}: known are {', '.join(DTYPES)}")
    try:
        return ModelSpec(name=folder.resolve().name, vocab=config["vocab_size"], dtype=DTYPES[dtype], **shapes)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{place}: {error}") from error


def _llama(c: Mapping[str, Any]) -> dict[str, Any]:
    rope = c.get("rope_parameters") or {}
    biases = "qkv" if c["model_type"] == "qwen2" or c.get("attention_bias") else "none"
    return {
        "layers": c["num_hidden_layers"],
        "hidden": c["hidden_size"],
        "ffn_hidden": c["intermediate_size"],
        "heads": c["num_attention_heads"],
        "kv_heads": c.get("num_key_value_heads") or c["num_attention_heads"],
        "head_dim": c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        "max_positions": c["max_position_embeddings"],
        "activation": ACTIVATIONS.get(c.get("hidden_act", "silu"), ""),
        "biases": biases,
        "tied_embeddings": bool(c.get("tie_word_embeddings", False)),
        "rope_base": round(rope.get("rope_theta") or c.get("rope_theta") or 10_000),
        "norm_epsilon": c.get("rms_norm_eps", 1e-6),
    }


def _gpt2(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "layers": c["n_layer"],
        "hidden": c["n_embd"],
        "ffn_hidden": c.get("n_inner") or 4 * c["n_embd"],
        "heads": c["n_head"],
        "kv_heads": c["n_head"],
        "head_dim": c["n_embd"] // c["n_head"],
        "max_positions": c["n_positions"],
        "activation": ACTIVATIONS.get(c.get("activation_function", "gelu_new"), ""),
        "norm_epsilon": c.get("layer_norm_epsilon", 1e-5),
        **LEARNED,
    }


def _opt(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "layers": c["num_hidden_layers"],
        "hidden": c["hidden_size"],
        "ffn_hidden": c["ffn_dim"],
        "heads": c["num_attention_heads"],
        "kv_heads": c["num_attention_heads"],
        "head_dim": c["hidden_size"] // c["num_attention_heads"],
        "max_positions": c["max_position_embeddings"],
        "activation": ACTIVATIONS.get(c.get("activation_function", "relu"), ""),
        **LEARNED,
    }


LEARNED = {"norm": "layernorm", "positions": "learned", "biases": "all", "tied_embeddings": True}
SHAPES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2"), _llama),
    "gpt2": _gpt2,
    "opt": _opt,
}


def _refuse(place: Path, config: Mapping[str, Any], name: str) -> None:
    """Settings under which the executor would compute something else."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    act = config.get("hidden_act") or config.get("activation_function") or "silu"
    width = config.get("hidden_size")
    window = config.get("sliding_window") if config.get("use_sliding_window", name == "mistral") else None
    wrong = {
        f"rope scaling {kind!r}": kind != "default",
        f"activation {act!r}": act not in ACTIVATIONS,
        f"sliding window of {window}": window is not None and window < config.get("max_position_embeddings", 0),
        "mlp_bias": bool(config.get("mlp_bias")),
        "attention_bias on the output": name != "qwen2" and bool(config.get("attention_bias")),
        "layer norm after the block": config.get("do_layer_norm_before") is False,
        "an embedding of its own width": config.get("word_embed_proj_dim", width) != width,
        "untied embeddings": name in ("gpt2", "opt") and config.get("tie_word_embeddings") is False,
        "attention scaled by layer": bool(config.get("scale_attn_by_inverse_layer_idx")),
    }
    for what, is_so in wrong.items():
        if is_so:
            raise InputError(f"{place}: {what} is not supported: choose a model without it")
