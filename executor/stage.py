"""StageModel: one pipeline stage run piece by piece, with an autograd cut at every piece.

The residual stream is kept outside autograd: with s the stream and f a piece, forward is s ← s + f(norm(s)), backward is
g ← g + norm'(f'(g)). Subgraphs of several hTasks can therefore be interleaved in any order, forward and backward.
With sequence parallelism s and g are a rank's part of the tokens; f sees all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muxtune.executor.adapters import AdapterBank
from muxtune.executor.attention import Attending
from muxtune.executor.comm import Comm, Exchange, make_comm
from muxtune.executor.data import BatchTensors
from muxtune.executor.loss import token_losses
from muxtune.executor.megatron import Weights, attach_banks, build_stage_model, rotary_table
from muxtune.executor.passage import Cut, Passage, PastChunks
from muxtune.executor.peers import ALONE, Peers
from muxtune.spec.catalogue import Piece, Subgraph, Way, pieces_of, stage_subgraphs
from muxtune.spec.layout import Layout
from muxtune.spec.model import ModelSpec


class StageModel:
    """One stage of one backbone copy, with the adapters of every registered task."""

    def __init__(
        self,
        model: ModelSpec,
        layout: Layout,
        stage: int,
        tp_rank: int,
        device: torch.device,
        seed: int,
        peers: Peers = ALONE,
        weights: Weights | None = None,
    ) -> None:
        self.model, self.layout, self.stage, self.tp_rank, self.device = model, layout, stage, tp_rank, device
        self.peers = peers
        self.comm: Comm = make_comm(device)
        self.gpt = build_stage_model(model, layout, stage, tp_rank, device, seed, peers, weights)
        self.banks: dict[tuple[int, str], AdapterBank] = attach_banks(self.gpt, model, layout, stage)
        self.layers = dict(zip(layout.layers_of(stage), self.gpt.decoder.layers, strict=True))
        self.angles = rotary_table(model, device) if model.positions == "rope" else None
        self.subgraphs: dict[str, tuple[Subgraph, ...]] = {
            "forward": stage_subgraphs(layout, stage, "forward"),
            "backward": stage_subgraphs(layout, stage, "backward"),
        }
        self.follower = dict(pairwise(p for p in pieces_of(layout, stage, "backward") if not p.again))
        self._forward: dict[str, Callable[[Passage, Piece], None]] = {
            "embed": self._embed,
            "norm1": self._norm,
            "norm2": self._norm,
            "final_norm": self._norm,
            "attention": self._block,
            "mlp": self._block,
            "exit": self._exit,
        }

    def begin(self, tensors: BatchTensors, received: Tensor | None, past: PastChunks | None = None) -> Passage:
        """Start a batch: from its token ids on the first stage, else from the received stream (tokens, 1, hidden).

        `past` is shared by the chunks of one hTask's unit, in chunk order; None where the unit is not cut.
        """
        rotary = None if self.angles is None else self.angles[tensors.positions]
        return Passage(tensors=tensors, rotary=rotary, live=received is not None, stream=received, past=past)

    def forward(self, passage: Passage, index: int, denominators: dict[str, int]) -> None:
        """Run compute subgraph `index` forward; `denominators` are the loss denominators of the batch's tasks."""
        for piece in self.subgraphs["forward"][index].pieces:
            self.forward_piece(passage, piece, denominators)

    def forward_piece(self, passage: Passage, piece: Piece, denominators: dict[str, int]) -> None:
        """Run one piece; the pieces of a batch run in the order of `stage_pieces`."""
        if piece.name == "head":
            self._head_loss(passage, piece, denominators)
        else:
            self._forward[piece.name](passage, piece)

    def backward(self, passage: Passage, index: int) -> None:
        """Run compute subgraph `index` backward; `passage.gradient` is that of the stage's output stream (last stage: none)."""
        for piece in self.subgraphs["backward"][index].pieces:
            if piece.again:
                self._again(passage, piece)
            else:
                self._piece_backward(passage, piece)

    def exchange(self, passage: Passage, direction: Way, index: int) -> Exchange | None:
        """The collective of subgraph `index`; None where no gradient takes part. Its result is used when it is finished."""
        subgraph = self.subgraphs[direction][index]
        assert subgraph.collective is not None
        if direction == "forward" or subgraph.pieces[0].again:
            return self._exchange_forward(passage, subgraph)
        return self._exchange_backward(passage, subgraph)

    def _exchange_forward(self, passage: Passage, subgraph: Subgraph) -> Exchange:
        assert subgraph.collective is not None
        piece = subgraph.pieces[0]
        if subgraph.collective == "all_gather":
            assert passage.normed is not None

            def gathered(whole: Tensor) -> None:
                passage.normed = whole[: passage.tokens]

            return Exchange(kind="all_gather", tensor=passage.normed, finish=gathered)
        slot = "pending" if passage.pending is not None else "stream"

        def summed(total: Tensor) -> None:
            setattr(passage, slot, total)
            self._after_sum(passage, piece)

        return Exchange(kind=subgraph.collective, tensor=self._even(getattr(passage, slot)), finish=summed)

    def _exchange_backward(self, passage: Passage, subgraph: Subgraph) -> Exchange | None:
        assert subgraph.collective is not None
        if subgraph.collective == "all_gather":
            if self.follower[subgraph.pieces[0]] not in passage.with_backward:
                return None
            assert passage.gradient is not None

            def gathered(whole: Tensor) -> None:
                passage.block_gradient = whole[: passage.tokens]

            return Exchange(kind="all_gather", tensor=passage.gradient, finish=gathered)
        if passage.inner_gradient is None:
            return None

        def summed(total: Tensor) -> None:
            passage.inner_gradient = total

        return Exchange(kind=subgraph.collective, tensor=self._even(passage.inner_gradient), finish=summed)

    def _even(self, x: Tensor) -> Tensor:
        """Tokens filled up with zeros to a multiple of tp, where they will be cut."""
        missing = -x.size(0) % self.layout.tp if self.layout.sequence_parallel else 0
        return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x

    def _embed(self, passage: Passage, piece: Piece) -> None:
        ids = passage.tensors.ids
        table = self.gpt.embedding.word_embeddings.weight
        start = self.tp_rank * table.size(0)
        inside = (ids >= start) & (ids < start + table.size(0))
        rows = F.embedding(torch.where(inside, ids - start, 0), table)
        stream = rows if self.layout.tp == 1 else torch.where(inside[:, None], rows, 0)
        passage.stream = stream[:, None]
        if self.layout.tp == 1:
            self._add_positions(passage)

    def _add_positions(self, passage: Passage) -> None:
        if self.model.positions != "learned":
            return
        assert passage.stream is not None
        positions = passage.tensors.positions
        if self.layout.sequence_parallel:
            positions = F.pad(positions, (0, -len(positions) % self.layout.tp)).chunk(self.layout.tp)[self.tp_rank]
        passage.stream = passage.stream + self.gpt.embedding.position_embeddings(positions)[:, None]

    def _after_sum(self, passage: Passage, piece: Piece) -> None:
        """What follows a forward sum: the bias or position that must be added once, not once a rank."""
        if piece.name == "embed":
            self._add_positions(passage)
        else:
            self._add_bias(passage, piece)

    def _norm(self, passage: Passage, piece: Piece) -> None:
        assert passage.stream is not None
        if passage.pending is not None:
            passage.stream = passage.stream + passage.pending
            passage.pending = None
        if piece.name == "norm1" and not self._tapes(piece):
            passage.inputs[piece.layer] = (passage.stream, passage.live)
        leaf = passage.stream.detach().requires_grad_(passage.live)
        with torch.enable_grad():
            out = self._norm_module(piece)(leaf)
        if passage.live:
            self._cut(passage, piece, leaf, out)
        passage.normed = out.detach()

    def _norm_module(self, piece: Piece) -> Any:
        if piece.name == "final_norm":
            return self.gpt.decoder.final_layernorm
        layer = self.layers[piece.layer]
        return layer.input_layernorm if piece.name == "norm1" else layer.pre_mlp_layernorm

    def _block(self, passage: Passage, piece: Piece) -> None:
        """Attention or MLP of a layer: from the normed stream to this rank's partial sum."""
        assert passage.normed is not None
        for target in ("qkv", "proj") if piece.name == "attention" else ("fc1", "fc2"):
            self.banks[piece.layer, target].bind(passage.tensors.segments, passage.tensors.counters)
        leaf = passage.normed.detach().requires_grad_(passage.live)
        layer = self.layers[piece.layer]
        with torch.enable_grad():
            if piece.name == "attention":
                out, _ = layer.self_attention(leaf, self._attending(passage, piece), rotary_pos_emb=passage.rotary)
            else:
                out, _ = layer.mlp(leaf)
        if out.requires_grad:
            self._cut(passage, piece, leaf, out)
            passage.live = True
        passage.normed, passage.pending = None, out.detach()
        if self.layout.tp == 1:
            self._add_bias(passage, piece)

    def _cut(self, passage: Passage, piece: Piece, leaf: Tensor, out: Tensor) -> None:
        """Note where a piece's backward starts and what it leaves; without the graph where it will be made again."""
        first = replace(piece, again=False)
        passage.with_backward.add(first)
        if self._tapes(piece):
            passage.cuts[first] = Cut(leaf, torch.autograd.graph.get_gradient_edge(out))

    def _tapes(self, piece: Piece) -> bool:
        """Whether a piece's graph is kept for its backward; with recomputation those of layers are made again there."""
        return self.layout.recompute == "none" or piece.again or piece.layer < 0

    def _again(self, passage: Passage, piece: Piece) -> None:
        """A layer's forward once more, from the input that its first forward kept; its output has no reader."""
        if piece.name == "norm1":
            passage.stream, passage.live = passage.inputs.pop(piece.layer)
        self._forward[piece.name](passage, piece)
        if piece.name == "mlp":
            passage.stream, passage.pending = None, None

    def _attending(self, passage: Passage, piece: Piece) -> Attending:
        runs, past = passage.tensors.runs, passage.past
        if past is None:
            return Attending(runs=runs)
        return past.attending(runs, piece.layer, passage.tensors.chunk, self._tapes(piece))

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
            logits = F.linear(leaf, self.gpt.output_layer.weight)[:, 0]
            each = token_losses(logits, passage.tensors.labels, self.peers, self.tp_rank, self.comm.jitter)
            losses = {task: each[places].sum() / max(1, denominators[task]) for task, places in passage.tensors.targets}
            total = torch.stack([loss * passage.scales.get(task, 1.0) for task, loss in losses.items()]).sum()
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
            self._block_backward(passage, piece, cut)
        else:
            assert passage.inner_gradient is not None
            torch.autograd.backward((cut.edge,), (passage.inner_gradient,))
            gradient = cut.leaf.grad
            passage.gradient = gradient if passage.gradient is None else passage.gradient + gradient
            passage.inner_gradient = None

    def _block_backward(self, passage: Passage, piece: Piece, cut: Cut) -> None:
        gradient = passage.gradient
        if self.layout.sequence_parallel:
            gradient, passage.block_gradient = passage.block_gradient, None
        assert gradient is not None
        if piece.name == "attention" and passage.past is not None:
            passage.past.backward(piece.layer, passage.tensors.chunk, cut.edge, gradient)
        else:
            torch.autograd.backward((cut.edge,), (gradient,))
        passage.inner_gradient = cut.leaf.grad
