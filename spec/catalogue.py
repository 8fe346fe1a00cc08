"""The operator catalogue of a dense decoder: pieces of a stage, the subgraphs they are launched as, and their operators.

A stage is a row of pieces. Cut after each collective (MuxTune §3.4.2) they become subgraphs, in forward and backward order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from muxtune.spec import ops
from muxtune.spec.align import Batch
from muxtune.spec.layout import Layout
from muxtune.spec.model import ModelSpec
from muxtune.spec.noun import noun
from muxtune.spec.ops import Direction, Op
from muxtune.spec.peft import COLUMN_PARALLEL, PeftSpec

PieceName = Literal["embed", "norm1", "attention", "norm2", "mlp", "exit", "final_norm", "head"]
LAYER: tuple[PieceName, ...] = ("norm1", "attention", "norm2", "mlp")

Collective = Literal["all_reduce", "reduce_scatter", "all_gather"]
Way = Literal["forward", "backward"]

#: Row-parallel outputs (and the sharded embedding) are summed over tp right after the piece, and column-parallel inputs have
#: their gradient summed right after the piece's backward.
SUMMED = {"forward": ("embed", "attention", "mlp"), "backward": ("head", "attention", "mlp")}
#: With sequence parallelism sums are scattered along the tokens, and gathered again before the next block.
GATHERED = {"forward": ("norm1", "norm2", "final_norm"), "backward": ("exit", "norm1", "norm2", "final_norm")}


@noun
class Piece:
    """The smallest part of a stage that has its own autograd cut. `layer` is the global layer number, -1 outside layers.

    `again` marks a forward that a backward repeats (`Layout.recompute`).
    """

    name: PieceName
    layer: int = -1
    again: bool = False


@noun
class Subgraph:
    """What is launched at once: pieces of compute, or one `collective` over tp that follows a piece.

    Where adapters are apart (spec/isolated.py), `sections` says which part of each piece, and `adapters` names the BaseOp
    of a subgraph that has nothing else.
    """

    index: int
    pieces: tuple[Piece, ...]
    collective: Collective | None = None
    sections: tuple[int, ...] = ()
    adapters: str = ""

    @property
    def kind(self) -> Literal["compute", "collective"]:
        """What it occupies."""
        return "compute" if self.collective is None else "collective"

    @property
    def name(self) -> str:
        """For people: `layer3.attention`, `head`, `layer3.mlp all_reduce`."""
        piece = self.pieces[-1]
        label = piece.name if piece.layer < 0 else f"layer{piece.layer}.{piece.name}"
        label += f".{self.sections[-1]}" if any(self.sections) and not self.adapters else ""
        label += f".{self.adapters} adapters" if self.adapters else ""
        label += " again" if piece.again else ""
        return label if self.collective is None else f"{label} {self.collective}"


@lru_cache(maxsize=1024)
def stage_pieces(layout: Layout, stage: int) -> tuple[Piece, ...]:
    """The pieces of a stage in forward order."""
    pieces: list[Piece] = [Piece(name="embed")] if layout.is_first(stage) else []
    for layer in layout.layers_of(stage):
        pieces += [Piece(name=name, layer=layer) for name in LAYER]
    pieces += [Piece(name="final_norm"), Piece(name="head")] if layout.is_last(stage) else [Piece(name="exit")]
    return tuple(pieces)


@lru_cache(maxsize=1024)
def pieces_of(layout: Layout, stage: int, way: Way) -> tuple[Piece, ...]:
    """The pieces of a stage in the order in which a direction runs them; the embedding has no backward.

    Under recomputation a layer's forward comes again before its backward.
    """
    if way == "forward":
        return stage_pieces(layout, stage)
    found: list[Piece] = []
    for piece in reversed(stage_pieces(layout, stage)):
        if piece.name == "mlp" and layout.recompute == "full":
            found += [Piece(name=name, layer=piece.layer, again=True) for name in LAYER]
        found += [piece] if piece.name != "embed" else []
    return tuple(found)


def _cut(layout: Layout, stage: int, way: Way, piece: Piece) -> Collective | None:
    """The collective after a piece where tp > 1; a stage is cut there for any tp, so that launches are alike."""
    if piece.again:
        # A layer that is run again needs the collectives inside it; the sum of its output has no reader.
        return None if piece.name == "mlp" else _cut(layout, stage, "forward", replace(piece, again=False))
    if piece.name in SUMMED[way]:
        return "reduce_scatter" if layout.sequence_parallel else "all_reduce"
    if not layout.sequence_parallel or piece.name not in GATHERED[way]:
        return None
    # The backward of a stage ends with its first norm: nothing on the stage waits for what that leaves.
    ends = way == "backward" and piece.name == "norm1" and piece.layer == layout.layers_of(stage)[0]
    return None if ends else "all_gather"


@lru_cache(maxsize=1024)
def stage_subgraphs(layout: Layout, stage: int, direction: Way) -> tuple[Subgraph, ...]:
    """The subgraphs of a stage in serial order: compute up to a cut, then (tp > 1) the collective of that cut."""
    found: list[Subgraph] = []
    open_pieces: list[Piece] = []
    for piece in pieces_of(layout, stage, direction):
        open_pieces.append(piece)
        collective = _cut(layout, stage, direction, piece)
        if collective is None:
            continue
        found.append(Subgraph(index=len(found), pieces=tuple(open_pieces)))
        if layout.tp > 1:
            found.append(Subgraph(index=len(found), pieces=(piece,), collective=collective))
        open_pieces = []
    if open_pieces:
        found.append(Subgraph(index=len(found), pieces=tuple(open_pieces)))
    return tuple(found)


@noun
class StageContext:
    """All that decides the operators of a stage: backbone, layout, stage, and each task's adapter."""

    model: ModelSpec
    layout: Layout
    stage: int
    adapters: tuple[tuple[str, PeftSpec], ...]

    def peft(self, task: str) -> PeftSpec:
        """The adapter of a task (KeyError if it has none)."""
        for known, peft in self.adapters:
            if known == task:
                return peft
        raise KeyError(task)


