"""Triton side of grouped LoRA: shrink (h = x Wᵀ), expand (y += s · h W) and wgrad (dW = s · hᵀ g), each over all groups at once.

A weight is W (rank, width), read at offset + r · stride_r + c · stride_c of a flat buffer: A as it is, B (out, rank) transposed.
Every output is written by one program in one order of sums, so the result is the same bits each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from muxtune.kernels._choice import interpreted
from muxtune.kernels._dropout import GOLDEN, token_hashes

#: The interpreter computes bf16 on its bits and is wrong: there everything is widened first. A compiled kernel keeps the dtype.
INTERPRETED = tl.constexpr(interpreted())
PHI = tl.constexpr(GOLDEN)


@triton.jit
def _mix(v):
    """MurmurHash3's finaliser on uint32 (kernels/_dropout.py)."""
    v = (v ^ (v >> 16)) * 0x85EBCA6B
    v = (v ^ (v >> 13)) * 0xC2B2AE35
    return v ^ (v >> 16)


@triton.jit
def _kept(hashes, columns, key, first_column, threshold):
    """(rows, columns) bool: which elements a dropout leaves."""
    numbers = (columns + first_column).to(tl.uint32) * PHI + key.to(tl.uint32)
    v = _mix(hashes.to(tl.uint32)[:, None] ^ _mix(numbers)[None, :])
    return v.to(tl.int64) >= threshold


