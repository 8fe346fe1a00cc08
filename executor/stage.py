"""StageModel: one pipeline stage run piece by piece, with an autograd cut at every piece.

The residual stream is kept outside autograd: with s the stream and f a piece, forward is s ← s + f(norm(s)), backward is
g ← g + norm'(f'(g)). Subgraphs of several hTasks can therefore be interleaved in any order, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from muxtune.executor.adapters import AdapterBank
from muxtune.executor.data import BatchTensors
from muxtune.executor.megatron import (
    attach_banks,
    build_stage_model,
    rotary_table,
    token_losses,
    tp_group,
)
from muxtune.spec.catalogue import Piece, Subgraph, stage_subgraphs
from muxtune.spec.layout import Layout
from muxtune.spec.model import ModelSpec


@dataclass(slots=True)
class Cut:
    """One piece's autograd edge: its detached input, and where to start its backward."""

    leaf: Tensor
    edge: Any


@dataclass(slots=True)
class Passage:
    """One batch on its way through a stage: residual stream, what waits to be added or reduced, and the cuts behind it."""

    tensors: BatchTensors
    rotary: Tensor | None
    live: bool
    stream: Tensor | None = None
    pending: Tensor | None = None
    normed: Tensor | None = None
    gradient: Tensor | None = None
    inner_gradient: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    cuts: dict[Piece, Cut] = field(default_factory=dict)


