"""Tensors of a stage, from shapes: a backbone shard's weights, what a batch keeps from forward to backward, and its transient.

Counted as the executor holds them: what autograd saves of each piece, plus the transient of the piece that runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from muxtune.spec.align import Batch
from muxtune.spec.catalogue import StageContext, adapter_sizes, shard
from muxtune.spec.footprint import Tensors, exact_bytes
from muxtune.spec.peft import COLUMN_PARALLEL, TARGETS, PeftSpec

#: Bytes an adapter parameter needs of each kind: itself, its gradient, the two AdamW moments, all fp32.
ADAPTER_KINDS = {"adapters": 4, "gradients": 4, "optimizer_states": 8}
ADAPTER_STATE_BYTES = sum(ADAPTER_KINDS.values())
#: (adapter, tokens) of each task's part of a batch.
Parts = Sequence[tuple[PeftSpec, int]]
#: dK and dV of a chunk are added up over the later chunks in fp32.
DKV_BYTES = 4
#: The loss is computed in fp32.
SOFTMAX_BYTES = 4


def weight_tensors(context: StageContext) -> Tensors:
    """Weights of one rank's shard of the backbone.

    Tensor parallelism shards the linears, the biases of column-parallel ones and the vocabulary; norms, learned positions and
    the biases of row-parallel linears are whole on every rank. A tied output layer is a copy where the embedding is elsewhere.
    """
    model, layout = context.model, context.layout
    norm = [model.hidden] * (2 if model.norm == "layernorm" else 1)
    layer = 2 * norm
    for target in TARGETS:
        k, n = shard(model, layout.tp, target)
        layer.append(k * n)
        if model.biases == "all" or (model.biases == "qkv" and target == "qkv"):
            layer.append(n)
    elements = layer * len(layout.layers_of(context.stage))
    first, last = layout.is_first(context.stage), layout.is_last(context.stage)
    if first:
        elements += [model.max_positions * model.hidden] if model.positions == "learned" else []
    if last:
        elements += norm
    copies = int(first) + int(last and not (model.tied_embeddings and first))
    elements += [model.vocab // layout.tp * model.hidden] * copies
    return _tensors(elements, model.element_bytes)


def backbone_bytes(context: StageContext) -> int:
    """Weights of one rank's shard of the backbone, without rounding."""
    return exact_bytes(weight_tensors(context))


def adapter_bytes(context: StageContext, tasks: tuple[str, ...]) -> int:
    """Adapters of some tasks on one rank with gradients and optimizer states, without rounding."""
    return sum(adapter_sizes(context, t)[0] for t in tasks) * ADAPTER_STATE_BYTES


def held_bytes(context: StageContext, batch: Batch, fused: bool = False) -> int:
    """Bytes that one batch keeps on a stage from its forward to its backward, without rounding."""
    return exact_bytes(held_tensors(context, batch, fused))


def held_tensors(context: StageContext, batch: Batch, fused: bool = False) -> Tensors:
    """What one batch keeps on a stage from its forward to its backward.

    Without recomputation all that autograd saves; with it the input of every layer, and what final norm and head save.
    `fused` leaves out what only unfused modules keep (see `layer_tensors`).
    """
    saved = layer_tensors(context, batch, fused)
    kept = saved[:1] if context.layout.recompute == "full" else saved
    layers = len(context.layout.layers_of(context.stage))
    return (*((size_bytes, layers * count) for size_bytes, count in kept), *_end_tensors(context, batch))


def again_tensors(context: StageContext, batch: Batch) -> Tensors:
    """What a backward has in use beside the held tensors because it runs a layer again: the rest of what one layer saves."""
    return layer_tensors(context, batch)[1:] if context.layout.recompute == "full" else ()


def layer_tensors(context: StageContext, batch: Batch, fused: bool = False) -> Tensors:
    """What autograd saves of one layer; the layer's input comes first.

    The executor's modules are not fused: they keep more than the mathematics needs, which `fused` leaves out.
    """
    # Rows are counted once: only tokens and each task's part of them matter.
    tokens, adapters = batch.tokens, dict(context.adapters)
    parts = [(adapters[task], end - start) for task, start, end in batch.segments()]
    model, stream = context.model, context.layout.shard_tokens(tokens)
    norms = [stream * model.hidden, stream, stream]  # the second norm's input, and a statistic a token of each
    elements = [*norms, *_attention_held(context, tokens, parts), *_mlp_held(context, tokens, parts)]
    elements += [] if fused else _unfused(context, batch)
    layer_input = (stream * model.hidden * model.element_bytes, 1)
    return (layer_input, *_tensors(elements, model.element_bytes))


