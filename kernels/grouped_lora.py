"""Grouped LoRA: out[a:b] += scale_k · (x[a:b] A_kᵀ) B_kᵀ for each task's token range [a, b), in place, one call for all tasks.

Backward: dh = scale · dy B, dB = scale · dyᵀ h, dA = dhᵀ x, dx = dh A. Rows of a task only ever meet their own adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One task's rows [start, end) of the flat token axis and its alpha / rank."""

    start: int
    end: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A test case: tokens and rank of each task, and the base linear's features."""

    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    features_in: int
    features_out: int


SHAPES = (
    Shape(tokens=(5, 7, 3), ranks=(4, 8, 1), features_in=16, features_out=24),
    Shape(tokens=(64,), ranks=(8,), features_in=32, features_out=32),
    Shape(tokens=(1, 1, 30, 2), ranks=(2, 16, 4, 8), features_in=48, features_out=20),
)
#: Relative error of values and of every gradient against `reference`.
TOLERANCE = {"fp32": 1e-5}


def reference(out: Tensor, x: Tensor, groups: Sequence[Group], weights: Sequence[Tensor]) -> Tensor:
    """Plain torch, out of place: `out` (tokens, out), `x` (tokens, in), `weights` A_1, B_1, A_2, B_2, …"""
    parts, end = [], 0
    for i, group in enumerate(groups):
        parts.append(out[end : group.start])
        rows = slice(group.start, group.end)
        parts.append(out[rows] + group.scale * (x[rows] @ weights[2 * i].T) @ weights[2 * i + 1].T)
        end = group.end
    return torch.cat([*parts, out[end:]])


def forward(out: Tensor, x: Tensor, groups: Sequence[Group], weights: Sequence[Tensor]) -> Tensor:
    """Same values as `reference`; `out` is overwritten.

    Args:
        out: base output, (tokens, out), not needed by anybody else.
        x: input of the base linear, (tokens, in).
        groups: disjoint token ranges in ascending order.
        weights: A_k (rank, in) and B_k (out, rank) of each group, in group order.
    """
    return _GroupedLoRA.apply(out, x, tuple(groups), *weights)  # type: ignore[no-any-return]


class _GroupedLoRA(torch.autograd.Function):
    """Loop over groups with addmm; saves x and each h = x Aᵀ."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, groups: tuple[Group, ...], *weights: Tensor) -> Tensor:
        inner = []
        for i, group in enumerate(groups):
            h = x[group.start : group.end] @ weights[2 * i].T
            out[group.start : group.end].addmm_(h, weights[2 * i + 1].T, alpha=group.scale)
            inner.append(h)
        ctx.groups = groups
        ctx.save_for_backward(x, *weights, *inner)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        count = len(ctx.groups)
        x, *rest = ctx.saved_tensors
        weights, inner = rest[: 2 * count], rest[2 * count :]
        dx = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        found: list[Tensor | None] = []
        for i, group in enumerate(ctx.groups):
            rows = slice(group.start, group.end)
            dh = torch.mm(dy[rows], weights[2 * i + 1]).mul_(group.scale)
            # dyᵀ h as (hᵀ dy)ᵀ: BLAS walks the wide matrix along its rows, 20 times faster at rank 4 on a CPU.
            found += [dh.T @ x[rows], (inner[i].T @ dy[rows]).mul_(group.scale).T.contiguous()]
            if dx is not None:
                torch.mm(dh, weights[2 * i], out=dx[rows])
        return dy if ctx.needs_input_grad[0] else None, dx, None, *found


def inputs(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor, tuple[Group, ...], tuple[Tensor, ...]]:
    """Seeded fp32 arguments of `forward` for a shape; the last token belongs to no group."""
    generator = torch.Generator().manual_seed(seed)
    groups, weights, end = [], [], 0
    for tokens, rank in zip(shape.tokens, shape.ranks, strict=True):
        groups.append(Group(start=end, end=end + tokens, scale=2.0 / rank))
        end += tokens
        weights.append(torch.randn(rank, shape.features_in, generator=generator))
        weights.append(torch.randn(shape.features_out, rank, generator=generator))
    x = torch.randn(end + 1, shape.features_in, generator=generator)
    return torch.randn(end + 1, shape.features_out, generator=generator), x, tuple(groups), tuple(weights)
