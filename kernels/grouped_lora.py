"""Grouped LoRA: out[a:b] += scale_k · (x[a:b] A_kᵀ) B_kᵀ for each task's token range [a, b), in place, one call for all tasks.

Backward: dh = scale · dy B, dB = scale · dyᵀ h, dA = dhᵀ x, dx = dh A. Rows of a task only ever meet their own adapter.
With dropout x is drop(x) in the adapter's path. Back ends: a loop of addmm, torch._grouped_mm, Triton (kernels/_choice.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muxtune.kernels._choice import Kernel, chosen
from muxtune.kernels._dropout import Dropout, drop, kept

__all__ = ["Dropout", "Group", "Shape", "forward", "inputs", "reference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One task's rows [start, end) of the flat token axis, its alpha / rank and its dropout."""

    start: int
    end: int
    scale: float
    dropout: Dropout | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A test case: tokens, rank and dropout rate of each task, and the base linear's features."""

    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    features_in: int
    features_out: int
    rates: tuple[float, ...] = ()


SHAPES = (
    Shape(tokens=(5, 7, 3), ranks=(4, 8, 1), features_in=16, features_out=24),
    Shape(tokens=(64,), ranks=(8,), features_in=32, features_out=32),
    Shape(tokens=(1, 1, 30, 2), ranks=(2, 16, 4, 8), features_in=48, features_out=20),
    Shape(tokens=(9, 0, 20), ranks=(8, 4, 3), features_in=40, features_out=56),
    Shape(tokens=(6, 17), ranks=(256, 33), features_in=24, features_out=16),
    Shape(tokens=(12, 8, 5), ranks=(4, 8, 2), features_in=33, features_out=17, rates=(0.5, 0.0, 0.1)),
)
#: Relative error of values and of every gradient against `reference` in fp64; half precision rounds h and the output.
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.5e-2}


def reference(
    out: Tensor, x: Tensor, groups: Sequence[Group], weights: Sequence[Tensor], counters: Tensor | None = None
) -> Tensor:
    """Plain torch, out of place: `out` (tokens, out), `x` (tokens, in), `weights` A_1, B_1, A_2, B_2, …"""
    parts, end = [], 0
    for i, group in enumerate(groups):
        parts.append(out[end : group.start])
        rows = slice(group.start, group.end)
        seen = x[rows]
        if group.dropout is not None:
            assert counters is not None
            seen = drop(seen, kept(group.dropout, counters[rows], x.size(1)), group.dropout)
        parts.append(out[rows] + group.scale * (seen @ weights[2 * i].T) @ weights[2 * i + 1].T)
        end = group.end
    return torch.cat([*parts, out[end:]])