def _unfused(context: StageContext, batch: Batch) -> list[int]:
    """Elements that Megatron's local modules keep besides, measured by `profiler/kept.py`.

    v is a view of the fused qkv, whose q and k stay with it where rope has rotated copies of them; rope keeps cosines and sines
    for q and for k; a gated MLP copies *up*; a layer norm has a second statistic a token.
    """
    model, tp, tokens = context.model, context.layout.tp, batch.tokens
    stream = context.layout.shard_tokens(tokens)
    found = [stream, stream] if model.norm == "layernorm" else []
    if model.positions == "rope":
        heads = model.heads // tp + max(1, model.kv_heads // tp)
        found += [tokens * heads * model.head_dim, *[tokens * model.head_dim] * 4]
    return found + ([tokens * (model.ffn_hidden // tp)] if model.gated else [])


def _end_tensors(context: StageContext, batch: Batch) -> Tensors:
    """What final norm and head keep on the last stage: the norm's input, and the soft-max of the logits in fp32."""
    if not context.layout.is_last(context.stage):
        return ()
    model, stream = context.model, context.layout.shard_tokens(batch.tokens)
    softmax_bytes = SOFTMAX_BYTES * batch.tokens * (model.vocab // context.layout.tp)
    return (*_tensors([stream * model.hidden, stream], model.element_bytes), (softmax_bytes, 1))


def _tensors(elements: Iterable[int], element_bytes: int) -> Tensors:
    counted = Counter(n * element_bytes for n in elements if n)
    return tuple(sorted(counted.items()))


def _saved_inputs(context: StageContext, batch_tokens: int, parts: Parts, target: str) -> Iterator[int]:
    """Elements saved for the adapters of one BaseOp: its input once where any needs it, and what each task's keeps beside it."""
    features = shard(context.model, context.layout.tp, target)
    found = [(peft, tokens) for peft, tokens in parts if target in peft.targets]
    if any(peft.KEEPS_INPUT for peft, _ in found):
        yield batch_tokens * features[0]
    for peft, tokens in found:
        yield peft.kept_on(tokens, features, target in COLUMN_PARALLEL)


def _attention_held(context: StageContext, tokens: int, parts: Parts) -> Iterator[int]:
    """q, k, v after rope, the output, its log-sum-exp, and the inputs of adapted linears (elements)."""
    model, tp = context.model, context.layout.tp
    heads, kv = model.heads // tp, max(1, model.kv_heads // tp)
    yield from (tokens * n * model.head_dim for n in (heads, heads, kv, kv))
    yield tokens * heads
    yield from _saved_inputs(context, tokens, parts, "qkv")
    yield from _saved_inputs(context, tokens, parts, "proj")


def _mlp_held(context: StageContext, tokens: int, parts: Parts) -> Iterator[int]:
    """Input of the activation (gate and up), its inner product, and the inputs of adapted linears (elements)."""
    model, tp = context.model, context.layout.tp
    yield tokens * (model.fc1_out // tp)
    yield tokens * (model.ffn_hidden // tp if model.gated else 0)
    yield from _saved_inputs(context, tokens, parts, "fc1")
    yield from _saved_inputs(context, tokens, parts, "fc2")


def chunk_kv_tensors(context: StageContext, batch: Batch) -> Tensors:
    """Keys and values that a chunk leaves to the later chunks of its pack, and the fp32 dK and dV that they add up for it.

    Counted beside what autograd saves of the chunk, which recomputation may drop, and from the chunk's forward on.
    """
    model, layout = context.model, context.layout
    each = batch.tokens * max(1, model.kv_heads // layout.tp) * model.head_dim
    count = 2 * len(layout.layers_of(context.stage))
    return ((each * model.element_bytes, count), (each * DKV_BYTES, count))


def chunk_kv_bytes(context: StageContext, batch: Batch) -> int:
    """Bytes of `chunk_kv_tensors`, without rounding."""
    return exact_bytes(chunk_kv_tensors(context, batch))


def working_bytes(context: StageContext, batch: Batch) -> int:
    """Largest transient beside the held bytes: gradients of the widest piece while its backward runs, and an adapter's own."""
    model, tp = context.model, context.layout.tp
    widest = max(2 * model.fc1_out // tp, 2 * model.qkv_out // tp)
    if context.layout.is_last(context.stage):
        # The loss's backward has two fp32 gradients of the logits beside the soft-max that was kept.
        widest = max(widest, 2 * SOFTMAX_BYTES * (model.vocab // tp) // model.element_bytes)
    pefts = dict.fromkeys(context.peft(task) for task, _, _ in batch.segments())
    hung = ((peft, target) for peft in pefts for target in peft.targets)
    own = max((peft.transient_on(shard(model, tp, target)) for peft, target in hung), default=0)
    return (batch.tokens * (widest + 2 * model.hidden) + own) * model.element_bytes
