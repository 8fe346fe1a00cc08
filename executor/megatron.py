"""The one door of Megatron-core: one pipeline stage of a GPTModel with multiplexed linears.

The layer spec comes from a provider subclass. Collectives of the parallel linears are lifted out: a linear returns its
rank's partial result and the stage runs the collective as a node of its own (executor/stage.py).
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from muxtune.executor.adapters import AdapterBank
from muxtune.executor.attention import Attending, attend
from muxtune.executor.layer_spec import layer_spec_here
from muxtune.executor.peers import ALONE, Alone, Peers
from muxtune.spec.catalogue import shard
from muxtune.spec.layout import Layout
from muxtune.spec.model import ModelSpec
from muxtune.spec.peft import COLUMN_PARALLEL

with warnings.catch_warnings():
    # Megatron warns that Apex and Transformer Engine are absent and falls back to torch, which is what we want here.
    warnings.simplefilter("ignore")
    LAYER_SPEC = layer_spec_here()  # first: a broken Transformer Engine would break the imports below
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: Megatron's name of each BaseOp.
LINEARS = {"qkv": "linear_qkv", "proj": "linear_proj", "fc1": "linear_fc1", "fc2": "linear_fc2"}


class Weights(Protocol):
    """Where a backbone's weights come from, by Megatron's names with global layer numbers."""

    def full(self, name: str) -> Tensor:
        """The whole tensor of a name."""
        ...


class RaggedAttention(MegatronModule):  # type: ignore[misc]
    """Attention that never crosses a sequence. Megatron hands `attention_mask` through untouched: here it is an `Attending`."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Attending, **unused: Any) -> Tensor:
        return attend(query, key, value, attention_mask, self.scale)


def _multiplexed(base: type[Any], column_parallel: bool) -> type[Any]:
    class Multiplexed(base):  # type: ignore[misc]
        """A parallel linear that returns its partial result with the bank's adapters added; no collective inside."""

        bank: AdapterBank | None = None

        def forward(self, input_: Tensor, *unused: Any, **also_unused: Any) -> tuple[Tensor, Tensor | None]:
            bias = self.bias if column_parallel and not self.skip_bias_add else None
            flat = input_.reshape(-1, input_.size(-1))
            if self.bank is not None:
                flat = self.bank.dispatch(flat)
            # Flat, so that adapters add in place to the product itself: in place on a view, autograd would copy it twice.
            out = F.linear(flat, self.weight, bias)
            if self.bank is not None:
                out = self.bank.aggregate(flat, out)
            return out.view(*input_.shape[:-1], -1), self.bias if self.skip_bias_add else None

    Multiplexed.__name__ = f"Multiplexed{base.__name__}"
    return Multiplexed


MultiplexedColumn = _multiplexed(ColumnParallelLinear, True)
MultiplexedRow = _multiplexed(RowParallelLinear, False)


class _Multiplexing:
    def column_parallel_linear(self) -> type[Any]:
        return MultiplexedColumn

    def row_parallel_linear(self) -> type[Any]:
        return MultiplexedRow

    def core_attention(self) -> type[Any]:
        return RaggedAttention

    def fuse_layernorm_and_linear(self) -> bool:
        return False  # adapters need the normed input


def _te_base() -> type[Any]:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider  # noqa: PLC0415

    return TESpecProvider  # type: ignore[no-any-return]


def spec_provider(kind: str, te_base: Callable[[], type[Any]] = _te_base) -> Any:
    """Megatron's source of modules under a layer spec (`te`, `local`), with the multiplexed linears and our attention."""
    base = te_base() if kind == "te" else LocalSpecProvider
    return type("Provider", (_Multiplexing, base), {})()


def _groups(peers: Peers) -> Any:
    """What Megatron's modules ask for ranks and sizes: each instance has groups of its own, and its stages are models."""
    found = ProcessGroupCollection()
    found.tp = Alone() if peers.tp is None else peers.tp
    found.pp, found.cp, found.embd, found.pos_embd = Alone(), Alone(), None, None
    return found


def _config(model: ModelSpec, layout: Layout, layers: int) -> Any:
    activations = {
        **{"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu": F.relu},
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
    }
    return TransformerConfig(
        num_layers=layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn_hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        gated_linear_unit=model.gated,
        activation_func=activations[model.activation],
        add_bias_linear=model.biases == "all",
        add_qkv_bias=model.biases == "qkv",
        tensor_model_parallel_size=layout.tp,
        params_dtype=DTYPES[model.dtype],
        use_cpu_initialization=True,
        perform_initialization=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )


