"""Slowdown of operators that run beside each other, from a measured co-run grid; without one the base's stated default.

latency(op, share) = latency(op) · Π_{x in share} slowdown(op beside x), log-linear in the sizes of both between measured points.
"""

from __future__ import annotations

import math
from dataclasses import replace

from muxtune.sim.cost._interpolate import Grid
from muxtune.sim.cost.base import Cost, CostModel, WrapBase
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.errors import InputError
from muxtune.spec.noun import digest, noun
from muxtune.spec.ops import FAMILIES, Op
from muxtune.spec.plan import Provenance

GRID_VERSION = 1
#: Slowdowns are kept as whole millionths.
MILLION = 1_000_000


@noun
class CoRun:
    """One measured pair: an operator of `family` takes `slowdown` times as long while one of `beside` runs all along.

    `size` and `load` are the first size variables of the two: tokens, rows, or the CTAs of a `collective_load`. Pairs that
    matter: linear beside collective_load, linear beside lora, linear beside linear (two hTasks on two streams). `spread` is
    the relative spread (p80 − p20) / p50 of the slowdown.
    """

    family: str
    beside: str
    size: int
    load: int
    slowdown: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        for field in ("family", "beside"):
            if getattr(self, field) not in FAMILIES:
                raise ValueError(f"{field}={getattr(self, field)!r}: known are {sorted(FAMILIES)}")
        for field in ("size", "load"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.slowdown <= 0 or self.spread < 0:
            raise ValueError(f"slowdown={self.slowdown}, spread={self.spread}: must be above 0, and at least 0")


@noun
class CoRunGrid:
    """The co-run measurements of one device; each pair is measured at every combination of its sizes and loads."""

    version: int = GRID_VERSION
    device: str
    points: tuple[CoRun, ...]
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        if self.version != GRID_VERSION:
            raise ValueError(f"version={self.version}: this muxtune reads version {GRID_VERSION}")
        keys = [(p.family, p.beside, p.size, p.load) for p in self.points]
        if len(set(keys)) < len(keys):
            raise ValueError("a pair is measured twice at one size and load; keep one point each")


@noun
class InterferenceConfig:
    """`base` prices operators alone: a cost model's name, or a profile's folder or file. `grid` is a CoRunGrid's JSON file."""

    base: str = "roofline"
    grid: str = ""


class Interference(WrapBase):
    """A base model whose operators slow each other as a co-run grid says.

    A pair that the grid lacks is slowed by the base's own default and counts as extrapolated, as does a size outside it.

    Raises:
        InputError: the grid has holes.
    """

    Config = InterferenceConfig

    def __init__(
        self, config: InterferenceConfig | None = None, base: CostModel | None = None, grid: CoRunGrid | None = None
    ) -> None:
        self.base, self.grid = base or Roofline(), grid
        self.model_id = f"interference:{self.base.model_id}:{digest(grid) if grid else 'default'}"
        self.calibrated = self.base.calibrated
        self._pairs = _pairs(grid) if grid else {}

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        """The base's cost, stretched by what runs beside it.

        Raises:
            ExtrapolationError: the base has no figure for the operator. InputError: another device than the grid's.
        """
        if not share:
            return self.base.latency(op, device)
        if self.grid and self.grid.device != device.name:
            raise InputError(
                f"the co-run grid was measured on {self.grid.device}, not on {device.name}: measure it there"
            )
        if any((op.family, x.family) not in self._pairs for x in share):
            return replace(self.base.latency(op, device, share), extrapolated=True)
        return self._stretched(self.base.latency(op, device), op, share)

    def link_latency(self, op: Op, link: Link) -> Cost:
        """The base's."""
        return self.base.link_latency(op, link)

    def _stretched(self, alone: Cost, op: Op, share: tuple[Op, ...]) -> Cost:
        factor, error, extrapolated = 1.0, alone.relative_error, alone.extrapolated
        for x in share:
            grid, spread = self._pairs[op.family, x.family]
            place = (op.size[0], x.size[0])
            factor *= max(1.0, grid.ns(place) / MILLION)
            error, extrapolated = max(error, spread), extrapolated or not grid.covers(place)
        stretched_ns = max(alone.p50_ns, math.ceil(alone.p50_ns * factor))
        return replace(alone, p50_ns=stretched_ns, relative_error=error, extrapolated=extrapolated)


def _pairs(grid: CoRunGrid) -> dict[tuple[str, str], tuple[Grid, float]]:
    """For each pair its slowdowns over (size, load), in millionths, and their largest spread."""
    points: dict[tuple[str, str], list[CoRun]] = {}
    for point in grid.points:
        points.setdefault((point.family, point.beside), []).append(point)
    return {
        (family, beside): (
            Grid(
                {(p.size, p.load): round(p.slowdown * MILLION) for p in mine},
                lambda size: float(MILLION),
                f"{family} beside {beside}",
            ),
            max(p.spread for p in mine),
        )
        for (family, beside), mine in points.items()
    }