def forward(
    out: Tensor,
    x: Tensor,
    groups: Sequence[Group],
    weights: Sequence[Tensor],
    counters: Tensor | None = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Same values as `reference`; `out` is overwritten.

    Args:
        out: base output, (tokens, out), not needed by anybody else.
        x: input of the base linear, (tokens, in).
        groups: disjoint token ranges in ascending order.
        weights: A_k (rank, in) and B_k (out, rank) of each group, in group order.
        counters: (tokens,) int64, the token numbers that a dropout is a function of.
        kernel: a back end for this call; the process's choice by default.

    Raises:
        ValueError: a dropout without counters, or a back end that this device does not have.
    """
    if counters is None and any(g.dropout for g in groups):
        raise ValueError("a group has dropout: give `counters`, the numbers of the tokens")
    name = chosen(x.device, kernel)
    if name == "triton":
        # Imported where it is used: the loop needs no Triton.
        from muxtune.kernels import _lora_triton  # noqa: PLC0415

        return _lora_triton.apply(out, x, tuple(groups), counters, *weights)
    if name == "grouped-mm" and any(n * x.element_size() % 16 for n in (x.size(1), out.size(1))):
        raise ValueError(
            f"kernel='grouped-mm': widths {x.size(1)} and {out.size(1)} are not whole 16 bytes: take the loop"
        )
    function = _GroupedMM if name == "grouped-mm" and groups else _Loop
    return function.apply(out, x, tuple(groups), counters, *weights)  # type: ignore[no-any-return]


def _masks(groups: Sequence[Group], counters: Tensor | None, columns: int) -> list[Tensor | None]:
    """Each group's dropout mask over its rows; None where it has none."""
    return [
        None if g.dropout is None or counters is None else kept(g.dropout, counters[g.start : g.end], columns)
        for g in groups
    ]


def _dropped(x: Tensor, group: Group, mask: Tensor | None) -> Tensor:
    """What a group's adapter sees of x."""
    rows = x[group.start : group.end]
    return rows if mask is None or group.dropout is None else drop(rows, mask, group.dropout)


class _Loop(torch.autograd.Function):
    """Loop over groups with addmm; saves x and each h = x Aᵀ."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, groups: tuple[Group, ...], counters: Tensor | None, *weights: Tensor
    ) -> Tensor:
        inner = []
        for i, (group, mask) in enumerate(zip(groups, _masks(groups, counters, x.size(1)), strict=True)):
            h = _dropped(x, group, mask) @ weights[2 * i].T
            out[group.start : group.end].addmm_(h, weights[2 * i + 1].T, alpha=group.scale)
            inner.append(h)
        ctx.groups, ctx.counters = groups, counters
        ctx.save_for_backward(x, *weights, *inner)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        count = len(ctx.groups)
        x, *rest = ctx.saved_tensors
        weights, inner = rest[: 2 * count], rest[2 * count :]
        masks = _masks(ctx.groups, ctx.counters, x.size(1))
        dx = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        found: list[Tensor | None] = []
        for i, group in enumerate(ctx.groups):
            rows = slice(group.start, group.end)
            dh = torch.mm(dy[rows], weights[2 * i + 1]).mul_(group.scale)
            # dyᵀ h as (hᵀ dy)ᵀ: BLAS walks the wide matrix along its rows, 20 times faster at rank 4 on a CPU.
            found += [dh.T @ _dropped(x, group, masks[i]), (inner[i].T @ dy[rows]).mul_(group.scale).T.contiguous()]
            if dx is not None:
                torch.mm(dh, weights[2 * i], out=dx[rows])
                if masks[i] is not None:
                    dx[rows] = drop(dx[rows], masks[i], group.dropout)
        return dy if ctx.needs_input_grad[0] else None, dx, None, None, *found


class _GroupedMM(torch.autograd.Function):
    """Six calls of torch._grouped_mm over weights padded to one rank and stacked; rows of no group are left out."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, groups: tuple[Group, ...], counters: Tensor | None, *weights: Tensor
    ) -> Tensor:
        a, b = _stacked(weights[0::2], 0), _stacked([w.T for w in weights[1::2]], 0)
        seen = _gathered(x, groups, _masks(groups, counters, x.size(1)))
        ends = _ends(groups, x.device)
        h = torch._grouped_mm(seen, a.transpose(1, 2), offs=ends)
        added = torch._grouped_mm(_scaled(h, groups), b, offs=ends)
        for group, part in zip(groups, added.split(_sizes(groups)), strict=True):
            out[group.start : group.end].add_(part)
        ctx.groups, ctx.counters = groups, counters
        ctx.ranks = [w.size(0) for w in weights[0::2]]
        ctx.save_for_backward(x, a, b, h)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, groups = grads[0], ctx.groups
        x, a, b, h = ctx.saved_tensors
        ends, masks = _ends(groups, x.device), _masks(groups, ctx.counters, x.size(1))
        above = _gathered(dy, groups, [None] * len(groups))
        dh = _scaled(torch._grouped_mm(above, b.transpose(1, 2), offs=ends), groups)
        da = torch._grouped_mm(dh.T, _gathered(x, groups, masks), offs=ends)
        db = torch._grouped_mm(_scaled(h, groups).T, above, offs=ends)
        dx = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        if dx is not None:
            parts = torch._grouped_mm(dh, a, offs=ends).split(_sizes(groups))
            for group, mask, part in zip(groups, masks, parts, strict=True):
                dx[group.start : group.end] = part if mask is None else drop(part, mask, group.dropout)
        found = []
        for i, rank in enumerate(ctx.ranks):
            empty = groups[i].start == groups[i].end
            found += [_gradient(da[i, :rank], empty), _gradient(db[i, :rank].T.contiguous(), empty)]
        return dy if ctx.needs_input_grad[0] else None, dx, None, None, *found


def _gradient(found: Tensor, empty: bool) -> Tensor:
    """A group without rows leaves its part of the result unwritten."""
    return torch.zeros_like(found) if empty else found


def _sizes(groups: Sequence[Group]) -> list[int]:
    return [g.end - g.start for g in groups]


def _ends(groups: Sequence[Group], device: torch.device) -> Tensor:
    """Where each group ends among the gathered rows, int32."""
    return torch.tensor(_sizes(groups), device=device).cumsum(0).to(torch.int32)


def _gathered(x: Tensor, groups: Sequence[Group], masks: Sequence[Tensor | None]) -> Tensor:
    """The groups' rows one after the other."""
    return torch.cat([_dropped(x, g, m) for g, m in zip(groups, masks, strict=True)])


def _scaled(h: Tensor, groups: Sequence[Group]) -> Tensor:
    scales = torch.tensor([g.scale for g in groups], dtype=h.dtype, device=h.device)
    return h * scales.repeat_interleave(torch.tensor(_sizes(groups), device=h.device))[:, None]


def _stacked(weights: Sequence[Tensor], dim: int) -> Tensor:
    """(groups, rank, features): each padded with zeros to one rank that fills whole 16 bytes."""
    unit = 16 // weights[0].element_size()
    rank = -(-max(w.size(dim) for w in weights) // unit) * unit
    made = weights[0].new_zeros(len(weights), rank, weights[0].size(1))
    for i, weight in enumerate(weights):
        made[i, : weight.size(0)] = weight
    return made


def inputs(
    shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, tuple[Group, ...], tuple[Tensor, ...], Tensor]:
    """Seeded arguments of `forward` for a shape; the last token belongs to no group."""
    generator = torch.Generator().manual_seed(seed)
    groups, weights, end = [], [], 0
    rates = shape.rates or (0.0,) * len(shape.tokens)
    for i, (tokens, rank, rate) in enumerate(zip(shape.tokens, shape.ranks, rates, strict=True)):
        dropout = Dropout(rate=rate, key=1000 + i, step=3) if rate else None
        groups.append(Group(start=end, end=end + tokens, scale=2.0 / rank, dropout=dropout))
        end += tokens
        weights.append(torch.randn(rank, shape.features_in, generator=generator).to(dtype))
        weights.append(torch.randn(shape.features_out, rank, generator=generator).to(dtype))
    x = torch.randn(end + 1, shape.features_in, generator=generator).to(dtype)
    out = torch.randn(end + 1, shape.features_out, generator=generator).to(dtype)
    return out, x, tuple(groups), tuple(weights), torch.arange(end + 1)
