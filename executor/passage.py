"""Passage: one batch on its way through a stage, forward and back; PastChunks: what the chunks of a unit leave each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from muxtune.executor.attention import Attending, LayerKV, Run
from muxtune.executor.comm import Pending
from muxtune.executor.data import BatchTensors
from muxtune.spec.catalogue import Piece


@dataclass(slots=True)
class Cut:
    """One piece's autograd edge: its detached input, and where to start its backward."""

    leaf: Tensor
    edge: Any


class PastChunks:
    """KV of every layer of a stage for the chunks of one hTask's unit."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerKV] = {}

    def attending(self, runs: tuple[Run, ...], layer: int, chunk: int, taped: bool) -> Attending:
        """What a chunk's attention needs in a layer; `taped` where its graph is kept for the backward."""
        return Attending(runs=runs, kv=self.layers.setdefault(layer, LayerKV()), chunk=chunk, taped=taped)

    def backward(self, layer: int, chunk: int, edge: Any, gradient: Tensor) -> None:
        """Backward of a chunk's attention block: from its output and from what later chunks left for its K and V."""
        kv = self.layers[layer]
        edges, gradients = kv.roots(chunk)
        torch.autograd.backward((edge, *edges), (gradient, *gradients))
        kv.collect(chunk)


@dataclass(slots=True)
class Passage:
    """Residual stream of a batch, what waits to be added or reduced, and the cuts behind it.

    With sequence parallelism `stream`, `pending` after its sum, and `gradient` are this rank's part of the tokens, and
    `block_gradient` is the gathered gradient for the next block's backward. A gradient flows back through the pieces in
    `with_backward`. With recomputation `inputs` has of each layer the stream that enters it and whether a gradient leaves there.
    `scales` are the tasks' loss scales: losses are reported without, their gradients come with them.
    """

    tensors: BatchTensors
    rotary: Tensor | None
    live: bool
    stream: Tensor | None = None
    past: PastChunks | None = None
    pending: Tensor | None = None
    normed: Tensor | None = None
    gradient: Tensor | None = None
    block_gradient: Tensor | None = None
    inner_gradient: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    cuts: dict[Piece, Cut] = field(default_factory=dict)
    with_backward: set[Piece] = field(default_factory=set)
    inputs: dict[int, tuple[Tensor, bool]] = field(default_factory=dict)
    on_its_way: Pending | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the batch, whatever part of them is here."""
        return len(self.tensors.ids)

    def settle(self) -> None:
        """Wait for the collective that was started last, if it still runs."""
        if self.on_its_way is not None:
            self.on_its_way.settle()
            self.on_its_way = None
