"""DoRA on a sharded BaseOp: LoRA's sides, and a magnitude an output over the norms of W + s·B A's rows.

A row-parallel BaseOp's rows are cut over tp, so their squared norms are summed; scaling a partial output is scaling the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from muxtune.executor.peft.base import Adapter, Entry, Place
from muxtune.spec.peft.dora import DoRA

#: Squared norms are not divided by below this.
LEAST_SQUARE = 1e-12


class DoRAAdapter(Adapter):
    """A (rank, in) starts as N(0, 1/in), B (out, rank) at zero, m (out,) at ‖W‖: the first forward is the backbone's."""

    spec: DoRA
    squares: Tensor

    def __init__(self, spec: DoRA, place: Place, generator: torch.Generator) -> None:
        super().__init__(spec, place, generator)
        width = place.whole[0]
        whole = torch.randn(spec.rank, width, generator=generator) / width**0.5
        self.a = self._parameter(place.cut_in(whole, 1))
        self.b = self._parameter(torch.zeros(place.features[1], spec.rank))
        assert place.weight is not None
        squares = place.weight.detach().float().square().sum(1)
        self.register_buffer("squares", squares, persistent=False)
        norms = squares.clone()
        if not place.column_parallel:
            place.sum_over_tp([norms])
        self.m = self._parameter(norms.clamp_min(LEAST_SQUARE).sqrt())

    def replicated(self) -> tuple[torch.nn.Parameter, ...]:
        """A beside a column-parallel base, B and m beside a row-parallel one."""
        return (self.a,) if self.place.column_parallel else (self.b, self.m)

    def shard_squares(self, a: Tensor, b: Tensor) -> Tensor:
        """Squared norm of each row of this rank's shard of W + s·B A, fp32."""
        assert self.place.weight is not None
        s = self.spec.scale
        cross = ((self.place.weight @ a.T).float() * b.float()).sum(1)
        own = ((b.float() @ (a @ a.T).float()) * b.float()).sum(1)
        return self.squares + 2 * s * cross + s * s * own

    @staticmethod
    def apply_group(out: Tensor, x: Tensor, entries: Sequence[Entry], counters: Tensor | None) -> Tensor:
        """m / ‖W + s·B A‖ ⊙ (base + s·B (A x)); a bias is not scaled."""
        weights = [w.to(x.dtype) for adapter, _, _ in entries for w in (adapter.a, adapter.b, adapter.m)]
        return _Magnitude.apply(out, x, tuple(entries), *weights)  # type: ignore[no-any-return]


class _Magnitude(torch.autograd.Function):
    """Saves x, each h = A x and each output before its magnitude; norms are constants of the backward."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, entries: tuple[Entry, ...], *weights: Tensor) -> Tensor:
        squares = [a.shard_squares(*weights[3 * i : 3 * i + 2]) for i, (a, _, _) in enumerate(entries)]
        if not entries[0][0].place.column_parallel:
            entries[0][0].place.sum_over_tp(squares)
        inner, seen, norms = [], [], [s.clamp_min(LEAST_SQUARE).sqrt().to(x.dtype) for s in squares]
        for i, (adapter, start, end) in enumerate(entries):
            a, b, m = weights[3 * i : 3 * i + 3]
            rows, bias = out[start:end], adapter.place.bias
            inner.append(x[start:end] @ a.T)
            seen.append(rows - bias if bias is not None else rows.clone())
            seen[-1].addmm_(inner[-1], b.T, alpha=adapter.spec.scale)
            torch.mul(seen[-1], m / norms[i], out=rows)
            if bias is not None:
                rows.add_(bias)
        ctx.entries = entries
        ctx.save_for_backward(x, *weights, *inner, *seen, *norms)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, count, (x, *rest) = grads[0], len(ctx.entries), ctx.saved_tensors
        weights, inner, seen, norms = (rest[a * count : b * count] for a, b in ((0, 3), (3, 4), (4, 5), (5, 6)))
        dx = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        passed = dy.clone() if dx is not None else dy
        found: list[Tensor] = []
        for i, (adapter, start, end) in enumerate(ctx.entries):
            a, b, m = weights[3 * i : 3 * i + 3]
            gradient = dy[start:end] * (m / norms[i])
            scaled = gradient * adapter.spec.scale
            dh = scaled @ b
            magnitude = (dy[start:end] * seen[i]).sum(0) / norms[i]
            found += [dh.T @ x[start:end], (inner[i].T @ scaled).T.contiguous(), magnitude]
            if dx is not None:
                torch.mm(dh, a, out=dx[start:end])
                passed[start:end] = gradient
        return passed if ctx.needs_input_grad[0] else None, dx, None, *found
