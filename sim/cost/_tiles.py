"""Output tiles on the SMs of a device: what partial tiles and partial waves cost (wave quantisation).

A GEMM of rows × columns × depth is cut into tiles of at most TILE × TILE outputs, one tile an SM at a time. It lasts
waves = ⌈tiles / SMs⌉ times a tile, so the whole device is taken for waves · SMs · tile · 2 · depth flops.
"""

from __future__ import annotations

import math

from muxtune.spec.cluster import DeviceSpec
from muxtune.spec.noun import noun
from muxtune.spec.ops import Op
from muxtune.spec.peft import peft_kinds

#: Assumptions: the usual tile of half-precision GEMM libraries, and the grain to which a narrow side is padded. A library
#: that picks smaller tiles for small GEMMs wastes less.
TILE = 128
GRAIN = 16


@noun
class Gemm:
    """`count` products of rows × depth by depth × columns in one launch."""

    rows: int
    columns: int
    depth: int
    count: int = 1

    @property
    def tiles(self) -> int:
        """Output tiles."""
        return self.count * math.ceil(self.rows / TILE) * math.ceil(self.columns / TILE)

    @property
    def tile_flops(self) -> int:
        """Flops of one tile, padding included."""
        return 2 * _side(self.rows) * _side(self.columns) * self.depth

    @property
    def moved(self) -> int:
        """Elements read and written."""
        return self.count * (self.rows * self.depth + self.depth * self.columns + self.rows * self.columns)


def gemms(op: Op) -> tuple[Gemm, ...]:
    """The GEMMs of an operator, by its family's definition in spec/ops.py; none for what is not made of them."""
    if op.family == "linear":
        k, n = op.shape[:2] if op.direction == "forward" else (op.shape[1], op.shape[0])
        return (Gemm(rows=op.size[0], columns=n, depth=k),)
    if op.family in peft_kinds():
        products = peft_kinds()[op.family].products(op.direction, op.size[0], op.shape)
        return tuple(Gemm(rows=rows, columns=columns, depth=depth) for rows, columns, depth in products)
    return ()


def taken_flops(op: Op, device: DeviceSpec) -> float:
    """Flops that the whole device could have done at the operator's pace: its own on a CPU or where it is no GEMM."""
    products = () if device.is_cpu else gemms(op)
    if not products:
        return op.flops
    sms = device.sm_count
    return float(sum(math.ceil(g.tiles / sms) * sms * g.tile_flops for g in products))


def utilisation(op: Op, device: DeviceSpec) -> float:
    """u_a of MuxTune Eq. 3: the share of SMs that an operator alone keeps busy, in (0, 1], averaged over what it moves.

    A CPU core is always busy, and so is a device with an operator that is not made of GEMMs.
    """
    products = () if device.is_cpu else gemms(op)
    if not products:
        return 1.0
    sms = device.sm_count
    busy = sum(g.moved * g.tiles / (math.ceil(g.tiles / sms) * sms) for g in products)
    return busy / sum(g.moved for g in products)


def _side(length: int) -> int:
    """A tile's side for an output of this length."""
    return min(TILE, GRAIN * math.ceil(length / GRAIN))