@triton.jit
def shrink(
    x, w, h, tiles, table, floats, hashes,
    width, stride_x, stride_h,
    SIDE: tl.constexpr, SCALED: tl.constexpr, DROPS: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    """h[rows] = (scale ·) drop(x[rows]) Wᵀ, one program a tile of rows of one group."""
    tile = tiles + tl.program_id(0) * 3
    group, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row = table + group * 10
    rank = tl.load(row)
    offset, stride_r, stride_c = tl.load(row + 1 + 3 * SIDE), tl.load(row + 2 + 3 * SIDE), tl.load(row + 3 + 3 * SIDE)
    rows, ranks = first + tl.arange(0, BM), tl.arange(0, BR)
    live, used = rows < end, ranks < rank
    total = tl.zeros((BM, BR), dtype=tl.float32)
    for start in range(0, width, BK):
        columns = start + tl.arange(0, BK)
        inside = columns < width
        a = tl.load(
            x + rows.to(tl.int64)[:, None] * stride_x + columns[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
        )
        b = tl.load(
            w + offset + ranks[None, :] * stride_r + columns[:, None] * stride_c,
            mask=used[None, :] & inside[:, None],
            other=0.0,
        )
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        if DROPS:
            gain = tl.load(floats + group * 2 + 1)
            stays = _kept(
                tl.load(hashes + rows, mask=live, other=0),
                columns,
                tl.load(row + 7),
                tl.load(row + 8),
                tl.load(row + 9),
            )
            a = tl.where(stays, a * gain, 0.0).to(b.dtype)
        total = tl.dot(a, b, total, input_precision="ieee")
    if SCALED:
        total = total * tl.load(floats + group * 2)
    at = h + rows.to(tl.int64)[:, None] * stride_h + ranks[None, :]
    tl.store(at, total.to(h.dtype.element_ty), mask=live[:, None])


@triton.jit
def expand(
    h, w, y, tiles, table, floats, hashes,
    width, stride_h, stride_y,
    SIDE: tl.constexpr, SCALED: tl.constexpr, ADDS: tl.constexpr, DROPS: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """y[rows] (+)= (scale ·) h[rows] W, through the dropout of a backward; one program a tile of rows and columns."""
    tile = tiles + tl.program_id(0) * 3
    group, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row = table + group * 10
    rank = tl.load(row)
    offset, stride_r, stride_c = tl.load(row + 1 + 3 * SIDE), tl.load(row + 2 + 3 * SIDE), tl.load(row + 3 + 3 * SIDE)
    rows, ranks = first + tl.arange(0, BM), tl.arange(0, BR)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    live, used, inside = rows < end, ranks < rank, columns < width
    a = tl.load(
        h + rows.to(tl.int64)[:, None] * stride_h + ranks[None, :], mask=live[:, None] & used[None, :], other=0.0
    )
    b = tl.load(
        w + offset + ranks[:, None] * stride_r + columns[None, :] * stride_c,
        mask=used[:, None] & inside[None, :],
        other=0.0,
    )
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    total = tl.dot(a, b, input_precision="ieee")
    if SCALED:
        total = total * tl.load(floats + group * 2)
    if DROPS:
        stays = _kept(
            tl.load(hashes + rows, mask=live, other=0), columns, tl.load(row + 7), tl.load(row + 8), tl.load(row + 9)
        )
        total = tl.where(stays, total * tl.load(floats + group * 2 + 1), 0.0)
    at = y + rows.to(tl.int64)[:, None] * stride_y + columns[None, :]
    mask = live[:, None] & inside[None, :]
    if ADDS:
        total = total + tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def wgrad(
    h, g, dw, spans, table, floats, hashes,
    width, stride_h, stride_g,
    SIDE: tl.constexpr, SCALED: tl.constexpr, DROPS: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """dW = (scale ·) h[rows]ᵀ drop(g[rows]), one program a group and tile of columns, rows summed in order."""
    group = tl.program_id(0)
    first, end = tl.load(spans + group * 2), tl.load(spans + group * 2 + 1)
    row = table + group * 10
    rank = tl.load(row)
    offset, stride_r, stride_c = tl.load(row + 1 + 3 * SIDE), tl.load(row + 2 + 3 * SIDE), tl.load(row + 3 + 3 * SIDE)
    ranks = tl.arange(0, BR)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    used, inside = ranks < rank, columns < width
    total = tl.zeros((BR, BN), dtype=tl.float32)
    for start in range(first, end, BM):
        rows = start + tl.arange(0, BM)
        live = rows < end
        a = tl.load(
            h + rows.to(tl.int64)[None, :] * stride_h + ranks[:, None], mask=live[None, :] & used[:, None], other=0.0
        )
        b = tl.load(
            g + rows.to(tl.int64)[:, None] * stride_g + columns[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
        )
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        if DROPS:
            stays = _kept(
                tl.load(hashes + rows, mask=live, other=0),
                columns,
                tl.load(row + 7),
                tl.load(row + 8),
                tl.load(row + 9),
            )
            b = tl.where(stays, b * tl.load(floats + group * 2 + 1), 0.0).to(a.dtype)
        total = tl.dot(a, b, total, input_precision="ieee")
    if SCALED:
        total = total * tl.load(floats + group * 2)
    at = dw + offset + ranks[:, None] * stride_r + columns[None, :] * stride_c
    tl.store(at, total.to(dw.dtype.element_ty), mask=used[:, None] & inside[None, :])


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows, columns and depth of a tile, and warps that share it."""

    rows: int
    columns: int
    depth: int
    warps: int


def tile_of(rank: int, element_bytes: int) -> Tile:
    """The tile for a padded rank: smaller at large ranks and in fp32, so that the accumulators stay in registers."""
    if element_bytes == 4:
        return Tile(32, 64, 32, 4) if rank <= 64 else Tile(16, 32, 32, 8)
    if rank <= 64:
        return Tile(64, 128, 64, 4)
    return Tile(32, 64, 32, 8) if rank <= 128 else Tile(16, 64, 32, 8)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where everything of a call lies: tiles of rows, row spans, and per group rank, places of A and B, and dropout."""

    tiles: Tensor
    spans: Tensor
    table: Tensor
    floats: Tensor
    hashes: Tensor
    drops: bool
    padded_rank: int
    tile: Tile


def _layout(groups: Sequence[Any], weights: Sequence[Tensor], counters: Tensor | None, device: torch.device) -> _Layout:
    """Group table (rank; offset, stride_r, stride_c of A and of B; dropout key, first column, threshold), on the device."""
    ranks = [w.size(0) for w in weights[0::2]]
    padded = max(16, triton.next_power_of_2(max(ranks)))
    tile = tile_of(padded, weights[0].element_size())
    table, floats, offset = [], [], 0
    for i, (group, rank) in enumerate(zip(groups, ranks, strict=True)):
        a, b = weights[2 * i], weights[2 * i + 1]
        drop = group.dropout
        choice = (drop.key, drop.first_column, drop.threshold) if drop else (0, 0, 0)
        table.append((rank, offset, a.size(1), 1, offset + a.numel(), 1, rank, *choice))
        floats.append((group.scale, drop.gain if drop else 1.0))
        offset += a.numel() + b.numel()
    tiles = [(i, start, g.end) for i, g in enumerate(groups) for start in range(g.start, g.end, tile.rows)]
    drops = any(g.dropout for g in groups)
    hashes = torch.zeros(1, dtype=torch.int64, device=device)
    if drops and counters is not None:
        hashes = torch.zeros_like(counters)
        for group in groups:
            if group.dropout:
                hashes[group.start : group.end] = token_hashes(group.dropout, counters[group.start : group.end])
    return _Layout(
        torch.tensor(tiles, dtype=torch.int64).reshape(-1, 3).to(device),
        torch.tensor([(g.start, g.end) for g in groups], dtype=torch.int64).to(device),
        torch.tensor(table, dtype=torch.int64).to(device),
        torch.tensor(floats, dtype=torch.float32).to(device),
        hashes,
        drops,
        padded,
        tile,
    )


def apply(out: Tensor, x: Tensor, groups: tuple[Any, ...], counters: Tensor | None, *weights: Tensor) -> Tensor:
    """`grouped_lora.forward` by Triton's kernels."""
    if not groups:
        return out
    flat = torch.cat([w.reshape(-1) for w in weights])
    layout = _layout(groups, weights, counters, x.device)
    return _Grouped.apply(out, x, flat, layout)  # type: ignore[no-any-return]


class _Grouped(torch.autograd.Function):
    """Two launches forward, five backward; saves x, the flat weights and h."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, flat: Tensor, layout: _Layout) -> Tensor:
        x = x.contiguous()
        h = x.new_empty(x.size(0), layout.padded_rank)
        _run_shrink(x, flat, h, layout, side=0, scaled=False, drops=layout.drops)
        _run_expand(h, flat, out, layout, side=1, scaled=True, adds=True, drops=False)
        ctx.layout = layout
        ctx.save_for_backward(x, flat, h)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, layout = grads[0].contiguous(), ctx.layout
        x, flat, h = ctx.saved_tensors
        dh, dflat = torch.empty_like(h), torch.zeros_like(flat)
        _run_shrink(dy, flat, dh, layout, side=1, scaled=True, drops=False)
        _run_wgrad(dh, x, dflat, layout, side=0, scaled=False, drops=layout.drops)
        _run_wgrad(h, dy, dflat, layout, side=1, scaled=True, drops=False)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = torch.zeros_like(x)
            _run_expand(dh, flat, dx, layout, side=0, scaled=False, adds=False, drops=layout.drops)
        return grads[0] if ctx.needs_input_grad[0] else None, dx, dflat, None


def _run_shrink(x: Tensor, w: Tensor, h: Tensor, layout: _Layout, *, side: int, scaled: bool, drops: bool) -> None:
    if not len(layout.tiles):
        return
    shrink[(len(layout.tiles),)](
        x, w, h, layout.tiles, layout.table, layout.floats, layout.hashes, x.size(1), x.stride(0), h.stride(0),
        SIDE=side, SCALED=scaled, DROPS=drops, BM=layout.tile.rows, BR=layout.padded_rank,
        BK=layout.tile.depth, num_warps=layout.tile.warps,
    )  # fmt: skip


def _run_expand(
    h: Tensor, w: Tensor, y: Tensor, layout: _Layout, *, side: int, scaled: bool, adds: bool, drops: bool
) -> None:
    if not len(layout.tiles):
        return
    columns = layout.tile.columns
    expand[(len(layout.tiles), triton.cdiv(y.size(1), columns))](
        h, w, y, layout.tiles, layout.table, layout.floats, layout.hashes, y.size(1), h.stride(0), y.stride(0),
        SIDE=side, SCALED=scaled, ADDS=adds, DROPS=drops, BM=layout.tile.rows, BR=layout.padded_rank,
        BN=columns, num_warps=layout.tile.warps,
    )  # fmt: skip


def _run_wgrad(h: Tensor, g: Tensor, dw: Tensor, layout: _Layout, *, side: int, scaled: bool, drops: bool) -> None:
    columns = layout.tile.columns
    wgrad[(len(layout.spans), triton.cdiv(g.size(1), columns))](
        h, g, dw, layout.spans, layout.table, layout.floats, layout.hashes, g.size(1), h.stride(0), g.stride(0),
        SIDE=side, SCALED=scaled, DROPS=drops, BM=layout.tile.rows, BR=layout.padded_rank,
        BN=columns, num_warps=layout.tile.warps,
    )  # fmt: skip
