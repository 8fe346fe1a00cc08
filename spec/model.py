"""ModelSpec: the shapes of a dense decoder backbone; presets are entries of data/models.json."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Literal

from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.noun import noun
from muxtune.spec.units import DTYPE_BYTES

PRESETS = Path(__file__).parent / "data" / "models.json"


@noun
class ModelSpec:
    """A dense decoder-only transformer (LLaMA-like or GPT-2-like).

    Shapes are in elements; `head_dim` may differ from hidden/heads (Gemma). `biases` says which linears have one:
    none, qkv only (Qwen2), or all (GPT-2, OPT). `activation` swiglu and geglu are gated: fc1 is twice as wide; gelu_tanh is
    GPT-2's approximation of gelu.
    """

    name: str
    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu"] = "swiglu"
    positions: Literal["rope", "learned", "none"] = "rope"
    biases: Literal["none", "qkv", "all"] = "none"
    tied_embeddings: bool = False
    rope_base: int = 10_000
    norm_epsilon: float = 1e-5
    dtype: Literal["fp32", "fp16", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "ffn_hidden", "heads", "kv_heads", "head_dim", "vocab", "max_positions"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.positions == "rope" and (self.head_dim % 2 or self.rope_base < 1):
            raise ValueError(
                f"head_dim={self.head_dim}, rope_base={self.rope_base}: rope needs an even head_dim, a base above 0"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads}: must divide heads={self.heads}")

    @property
    def gated(self) -> bool:
        """Whether fc1 holds gate and up side by side."""
        return self.activation in ("swiglu", "geglu")

    @property
    def qkv_out(self) -> int:
        """Output features of the fused qkv linear."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def fc1_out(self) -> int:
        """Output features of fc1."""
        return self.ffn_hidden * (2 if self.gated else 1)

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation element."""
        return DTYPE_BYTES[self.dtype]

    def linear_shape(self, target: str) -> tuple[int, int]:
        """(in, out) features of a BaseOp: qkv, proj, fc1 or fc2."""
        attention = self.heads * self.head_dim
        shapes = {
            "qkv": (self.hidden, self.qkv_out),
            "proj": (attention, self.hidden),
            "fc1": (self.hidden, self.fc1_out),
            "fc2": (self.ffn_hidden, self.hidden),
        }
        return shapes[target]

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, norms and biases included."""
        linears = [self.linear_shape(t) for t in ("qkv", "proj", "fc1", "fc2")]
        count = sum(i * o for i, o in linears) + 2 * self._norm_parameters
        if self.biases == "all":
            count += sum(o for _, o in linears)
        elif self.biases == "qkv":
            count += self.qkv_out
        return count

    @property
    def embedding_parameters(self) -> int:
        """Parameters of token (and learned position) embeddings."""
        return self.vocab * self.hidden + (self.max_positions * self.hidden if self.positions == "learned" else 0)

    @property
    def head_parameters(self) -> int:
        """Parameters of final norm and output layer; a tied output layer is not counted twice."""
        return self._norm_parameters + (0 if self.tied_embeddings else self.vocab * self.hidden)

    @property
    def parameters(self) -> int:
        """All parameters of the backbone."""
        return self.layers * self.layer_parameters + self.embedding_parameters + self.head_parameters

    @property
    def _norm_parameters(self) -> int:
        return self.hidden * (2 if self.norm == "layernorm" else 1)


@cache
def model_presets() -> dict[str, ModelSpec]:
    """Every preset of data/models.json by name."""
    rows = json.loads(PRESETS.read_text(encoding="utf-8"))
    return {name: ModelSpec(name=name, **row) for name, row in rows.items()}


def model_preset(name: str) -> ModelSpec:
    """One preset.

    Raises:
        UnknownKeyError: no preset has this name.
    """
    presets = model_presets()
    if name not in presets:
        raise UnknownKeyError("model", name, presets)
    return presets[name]


def require_layers(model: ModelSpec, pp: int) -> None:
    """Refuse a pipeline with more stages than layers."""
    if pp > model.layers:
        raise InputError(f"pp={pp}: model {model.name} has only {model.layers} layers; use pp <= {model.layers}")
