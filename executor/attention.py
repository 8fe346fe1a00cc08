"""Causal attention over a flat token axis: sequences never see each other; a chunk attends to the KV of the chunks before it.

Backward of a chunk takes, beside the gradient of its output, the dK and dV that later chunks left for it (fp32 sums).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muxtune.spec.align import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring rows alike: each has `queries` tokens and `past` tokens in earlier chunks, with `padding` behind each row.

    `sources` has for each row where its past lies: (chunk, first token there, tokens) in order.
    """

    queries: int
    past: int
    padding: tuple[int, ...]
    sources: tuple[tuple[tuple[int, int, int], ...], ...] = ()

    @property
    def rows(self) -> int:
        """Rows in the run."""
        return len(self.padding)

    @property
    def tokens(self) -> int:
        """Tokens on the flat axis, padding included."""
        return self.rows * self.queries + sum(self.padding)


def whole_runs(runs: Sequence[tuple[int, int]]) -> tuple[Run, ...]:
    """Runs of (rows, length) whole sequences without padding behind them."""
    return tuple(Run(queries=length, past=0, padding=(0,) * rows) for rows, length in runs)


def chunk_runs(batches: Sequence[Batch]) -> tuple[tuple[Run, ...], ...]:
    """The runs of each chunk of one hTask's unit: neighbouring rows alike as in `Batch.attention_runs`."""
    seen: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    found: list[tuple[Run, ...]] = []
    for chunk, batch in enumerate(batches):
        runs: list[Run] = []
        start = 0
        for row in batch.rows:
            queries = row.length_tokens - row.padding_tokens
            sources = seen.setdefault((row.task, row.slot), [])
            last = runs[-1] if runs else None
            if last is None or (last.queries, last.past) != (queries, row.past_tokens):
                runs.append(Run(queries=queries, past=row.past_tokens, padding=(), sources=()))
            runs[-1] = Run(
                queries=queries,
                past=row.past_tokens,
                padding=(*runs[-1].padding, row.padding_tokens),
                sources=(*runs[-1].sources, tuple(sources)),
            )
            sources.append((chunk, start, queries))
            start += row.length_tokens
        found.append(tuple(runs))
    return tuple(found)


@dataclass(slots=True)
class _Kept:
    """What one chunk leaves to later ones: K and V (tokens, 1, heads, head_dim), their autograd edges, and fp32 dK and dV."""

    values: tuple[Tensor, Tensor]
    edges: tuple[Any, Any] | None = None
    gradients: tuple[Tensor, Tensor] | None = None
    leaves: list[tuple[Run, tuple[Tensor, Tensor]]] = field(default_factory=list)


class LayerKV:
    """Keys and values of the chunks of one unit of an hTask in one layer."""

    def __init__(self) -> None:
        self.chunks: dict[int, _Kept] = {}

    def keep(self, chunk: int, key: Tensor, value: Tensor, taped: bool) -> None:
        """Remember a chunk's K and V on its way forward, with their graph if that is kept for the backward.

        A forward that is run again finds what later chunks have left meanwhile.
        """
        kept = self.chunks.setdefault(chunk, _Kept((key.detach(), value.detach())))
        if taped and key.requires_grad:
            kept.edges = (torch.autograd.graph.get_gradient_edge(key), torch.autograd.graph.get_gradient_edge(value))

    def past(self, chunk: int, run: Run) -> tuple[Tensor, Tensor]:
        """K and V before a run's rows, (rows, past, heads, head_dim): leaves whose gradients `collect` hands back."""
        live = self.chunks[chunk].edges is not None
        both = []
        for side in (0, 1):
            rows = [
                torch.cat([self.chunks[c].values[side][start : start + n, 0] for c, start, n in sources])
                for sources in run.sources
            ]
            both.append(torch.stack(rows).requires_grad_(live))
        leaves = both[0], both[1]
        if live:
            self.chunks[chunk].leaves.append((run, leaves))
        return leaves

    def roots(self, chunk: int) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        """Where else the backward of a chunk starts, and with which gradients: what later chunks left for its K and V."""
        kept = self.chunks[chunk]
        if kept.edges is None or kept.gradients is None:
            return (), ()
        return kept.edges, tuple(g.to(v.dtype) for g, v in zip(kept.gradients, kept.values, strict=True))

    def collect(self, chunk: int) -> None:
        """After the backward of a chunk: add the gradients of its past to the chunks where that lies, and forget it."""
        for run, leaves in self.chunks.pop(chunk).leaves:
            for side, leaf in enumerate(leaves):
                assert leaf.grad is not None
                for sources, row in zip(run.sources, leaf.grad, strict=True):
                    for (c, start, n), part in zip(sources, row.split([n for _, _, n in sources]), strict=True):
                        self._sum(c)[side][start : start + n, 0] += part

    def _sum(self, chunk: int) -> tuple[Tensor, Tensor]:
        kept = self.chunks[chunk]
        if kept.gradients is None:
            key, value = kept.values
            kept.gradients = (torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32))
        return kept.gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class Attending:
    """What a batch's attention needs in one layer: its runs and, where its unit has several chunks, the layer's KV.

    `taped`: the graph of this forward is kept for the backward (it is run again there otherwise).
    """

    runs: tuple[Run, ...]
    kv: LayerKV | None = None
    chunk: int = 0
    taped: bool = True


def attend(query: Tensor, key: Tensor, value: Tensor, at: Attending, scale: float) -> Tensor:
    """Attention of query (tokens, 1, heads, head_dim) over key and value with kv_heads → (tokens, 1, heads · head_dim).

    Padding attends to nothing and is attended by nothing: its output is zero.
    """
    if at.kv is not None:
        at.kv.keep(at.chunk, key, value, at.taped)
    # split, not slices: the gradient of a slice is a zero tensor of full size, that of a split is one cat.
    sizes = [run.tokens for run in at.runs]
    pieces = zip(*(x.split(sizes) if len(sizes) > 1 else (x,) for x in (query, key, value)), strict=True)
    outs = [_attend_run(run, parts, at, scale) for run, parts in zip(at.runs, pieces, strict=True)]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend_run(run: Run, parts: Sequence[Tensor], at: Attending, scale: float) -> Tensor:
    """One scaled-dot-product call for the rows of a run."""
    q, k, v = (_rows(run, x) for x in parts)
    mask = None
    if run.past:
        assert at.kv is not None
        k, v = (torch.cat(both, 1) for both in zip(at.kv.past(at.chunk, run), (k, v), strict=True))
        mask = torch.ones(run.queries, run.past + run.queries, dtype=torch.bool, device=q.device).tril(run.past)
    grouped = q.size(-2) != k.size(-2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
    flat = out.transpose(1, 2).reshape(run.rows * run.queries, 1, -1)
    if not any(run.padding):
        return flat
    rows = zip(flat.split(run.queries), run.padding, strict=True)
    return torch.cat([F.pad(row, (0, 0, 0, 0, 0, padding)) for row, padding in rows])


def _rows(run: Run, x: Tensor) -> Tensor:
    """(tokens, 1, heads, head_dim) → (rows, queries, heads, head_dim), without the padding."""
    if any(run.padding):
        sizes = [n for padding in run.padding for n in (run.queries, padding)]
        x = torch.cat(x.split(sizes)[::2])
    return x.view(run.rows, run.queries, x.size(-2), x.size(-1))
