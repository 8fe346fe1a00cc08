"""Triton kernels of grouped LoRA over all groups at once: shrink (h = x Wᵀ), expand (y += s · h W), wgrad (dW = s · hᵀ g).

A weight is W (rank, width), read at offset + r · stride_r + c · stride_c of a flat buffer: A as it is, B (out, rank) transposed.
Every output is written by one program in one order of sums, so the result is the same bits each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from muxtune.kernels._choice import interpreted
from muxtune.kernels._dropout import GOLDEN

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
