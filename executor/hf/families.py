"""How Hugging Face names and lays out the weights of an architecture, against Megatron's names (weights are (out, in) here).

Megatron's fused qkv holds, for each group of query heads: its queries, its key, its value. A gated fc1 is [gate; up].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.model import ModelSpec

#: Part of a layer → its name in Megatron.
PARTS = {
    "norm1": "input_layernorm",
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "norm2": "pre_mlp_layernorm",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
MEGATRON = {name: part for part, name in PARTS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture. `layer` maps our parts to modules below `layers`.N; qkv and fc1 may be several modules, joined.

    `transposed` linears are stored (in, out). The first `position_offset` rows of the position table are never used.
    """

    name: str
    embedding: str
    positions: str = ""
    final_norm: str
    head: str
    layers: str
    layer: Mapping[str, tuple[str, ...]]
    transposed: bool = False
    position_offset: int = 0

    def modules(self, layer: int, part: str) -> tuple[str, ...]:
        """Full names of the modules that a part of a layer is made of."""
        return tuple(f"{self.layers}.{layer}.{name}" for name in self.layer[part])


LLAMA_LAYER = {
    "norm1": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "proj": ("self_attn.o_proj",),
    "norm2": ("post_attention_layernorm",),
    "fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "fc2": ("mlp.down_proj",),
}


def _llama(name: str) -> Family:
    return Family(
        name=name,
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        layers="model.layers",
        layer=LLAMA_LAYER,
    )


GPT2 = Family(
    name="gpt2",
    embedding="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    head="lm_head",
    layers="transformer.h",
    layer={
        "norm1": ("ln_1",),
        "qkv": ("attn.c_attn",),
        "proj": ("attn.c_proj",),
        "norm2": ("ln_2",),
        "fc1": ("mlp.c_fc",),
        "fc2": ("mlp.c_proj",),
    },
    transposed=True,
)

OPT = Family(
    name="opt",
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    layers="model.decoder.layers",
    layer={
        "norm1": ("self_attn_layer_norm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "proj": ("self_attn.out_proj",),
        "norm2": ("final_layer_norm",),
        "fc1": ("fc1",),
        "fc2": ("fc2",),
    },
    position_offset=2,
)

FAMILIES = {f.name: f for f in (*map(_llama, ("llama", "mistral", "qwen2")), GPT2, OPT)}


def family(name: str) -> Family:
    """The architecture that a `config.json` calls `model_type`.

    Raises:
        UnknownKeyError: none that is known here.
    """
    if name not in FAMILIES:
        raise UnknownKeyError("architecture", name, FAMILIES)
    return FAMILIES[name]


def family_of(model: ModelSpec) -> Family:
    """The architecture that a backbone's shapes belong to.

    Raises:
        InputError: Hugging Face has no architecture of these shapes among those known here.
    """
    if (model.norm, model.positions, model.activation) == ("rmsnorm", "rope", "swiglu") and model.biases != "all":
        return FAMILIES["qwen2" if model.biases == "qkv" else "llama"]
    if (model.norm, model.positions, model.biases) == ("layernorm", "learned", "all") and not model.gated:
        return OPT if model.activation == "relu" else GPT2
    raise InputError(
        f"model {model.name}: norm={model.norm}, positions={model.positions}, activation={model.activation}, "
        f"biases={model.biases} belong to no architecture of {', '.join(FAMILIES)}"
    )