class StageModel:
    """One stage of one backbone copy, with the adapters of every registered task."""

    def __init__(
        self, model: ModelSpec, layout: Layout, stage: int, tp_rank: int, device: torch.device, seed: int
    ) -> None:
        self.model, self.layout, self.stage, self.tp_rank, self.device = model, layout, stage, tp_rank, device
        self.gpt = build_stage_model(model, layout, stage, tp_rank, device, seed)
        self.banks: dict[tuple[int, str], AdapterBank] = attach_banks(self.gpt, model, layout, stage)
        self.layers = dict(zip(layout.layers_of(stage), self.gpt.decoder.layers, strict=True))
        self.angles = rotary_table(model, device) if model.positions == "rope" else None
        self.subgraphs: dict[str, tuple[Subgraph, ...]] = {
            "forward": stage_subgraphs(layout, stage, "forward"),
            "backward": stage_subgraphs(layout, stage, "backward"),
        }
        self._forward: dict[str, Callable[[Passage, Piece], None]] = {
            "embed": self._embed,
            "norm1": self._norm,
            "norm2": self._norm,
            "final_norm": self._norm,
            "attention": self._block,
            "mlp": self._block,
            "exit": self._exit,
        }

    def begin(self, tensors: BatchTensors, received: Tensor | None) -> Passage:
        """Start a batch: from its token ids on the first stage, else from the received stream (tokens, 1, hidden)."""
        rotary = None if self.angles is None else self.angles[tensors.positions]
        return Passage(tensors=tensors, rotary=rotary, live=received is not None, stream=received)

    def forward(self, passage: Passage, index: int, denominators: dict[str, int]) -> None:
        """Run forward subgraph `index`; `denominators` are the loss denominators of the batch's tasks."""
        subgraph = self.subgraphs["forward"][index]
        if subgraph.kind == "collective":
            target = passage.pending if passage.pending is not None else passage.stream
            torch.distributed.all_reduce(target, group=tp_group())
            self._after_reduce(passage, subgraph.pieces[0])
            return
        for piece in subgraph.pieces:
            self.forward_piece(passage, piece, denominators)

    def forward_piece(self, passage: Passage, piece: Piece, denominators: dict[str, int]) -> None:
        """Run one piece; the pieces of a batch run in the order of `stage_pieces`."""
        if piece.name == "head":
            self._head_loss(passage, piece, denominators)
        else:
            self._forward[piece.name](passage, piece)

    def backward(self, passage: Passage, index: int) -> None:
        """Run backward subgraph `index`; `passage.gradient` is the gradient of the stage's output stream (last stage: none)."""
        subgraph = self.subgraphs["backward"][index]
        if subgraph.kind == "collective":
            if passage.inner_gradient is not None:
                torch.distributed.all_reduce(passage.inner_gradient, group=tp_group())
            return
        for piece in subgraph.pieces:
            self._piece_backward(passage, piece)

    def _embed(self, passage: Passage, piece: Piece) -> None:
        ids, positions = passage.tensors.ids, passage.tensors.positions
        table = self.gpt.embedding.word_embeddings.weight
        start = self.tp_rank * table.size(0)
        inside = (ids >= start) & (ids < start + table.size(0))
        rows = torch.nn.functional.embedding(torch.where(inside, ids - start, 0), table)
        stream = rows if self.layout.tp == 1 else torch.where(inside[:, None], rows, 0)
        passage.stream = stream[:, None]
        if self.layout.tp == 1:
            self._add_positions(passage, positions)

    def _add_positions(self, passage: Passage, positions: Tensor) -> None:
        if self.model.positions == "learned":
            assert passage.stream is not None
            passage.stream = passage.stream + self.gpt.embedding.position_embeddings(positions)[:, None]

    def _after_reduce(self, passage: Passage, piece: Piece) -> None:
        """What follows a forward collective: the bias or position that must be added once, not once a rank."""
        if piece.name == "embed":
            self._add_positions(passage, passage.tensors.positions)
        else:
            self._add_bias(passage, piece)

    def _norm(self, passage: Passage, piece: Piece) -> None:
        assert passage.stream is not None
        if passage.pending is not None:
            passage.stream = passage.stream + passage.pending
            passage.pending = None
        leaf = passage.stream.detach().requires_grad_(passage.live)
        with torch.enable_grad():
            out = self._norm_module(piece)(leaf)
        if passage.live:
            passage.cuts[piece] = Cut(leaf, torch.autograd.graph.get_gradient_edge(out))
        passage.normed = out.detach()

    def _norm_module(self, piece: Piece) -> Any:
        if piece.name == "final_norm":
            return self.gpt.decoder.final_layernorm
        layer = self.layers[piece.layer]
        return layer.input_layernorm if piece.name == "norm1" else layer.pre_mlp_layernorm

    def _block(self, passage: Passage, piece: Piece) -> None:
        """Attention or MLP of a layer: from the normed stream to this rank's partial sum."""
        assert passage.normed is not None
        segments = passage.tensors.segments
        for target in ("qkv", "proj") if piece.name == "attention" else ("fc1", "fc2"):
            self.banks[piece.layer, target].bind(segments)
        leaf = passage.normed.detach().requires_grad_(passage.live)
        layer = self.layers[piece.layer]
        with torch.enable_grad():
            if piece.name == "attention":
                out, _ = layer.self_attention(leaf, passage.tensors.runs, rotary_pos_emb=passage.rotary)
            else:
                out, _ = layer.mlp(leaf)
        if out.requires_grad:
            passage.cuts[piece] = Cut(leaf, torch.autograd.graph.get_gradient_edge(out))
            passage.live = True
        passage.normed, passage.pending = None, out.detach()
        if self.layout.tp == 1:
            self._add_bias(passage, piece)

    def _add_bias(self, passage: Passage, piece: Piece) -> None:
        layer = self.layers[piece.layer]
        bias = (layer.self_attention.linear_proj if piece.name == "attention" else layer.mlp.linear_fc2).bias
        if bias is not None:
            assert passage.pending is not None
            passage.pending = passage.pending + bias

    def _exit(self, passage: Passage, piece: Piece) -> None:
        assert passage.stream is not None
        assert passage.pending is not None
        passage.stream, passage.pending = passage.stream + passage.pending, None

    def _head_loss(self, passage: Passage, piece: Piece, denominators: dict[str, int]) -> None:
        """Logits of every token, then each task's own loss over its response tokens (selected, never masked by zero)."""
        assert passage.normed is not None
        leaf = passage.normed.detach().requires_grad_(passage.live)
        with torch.enable_grad():
            logits = torch.nn.functional.linear(leaf, self.gpt.output_layer.weight)[:, 0]
            each = token_losses(logits, passage.tensors.labels, self.layout.tp)
            losses = {task: each[places].sum() / max(1, denominators[task]) for task, places in passage.tensors.targets}
            total = torch.stack(list(losses.values())).sum()
        if passage.live:
            passage.cuts[piece] = Cut(leaf, torch.autograd.graph.get_gradient_edge(total))
        passage.losses = {task: loss.detach() for task, loss in losses.items()}
        passage.normed, passage.stream = None, None

    def _piece_backward(self, passage: Passage, piece: Piece) -> None:
        cut = passage.cuts.pop(piece, None)
        if cut is None:
            return
        if piece.name == "head":
            torch.autograd.backward((cut.edge,), (torch.ones((), device=self.device),))
            passage.inner_gradient = cut.leaf.grad
        elif piece.name in ("attention", "mlp"):
            assert passage.gradient is not None
            torch.autograd.backward((cut.edge,), (passage.gradient,))
            passage.inner_gradient = cut.leaf.grad
        else:
            assert passage.inner_gradient is not None
            torch.autograd.backward((cut.edge,), (passage.inner_gradient,))
            gradient = cut.leaf.grad
            passage.gradient = gradient if passage.gradient is None else passage.gradient + gradient
            passage.inner_gradient = None
