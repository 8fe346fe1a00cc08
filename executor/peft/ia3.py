"""(IA)³ on a sharded BaseOp: scales a column-parallel one's outputs or a row-parallel one's inputs, always the sharded side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from muxtune.executor.peft.base import Adapter, Entry, Place
from muxtune.spec.peft.ia3 import IA3


class IA3Adapter(Adapter):
    """The vector starts at one, so that the first forward is the backbone's."""

    spec: IA3

    def __init__(self, spec: IA3, place: Place, generator: torch.Generator) -> None:
        super().__init__(spec, place, generator)
        self.scale = self._parameter(torch.ones(spec.width(*place.features, place.column_parallel)))

    @staticmethod
    def dispatch_group(x: Tensor, entries: Sequence[Entry]) -> Tensor:
        """Row-parallel: base gets l ⊙ x, in a copy of x."""
        own = [e for e in entries if not e[0].place.column_parallel]
        return _scale(x.clone(), x, own) if own else x

    @staticmethod
    def apply_group(out: Tensor, x: Tensor, entries: Sequence[Entry], counters: Tensor | None) -> Tensor:
        """Column-parallel: l ⊙ (base output with its bias), in place."""
        own = [e for e in entries if e[0].place.column_parallel]
        return _scale(out, x, own) if own else out


def _scale(target: Tensor, x: Tensor, entries: Sequence[Entry]) -> Tensor:
    vectors = [adapter.scale.to(x.dtype) for adapter, _, _ in entries]
    return _Scale.apply(target, x.requires_grad, tuple(entries), *vectors)  # type: ignore[no-any-return]


class _Scale(torch.autograd.Function):
    """In place; saves each entry's rows as they were."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, live: bool, entries: tuple[Entry, ...], *vectors: Tensor) -> Tensor:
        seen = []
        for vector, (adapter, start, end) in zip(vectors, entries, strict=True):
            rows, bias = target[start:end], adapter.place.late_bias if adapter.place.column_parallel else None
            seen.append(rows.clone() if bias is None else rows + bias)
            torch.mul(seen[-1], vector, out=rows)
            if bias is not None:
                rows.sub_(bias)
        ctx.live, ctx.entries = live, entries
        ctx.save_for_backward(*vectors, *seen)
        ctx.mark_dirty(target)
        return target

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, count = grads[0], len(ctx.entries)
        vectors, seen = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        passed = dy.clone() if ctx.live else dy
        found = []
        for vector, rows, (_, start, end) in zip(vectors, seen, ctx.entries, strict=True):
            found.append((dy[start:end] * rows).sum(0))
            if ctx.live:
                torch.mul(dy[start:end], vector, out=passed[start:end])
        return passed if ctx.needs_input_grad[0] else None, None, None, *found
