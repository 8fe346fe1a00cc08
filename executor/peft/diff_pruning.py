"""Diff-Pruning on a sharded BaseOp: the trained differences are scattered into D, which is sharded as the weight is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from muxtune.executor.peft.base import Adapter, Entry, Place
from muxtune.spec.peft.diff_pruning import DiffPruning


class DiffPruningAdapter(Adapter):
    """Differences, (rows or columns of the shard, trained in each), start at zero.

    Their places are evenly spaced in each row (column) of the whole weight from a random start.
    """

    spec: DiffPruning
    places: Tensor

    def __init__(self, spec: DiffPruning, place: Place, generator: torch.Generator) -> None:
        super().__init__(spec, place, generator)
        k, n = place.features
        lines, length = place.whole[::-1] if place.column_parallel else place.whole
        count = spec.trained(length)
        starts = torch.randint(length, (lines,), generator=generator)
        starts = place.cut_out(starts, 0) if place.column_parallel else place.cut_in(starts, 0)
        across = (starts[:, None] + torch.arange(count) * (length // count)) % length
        along = torch.arange(len(starts))[:, None]
        flat = along * k + across if place.column_parallel else across * k + along
        self.register_buffer("places", flat.reshape(-1).to(place.device), persistent=False)
        self.shape = (n, k)
        self.delta = self._parameter(torch.zeros(flat.shape))

    @staticmethod
    def apply_group(out: Tensor, x: Tensor, entries: Sequence[Entry], counters: Tensor | None) -> Tensor:
        """base + x Dᵀ, rows of each task with its own D."""
        return _Sparse.apply(out, x, tuple(entries), *(a.delta.to(x.dtype) for a, _, _ in entries))  # type: ignore[no-any-return]


def _scattered(adapter: Any, delta: Tensor) -> Tensor:
    """D (out, in): the differences at their places."""
    dense = delta.new_zeros(adapter.shape)
    dense.view(-1)[adapter.places] = delta.reshape(-1)
    return dense


class _Sparse(torch.autograd.Function):
    """Saves x; D is scattered again in the backward."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, entries: tuple[Entry, ...], *deltas: Tensor) -> Tensor:
        for delta, (adapter, start, end) in zip(deltas, entries, strict=True):
            out[start:end].addmm_(x[start:end], _scattered(adapter, delta).T)
        ctx.entries = entries
        ctx.save_for_backward(x, *deltas)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, (x, *deltas) = grads[0], ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        found = []
        for delta, (adapter, start, end) in zip(deltas, ctx.entries, strict=True):
            found.append((dy[start:end].T @ x[start:end]).reshape(-1)[adapter.places].view_as(delta))
            if dx is not None:
                torch.mm(dy[start:end], _scattered(adapter, delta), out=dx[start:end])
        return dy if ctx.needs_input_grad[0] else None, dx, None, *found