def _block_spec(model: ModelSpec, layers: int) -> Any:
    provider = spec_provider(LAYER_SPEC.kind)
    norm = provider.layer_norm(rms_norm=model.norm == "rmsnorm")
    attention = SelfAttentionSubmodules(
        linear_qkv=provider.column_parallel_linear(),
        core_attention=provider.core_attention(),
        linear_proj=provider.row_parallel_linear(),
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(backend=provider),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def build_stage_model(
    model: ModelSpec,
    layout: Layout,
    stage: int,
    tp_rank: int,
    device: torch.device,
    seed: int,
    peers: Peers = ALONE,
    weights: Weights | None = None,
) -> Any:
    """A frozen GPTModel holding one stage's layers; weights are read, or random by seed and global names only.

    Equal seeds give equal backbones under any layout. Tied embeddings are two frozen copies with equal values where head
    and embedding live on different stages.
    """
    layers = len(layout.layers_of(stage))
    gpt = GPTModel(
        config=_config(model, layout, layers),
        transformer_layer_spec=_block_spec(model, layers),
        vocab_size=model.vocab,
        max_sequence_length=model.max_positions,
        pre_process=layout.is_first(stage),
        post_process=layout.is_last(stage),
        share_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute" if model.positions == "learned" else "none",
        pg_collection=_groups(peers),
    )
    first_layer = layout.layers_of(stage)[0]
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(False)
        place = _global_name(name, first_layer, model)
        if weights is None:
            parameter.copy_(_initial(model, layout, place, parameter, tp_rank, seed))
        else:
            parameter.copy_(_cut(model, layout, place, weights.full(place), tp_rank))
    if model.tied_embeddings and layout.is_first(stage) and layout.is_last(stage):
        gpt.output_layer.weight = gpt.embedding.word_embeddings.weight
    return gpt.to(device, DTYPES[model.dtype])  # Megatron leaves plain norms in fp32


def _global_name(name: str, first_layer: int, model: ModelSpec) -> str:
    if name == "output_layer.weight" and model.tied_embeddings:
        return "embedding.word_embeddings.weight"
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first_layer)
    return ".".join(parts)


def _initial(model: ModelSpec, layout: Layout, name: str, parameter: Tensor, tp_rank: int, seed: int) -> Tensor:
    """N(0, 0.02) matrices, unit norm weights, zero biases; a sharded matrix is cut from the full one."""
    if parameter.dim() < 2:
        return torch.zeros_like(parameter) if name.endswith("bias") else torch.ones_like(parameter)
    axis = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
    if "position_embeddings" in name:
        axis = -1
    shape = list(parameter.shape)
    if axis >= 0:
        shape[axis] *= layout.tp
    full = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))) * 0.02
    return _cut(model, layout, name, full, tp_rank)


def _cut(model: ModelSpec, layout: Layout, name: str, full: Tensor, tp_rank: int) -> Tensor:
    """This rank's part of a whole tensor: norms, learned positions and biases of row-parallel linears are not cut."""
    row_parallel = "linear_proj" in name or "linear_fc2" in name
    if layout.tp == 1 or "norm" in name or "position_embeddings" in name or (row_parallel and full.dim() == 1):
        return full
    axis = 1 if row_parallel else 0
    # A gated fc1 is [gate; up]: each half is cut, then the cuts are joined.
    halves = full.chunk(2 if model.gated and "linear_fc1" in name else 1, axis)
    return torch.cat([h.chunk(layout.tp, axis)[tp_rank] for h in halves], axis)


def layer_linears(layer: Any) -> dict[str, Any]:
    """BaseOp name → Megatron linear of one TransformerLayer."""
    owners = {"qkv": layer.self_attention, "proj": layer.self_attention, "fc1": layer.mlp, "fc2": layer.mlp}
    return {target: getattr(owner, LINEARS[target]) for target, owner in owners.items()}


def attach_banks(gpt: Any, model: ModelSpec, layout: Layout, stage: int) -> dict[tuple[int, str], AdapterBank]:
    """Give every multiplexed linear an empty AdapterBank, keyed by (global layer, BaseOp)."""
    banks: dict[tuple[int, str], AdapterBank] = {}
    for layer_number, layer in zip(layout.layers_of(stage), gpt.decoder.layers, strict=True):
        for target, linear in layer_linears(layer).items():
            late = linear.skip_bias_add
            bank = AdapterBank(
                target,
                target in COLUMN_PARALLEL,
                shard(model, layout.tp, target),
                blocks=2 if model.gated and target == "fc1" else 1,
                weight=linear.weight,
                bias=None if late else linear.bias,
                late_bias=linear.bias if late else None,
            )
            linear.bank = bank
            banks[layer_number, target] = bank
    return banks


def rotary_table(model: ModelSpec, device: torch.device) -> Tensor:
    """Angles of rotary embedding for every position, (max_positions, 1, 1, head_dim), halves repeated (not interleaved)."""
    exponent = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    angles = torch.outer(torch.arange(model.max_positions, dtype=torch.float32), model.rope_base**-exponent)
    return torch.cat((angles, angles), dim=-1)[:, None, None, :].to(device)


def rotate(x: Tensor, angles: Tensor, gpt: Any) -> Tensor:
    """Megatron's rotary embedding of x (tokens, 1, heads, head_dim) by angles (tokens, 1, 1, head_dim)."""
    return apply_rotary_pos_emb(x, angles, config=gpt.config, cp_group=Alone())  # type: ignore[no-any-return]


def activation(model: ModelSpec, gpt: Any, x: Tensor) -> Tensor:
    """The MLP's activation as Megatron's unfused path runs it; x (tokens, 1, fc1_out)."""
    if not model.gated:
        return gpt.config.activation_func(x)  # type: ignore[no-any-return]
    gate, up = torch.chunk(x, 2, dim=-1)
    return gpt.config.activation_func(gate) * (up + gpt.config.glu_linear_offset)  # type: ignore[no-any-return]