def piece_ops(context: StageContext, piece: Piece, batch: Batch) -> Iterator[tuple[Op, bool]]:
    """Forward operators of a piece for a batch, each with whether it holds trainable parameters."""
    model, tokens, dtype, e = context.model, batch.tokens, context.model.dtype, context.model.element_bytes
    first_layer = context.layout.layers_of(context.stage)[0]
    stream_tokens = context.layout.shard_tokens(tokens)
    if piece.name == "embed":
        yield (
            ops.pointwise(
                "embedding", tokens, (model.vocab // context.layout.tp, model.hidden), 2, 0, "forward", dtype, e
            ),
            False,
        )
    elif piece.name in ("norm1", "norm2", "final_norm"):
        if not (piece.name == "norm1" and piece.layer == first_layer):
            yield _residual(model, stream_tokens), False
        yield ops.pointwise(model.norm, stream_tokens, (model.hidden,), 2, 4, "forward", dtype, e), False
    elif piece.name == "attention":
        yield from _attention(context, batch)
    elif piece.name == "mlp":
        yield from _mlp(context, batch)
    elif piece.name == "exit":
        yield _residual(model, stream_tokens), False
        yield _stage_overhead(context, tokens), False
    else:
        vocab = model.vocab // context.layout.tp
        yield ops.linear(tokens, (model.hidden, vocab), False, "forward", dtype, e), False
        yield ops.pointwise("cross_entropy", tokens, (vocab,), 2, 3, "forward", dtype, e), False
        yield _stage_overhead(context, tokens), False


def _attention(context: StageContext, batch: Batch) -> Iterator[tuple[Op, bool]]:
    model, tp, dtype, e = context.model, context.layout.tp, context.model.dtype, context.model.element_bytes
    heads, kv = model.heads // tp, max(1, model.kv_heads // tp)
    yield from _base_op(context, batch, "qkv")
    if model.positions == "rope":
        yield ops.pointwise("rope", batch.tokens, (heads + kv, model.head_dim), 2, 3, "forward", dtype, e), False
    for rows, length, queries in batch.attention_runs():
        yield ops.attention(rows, length, (heads, kv, model.head_dim), "forward", dtype, e, queries), False
    yield from _base_op(context, batch, "proj")
    # Last in its block: the first layer's block has a backward only from its first adapter on, and pays for that.
    yield ops.overhead("attention", batch.tokens, (model.hidden, model.ffn_hidden), "forward", dtype), False


def _activation_family(model: ModelSpec) -> str:
    """Both forms of gelu cost one pass over memory, and are one family."""
    return "gelu" if model.activation == "gelu_tanh" else model.activation


def _mlp(context: StageContext, batch: Batch) -> Iterator[tuple[Op, bool]]:
    model, dtype, e = context.model, context.model.dtype, context.model.element_bytes
    yield from _base_op(context, batch, "fc1")
    ffn = model.ffn_hidden // context.layout.tp
    yield (
        ops.pointwise(_activation_family(model), batch.tokens, (ffn,), 3 if model.gated else 2, 5, "forward", dtype, e),
        False,
    )
    yield from _base_op(context, batch, "fc2")
    yield ops.overhead("mlp", batch.tokens, (model.hidden, model.ffn_hidden), "forward", dtype), False


def _base_op(context: StageContext, batch: Batch, target: str) -> Iterator[tuple[Op, bool]]:
    """A BaseOp with the adapters that the batch's tasks hang on it: those that feed it before it, all others behind it."""
    model, dtype, e = context.model, context.model.dtype, context.model.element_bytes
    features, column = shard(model, context.layout.tp, target), target in COLUMN_PARALLEL
    bias = model.biases == "all" or (model.biases == "qkv" and target == "qkv")
    hung = _by_kind(context, batch, target)
    for feeding in (True, False):
        if not feeding:
            yield ops.linear(batch.tokens, features, bias, "forward", dtype, e), False
        for entries in hung:
            if entries[0][0].feeds_base(column) == feeding:
                yield from _adapters(context, entries, target)


def _by_kind(context: StageContext, batch: Batch, target: str) -> list[list[tuple[PeftSpec, int]]]:
    """For each method on a BaseOp, in order of first use: (adapter, tokens) of each task segment."""
    kinds: dict[str, list[tuple[PeftSpec, int]]] = {}
    for task, start, end in batch.segments():
        peft = context.peft(task)
        if target in peft.targets:
            kinds.setdefault(peft.kind, []).append((peft, end - start))
    return list(kinds.values())


def _adapters(context: StageContext, entries: list[tuple[PeftSpec, int]], target: str) -> Iterator[tuple[Op, bool]]:
    """The adapters of one method on a BaseOp, then what tp ranks sum inside each."""
    model, tp, column = context.model, context.layout.tp, target in COLUMN_PARALLEL
    features = shard(model, tp, target)
    for peft, tokens in entries:
        shape = peft.shape_on(features, column, tp)
        yield ops.adapter(peft.kind, tokens, shape, "forward", model.dtype, model.element_bytes), True
    for peft, tokens in entries if tp > 1 else ():
        summed = peft.tp_sum(tokens, features, column, model.element_bytes)
        if summed is not None:
            yield ops.message(ops.ADAPTER_SUM, summed.size_bytes, (tp, int(summed.backward))), True


def shard(model: ModelSpec, tp: int, target: str) -> tuple[int, int]:
    """(in, out) of one tp rank's shard: column-parallel qkv and fc1, row-parallel proj and fc2."""
    k, n = model.linear_shape(target)
    return (k, n // tp) if target in COLUMN_PARALLEL else (k // tp, n)


def _stage_overhead(context: StageContext, tokens: int) -> Op:
    """Charged with the last piece: it ends every forward and begins every backward."""
    kind = (int(context.layout.is_first(context.stage)), int(context.layout.is_last(context.stage)))
    return ops.overhead("stage", tokens, kind, "forward", context.model.dtype)


def _residual(model: ModelSpec, tokens: int) -> Op:
    return ops.pointwise("residual", tokens, (model.hidden,), 3, 1, "forward", model.dtype, model.element_bytes)


def stage_ops(context: StageContext, batch: Batch) -> tuple[tuple[Piece, tuple[Op, ...], tuple[Op, ...]], ...]:
    """(piece, forward operators, backward operators) of a stage for a batch.

    Backward of a frozen operator is its input gradient. Nothing flows back above the first trainable operator of stage 0,
    so operators before it have no backward and the adapter itself needs weight gradients only. Layers that cannot differ
    share the very same operators.
    """
    live = not context.layout.is_first(context.stage)
    first_layer = context.layout.layers_of(context.stage)[0]
    known: dict[tuple[str, bool, bool], tuple[tuple[Op, ...], tuple[Op, ...], bool]] = {}
    rows: list[tuple[Piece, tuple[Op, ...], tuple[Op, ...]]] = []
    for piece in stage_pieces(context.layout, context.stage):
        kind = (piece.name, piece.layer == first_layer, live)
        if kind not in known:
            known[kind] = _both_ways(context, piece, batch, live)
        forward, backward, live = known[kind]
        rows.append((piece, forward, backward))
    return tuple(rows)


def _both_ways(
    context: StageContext, piece: Piece, batch: Batch, live: bool
) -> tuple[tuple[Op, ...], tuple[Op, ...], bool]:
    """(forward operators, backward operators, whether a gradient flows back behind the piece); `live`: before it."""
    forward: list[Op] = []
    backward: list[Op] = []
    first_adapted = False
    for op, trainable in piece_ops(context, piece, batch):
        forward.append(op)
        if op.family == ops.ADAPTER_SUM and not op.shape[1]:
            continue
        if trainable and (not live or first_adapted):
            backward.append(_turn(op, "weights"))
            first_adapted = True  # the other tasks' adapters on the same BaseOp get no input gradient either
            live = True
        elif live:
            first_adapted = False
            backward.append(_turn(op, "backward"))
    return tuple(forward), tuple(reversed(backward)), live


@lru_cache(maxsize=1 << 14)
def _turn(op: Op, direction: Direction) -> Op:
    """The backward (or weights-only) counterpart of a forward operator."""
    dtype = op.dtype
    e = {"fp32": 4}.get(dtype, 2)
    if op.family == "linear":
        return ops.linear(op.size[0], (op.shape[0], op.shape[1]), bool(op.shape[2]), "backward", dtype, e)
    if op.family == ops.ADAPTER_SUM:
        return ops.message(op.family, op.size[0], op.shape, direction)
    if op.family in ops.ADAPTERS:
        return ops.adapter(op.family, op.size[0], op.shape, direction, dtype, e)
    if op.family == "attention":
        (rows, length, queries), (heads, kv, width) = op.size, op.shape
        return ops.attention(rows, length, (heads, kv, width), "backward", dtype, e, queries)
    if op.family in ops.OVERHEADS:
        return ops.overhead(
            op.family.removesuffix("_overhead"), op.size[0], (op.shape[0], op.shape[1]), "backward", dtype
        )
    return replace(op, direction="backward", flops=2 * op.flops, moved_bytes=2 * op.moved_bytes)


def subgraph_ops(context: StageContext, batch: Batch, direction: Way) -> tuple[tuple[Op, ...], ...]:
    """Operators of each subgraph of a stage, in the order of `stage_subgraphs`; a collective is one message.

    `size_bytes` of a collective counts the whole tensor, also where ranks hold a part before or after it. Under
    recomputation a backward has the forward operators of every layer as well.
    """
    by_piece = {piece: (fwd, bwd) for piece, fwd, bwd in stage_ops(context, batch)}
    found: list[tuple[Op, ...]] = []
    # Subgraphs of the same pieces' operators are one object.
    joined: dict[tuple[int, ...], tuple[Op, ...]] = {}
    size_bytes = batch.tokens * context.model.hidden * context.model.element_bytes
    follower = dict(pairwise(p for p in pieces_of(context.layout, context.stage, direction) if not p.again))
    for subgraph in stage_subgraphs(context.layout, context.stage, direction):
        if subgraph.collective is None:
            parts = [_ops_of(by_piece, p, direction) for p in subgraph.pieces]
            place = tuple(map(id, parts))
            if place not in joined:
                joined[place] = tuple(op for part in parts for op in part)
            found.append(joined[place])
            continue
        piece = subgraph.pieces[0]
        if direction == "forward" or piece.again:
            needed = True
        elif subgraph.collective == "all_gather":
            needed = bool(by_piece[follower[piece]][1])
        else:
            needed = _input_gradient(*by_piece[piece])
        found.append((ops.message(subgraph.collective, size_bytes, (context.layout.tp,)),) if needed else ())
    return tuple(found)


def _ops_of(
    by_piece: dict[Piece, tuple[tuple[Op, ...], tuple[Op, ...]]], piece: Piece, direction: Way
) -> tuple[Op, ...]:
    forward, backward = by_piece[replace(piece, again=False) if piece.again else piece]
    return forward if direction == "forward" or piece.again else backward


def _input_gradient(forward: tuple[Op, ...], backward: tuple[Op, ...]) -> bool:
    """Whether a gradient leaves the piece: every linear of it has an input gradient."""
    return sum(op.family == "linear" for op in forward) == sum(op.family == "linear" for op in backward)


def adapter_sizes(context: StageContext, task: str) -> tuple[int, int]:
    """(trainable parameters, trainable tensors) of a task on one rank of a stage."""
    peft = context.peft(task)
    layers = len(context.layout.layers_of(context.stage))
    shards = ((*shard(context.model, context.layout.tp, t), t in COLUMN_PARALLEL) for t in peft.targets)
    parameters = sum(peft.parameters_on(*x) for x in shards)
    return layers * parameters, layers * len(peft.targets) * peft.tensors_on()


def replicated_parameters(context: StageContext, task: str) -> int:
    """Trainable parameters of a task that all tp ranks of a stage hold whole; 0 without tensor parallelism."""
    if context.layout.tp == 1:
        return 0
    peft = context.peft(task)
    shards = ((*shard(context.model, context.layout.tp, t), t in COLUMN_PARALLEL) for t in peft.targets)
    return len(context.layout.layers_of(context.stage)) * sum(peft.replicated_on(*x) for x in shards)
