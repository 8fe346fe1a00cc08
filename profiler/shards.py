"""Runs inside a worker: one tensor-parallel shard of a stage without its peers, and the attention of a chunk to its past."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from muxtune.executor.attention import Attending, LayerKV, Run
from muxtune.executor.megatron import RaggedAttention
from muxtune.executor.peers import ALONE, Peers
from muxtune.executor.solo import drawn_weights
from muxtune.executor.stage import StageModel
from muxtune.profiler.clocks import Part, timed
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.model import ModelSpec


class Apart:
    """Stands for the tensor-parallel group of a shard that is timed alone: modules ask it for rank and size only."""

    def __init__(self, size: int) -> None:
        self.ranks = size

    def rank(self) -> int:
        """The first shard."""
        return 0

    def size(self) -> int:
        """tp."""
        return self.ranks


@cache
def shard_stage(model: ModelSpec, tp: int, layers: tuple[int, ...], device: torch.device) -> StageModel:
    """The first shard of the stage that holds some layers, of an even layout."""
    pp = model.layers // len(layers)
    even = even_layout(model, pp=pp)
    stage = next(s for s in range(pp) if tuple(even.layers_of(s)) == layers)
    layout = Layout(tp=tp, pp=pp, layers_per_stage=even.layers_per_stage)
    peers = ALONE if tp == 1 else Peers(tp=Apart(tp), order=tuple(range(tp)))
    return StageModel(model, layout, stage, 0, device, seed=0, peers=peers, weights=drawn_weights(model, device))


def chunk_attention(
    attention: RaggedAttention, size: tuple[int, ...], heads: tuple[int, ...], random: Callable[..., Tensor]
) -> Callable[[], list[Part]]:
    """Rows of `queries` tokens to their past and to themselves, as the executor runs it: gathering the KV of earlier
    chunks, and adding up its gradient, are part of it.

    `random` makes a tensor of a shape.
    """
    rows, past, queries = size
    query_heads, kv_heads, head_dim = heads
    leaves = [random(rows * queries, 1, n, head_dim).requires_grad_(True) for n in (query_heads, kv_heads, kv_heads)]
    key, value = (random(rows * past, 1, kv_heads, head_dim).requires_grad_(True) for _ in range(2))
    sources = tuple(((0, row * past, past),) for row in range(rows))
    runs = (Run(queries=queries, past=past, padding=(0,) * rows, sources=sources),)
    gradient = random(rows * queries, 1, query_heads * head_dim)

    def run() -> list[Part]:
        kv = LayerKV()
        kv.keep(0, key, value, taped=True)
        at = Attending(runs=runs, kv=kv, chunk=1)
        with torch.enable_grad():
            forward, out = timed("forward", lambda: attention(*leaves, at))
        edge = torch.autograd.graph.get_gradient_edge(out)
        del out

        def turn() -> None:
            torch.autograd.backward((edge,), (gradient,))
            kv.collect(1)

        backward, _ = timed("backward", turn)
        for leaf in leaves:
            leaf.grad = None
        return [forward, backward]

    return run
