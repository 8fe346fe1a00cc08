"""Bottleneck adapter behind a sharded BaseOp: the narrow product is summed over tp, the wide ones are not.

Column-parallel: A and B sharded along out. Row-parallel: A and B whole; A meets each rank's partial output (A Σ y = Σ A y), and
each rank adds B's part of its own share of the tokens to its partial output, so that the BaseOp's collective ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muxtune.executor.peft.base import Adapter, Entry, Place
from muxtune.spec.peft.bottleneck import Bottleneck

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class BottleneckAdapter(Adapter):
    """A (rank, out) starts as N(0, 1/out); B (out, rank) starts at zero, so that the first forward is the backbone's."""

    spec: Bottleneck

    def __init__(self, spec: Bottleneck, place: Place, generator: torch.Generator) -> None:
        super().__init__(spec, place, generator)
        width = place.whole[1]
        whole = torch.randn(spec.rank, width, generator=generator) / width**0.5
        self.a = self._parameter(place.cut_out(whole, 1))
        self.b = self._parameter(torch.zeros(place.features[1], spec.rank))

    def replicated(self) -> tuple[torch.nn.Parameter, ...]:
        """Both beside a row-parallel base."""
        return () if self.place.column_parallel else (self.a, self.b)

    def share(self, start: int, end: int) -> slice:
        """The rows whose way up this rank computes, counted from `start`."""
        if self.place.column_parallel:
            return slice(0, end - start)
        tokens, tp, rank = end - start, self.place.tp, self.place.tp_rank
        return slice(tokens * rank // tp, tokens * (rank + 1) // tp)

    def offset(self) -> Tensor | None:
        """The bias that the base adds later but the adapter sees: once over the partial outputs of a row-parallel base."""
        return self.place.late_bias if self.place.column_parallel or self.place.tp_rank == 0 else None

    @staticmethod
    def apply_group(out: Tensor, x: Tensor, entries: Sequence[Entry], counters: Tensor | None) -> Tensor:
        """base + B act(A base)."""
        weights = [w.to(x.dtype) for adapter, _, _ in entries for w in (adapter.a, adapter.b)]
        return _Serial.apply(out, x.requires_grad, tuple(entries), *weights)  # type: ignore[no-any-return]


class _Serial(torch.autograd.Function):
    """Saves each entry's base output and summed h = A y."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, live: bool, entries: tuple[Entry, ...], *weights: Tensor) -> Tensor:
        seen, inner = [], []
        for i, (adapter, start, end) in enumerate(entries):
            offset = adapter.offset()
            seen.append(out[start:end].clone() if offset is None else out[start:end] + offset)
            inner.append(seen[i] @ weights[2 * i].T)
        entries[0][0].place.sum_over_tp(inner)
        for i, (adapter, start, end) in enumerate(entries):
            rows = adapter.share(start, end)
            out[start:end][rows].addmm_(ACTIVATIONS[adapter.spec.activation](inner[i][rows]), weights[2 * i + 1].T)
        ctx.live, ctx.entries = live, entries
        ctx.save_for_backward(*weights, *seen, *inner)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, count = grads[0], len(ctx.entries)
        weights, seen, inner = (ctx.saved_tensors[a * count : b * count] for a, b in ((0, 2), (2, 3), (3, 4)))
        inner_gradients: list[Tensor] = []
        found: list[Tensor] = []
        for i, (adapter, start, end) in enumerate(ctx.entries):
            rows = adapter.share(start, end)
            gradient = dy[start:end][rows]
            with torch.enable_grad():
                h = inner[i][rows].detach().requires_grad_(True)
                active = ACTIVATIONS[adapter.spec.activation](h)
            dh = torch.zeros_like(inner[i])
            dh[rows] = torch.autograd.grad(active, h, gradient @ weights[2 * i + 1])[0]
            inner_gradients.append(dh)
            found += [dh, (active.detach().T @ gradient).T.contiguous()]
        ctx.entries[0][0].place.sum_over_tp(inner_gradients)
        passed = dy.clone() if ctx.live else dy
        for i, (_, start, end) in enumerate(ctx.entries):
            found[2 * i] = inner_gradients[i].T @ seen[i]
            if ctx.live:
                passed[start:end].addmm_(inner_gradients[i], weights[2 * i])
        return passed if ctx.needs_input_grad[0] else None, None, None, *found
