"""Launches of grouped LoRA's Triton kernels (kernels/_lora_kernels.py) as one autograd function, and the tables they read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from muxtune.kernels._dropout import token_hashes
from muxtune.kernels._lora_kernels import expand, shrink, wgrad


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
class _Tables:
    """What says where everything of a call lies: tiles of rows, row spans, and a row of numbers a group."""

    tiles: Tensor
    spans: Tensor
    table: Tensor
    floats: Tensor
    padded_rank: int
    tile: Tile


@lru_cache(maxsize=1024)
def _tables(
    groups: tuple[Any, ...], shapes: tuple[tuple[int, int], ...], element_bytes: int, device: torch.device
) -> _Tables:
    """Row of a group: rank; offset, stride_r, stride_c of A and of B; dropout key, first column, threshold.

    Remembered, so that the layers and steps of a run copy them to the device once.
    """
    ranks = [shape[0] for shape in shapes[0::2]]
    padded = max(16, triton.next_power_of_2(max(ranks)))
    tile = tile_of(padded, element_bytes)
    table, floats, offset = [], [], 0
    for i, (group, rank) in enumerate(zip(groups, ranks, strict=True)):
        drop, width = group.dropout, shapes[2 * i][1]
        choice = (drop.key, drop.first_column, drop.threshold) if drop else (0, 0, 0)
        table.append((rank, offset, width, 1, offset + rank * width, 1, rank, *choice))
        floats.append((group.scale, drop.gain if drop else 1.0))
        offset += rank * (width + shapes[2 * i + 1][0])
    tiles = [(i, start, g.end) for i, g in enumerate(groups) for start in range(g.start, g.end, tile.rows)]
    return _Tables(
        torch.tensor(tiles, dtype=torch.int64).reshape(-1, 3).to(device),
        torch.tensor([(g.start, g.end) for g in groups], dtype=torch.int64).to(device),
        torch.tensor(table, dtype=torch.int64).to(device),
        torch.tensor(floats, dtype=torch.float32).to(device),
        padded,
        tile,
    )


def _hashes(groups: tuple[Any, ...], counters: Tensor | None, device: torch.device) -> Tensor | None:
    """(tokens,) hash of each token of a group with dropout; None where no group has any."""
    if counters is None or not any(g.dropout for g in groups):
        return None
    found = torch.zeros_like(counters)
    for group in groups:
        if group.dropout:
            found[group.start : group.end] = token_hashes(group.dropout, counters[group.start : group.end])
    return found


def apply(out: Tensor, x: Tensor, groups: tuple[Any, ...], counters: Tensor | None, *weights: Tensor) -> Tensor:
    """`grouped_lora.forward` by Triton's kernels."""
    if not groups:
        return out
    flat = torch.cat([w.reshape(-1) for w in weights])
    shapes = tuple((w.size(0), w.size(1)) for w in weights)
    tables = _tables(groups, shapes, x.element_size(), x.device)
    return _Grouped.apply(out, x, flat, tables, _hashes(groups, counters, x.device))  # type: ignore[no-any-return]


class _Grouped(torch.autograd.Function):
    """Two launches forward, four backward; saves x, the flat weights and h."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, flat: Tensor, tables: _Tables, hashes: Tensor | None) -> Tensor:
        x = x.contiguous()
        h = x.new_empty(x.size(0), tables.padded_rank)
        _run_shrink(x, flat, h, tables, hashes, side=0, scaled=False)
        _run_expand(h, flat, out, tables, None, side=1, scaled=True, adds=True)
        ctx.tables, ctx.hashes = tables, hashes
        ctx.save_for_backward(x, flat, h)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, tables, hashes = grads[0].contiguous(), ctx.tables, ctx.hashes
        x, flat, h = ctx.saved_tensors
        dh, dflat = torch.empty_like(h), torch.zeros_like(flat)
        _run_shrink(dy, flat, dh, tables, None, side=1, scaled=True)
        _run_wgrad(dh, x, dflat, tables, hashes, side=0, scaled=False)
        _run_wgrad(h, dy, dflat, tables, None, side=1, scaled=True)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = torch.zeros_like(x)
            _run_expand(dh, flat, dx, tables, hashes, side=0, scaled=False, adds=False)
        return grads[0] if ctx.needs_input_grad[0] else None, dx, dflat, None, None


def _run_shrink(
    x: Tensor, w: Tensor, h: Tensor, tables: _Tables, hashes: Tensor | None, *, side: int, scaled: bool
) -> None:
    if not len(tables.tiles):
        return
    shrink[(len(tables.tiles),)](
        x, w, h, tables.tiles, tables.table, tables.floats, tables.spans if hashes is None else hashes,
        x.size(1), x.stride(0), h.stride(0),
        SIDE=side, SCALED=scaled, DROPS=hashes is not None, BM=tables.tile.rows, BR=tables.padded_rank,
        BK=tables.tile.depth, num_warps=tables.tile.warps,
    )  # fmt: skip


def _run_expand(
    h: Tensor, w: Tensor, y: Tensor, tables: _Tables, hashes: Tensor | None, *, side: int, scaled: bool, adds: bool
) -> None:
    if not len(tables.tiles):
        return
    columns = tables.tile.columns
    expand[(len(tables.tiles), triton.cdiv(y.size(1), columns))](
        h, w, y, tables.tiles, tables.table, tables.floats, tables.spans if hashes is None else hashes,
        y.size(1), h.stride(0), y.stride(0),
        SIDE=side, SCALED=scaled, ADDS=adds, DROPS=hashes is not None, BM=tables.tile.rows, BR=tables.padded_rank,
        BN=columns, num_warps=tables.tile.warps,
    )  # fmt: skip


def _run_wgrad(
    h: Tensor, g: Tensor, dw: Tensor, tables: _Tables, hashes: Tensor | None, *, side: int, scaled: bool
) -> None:
    columns = tables.tile.columns
    wgrad[(len(tables.spans), triton.cdiv(g.size(1), columns))](
        h, g, dw, tables.spans, tables.table, tables.floats, tables.spans if hashes is None else hashes,
        g.size(1), h.stride(0), g.stride(0),
        SIDE=side, SCALED=scaled, DROPS=hashes is not None, BM=tables.tile.rows, BR=tables.padded_rank,
        BN=columns, num_warps=tables.tile.warps,
    )  # fmt: skip
