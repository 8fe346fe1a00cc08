"""Table: measured operators, interpolated as efficiency over the roofline in log space (DESIGN §5).

e(m) = roofline_ns(m) / measured_ns(m), log e is linear in log m between points, latency(m) = roofline_ns(m) / e(m).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from muxtune.sim.cost._interpolate import Grid, Interpolant, Line, Size
from muxtune.sim.cost._links import LINKED, link_ns, require_message
from muxtune.sim.cost._tiles import utilisation
from muxtune.sim.cost.base import Cost, CostBase
from muxtune.sim.cost.roofline import RELATIVE_ERROR, UNPRICED, dynamic_joules, issue_ns, slowdown
from muxtune.spec import ops
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.errors import ExtrapolationError, InputError
from muxtune.spec.noun import digest, noun
from muxtune.spec.ops import ADAPTERS, FAMILIES, OVERHEADS, Direction, Op
from muxtune.spec.plan import Provenance
from muxtune.spec.units import DTYPE_BYTES, NS_PER_S

TABLE_VERSION = 1

#: Families whose times are interpolated as they are. What is left after other times were subtracted may be 0 or below
#: (p2p: what send and recv do not explain; overheads: what operators do not); a constant has one point.
REMAINDERS = frozenset({*OVERHEADS, "launch", "instruction", "p2p"})

Group = tuple[str, str, str, tuple[int, ...]]


@noun
class Point:
    """One measured size: median time and its relative spread (p80 − p20) / p50.

    `host_ns` is the time to issue the call on a device that runs beside its host, `utilisation` the share of the device
    that an adapter alone keeps busy; None where it was not measured.
    """

    size: tuple[int, ...]
    p50_ns: int
    spread: float
    host_ns: int | None = None
    utilisation: float | None = None

    def __post_init__(self) -> None:
        if self.utilisation is not None and not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation={self.utilisation}: must be above 0 and at most 1")


@noun
class Curve:
    """The measured points of one operator group."""

    family: str
    direction: Direction
    dtype: str
    shape: tuple[int, ...]
    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r}: known are {sorted(FAMILIES)}")
        if not self.points:
            raise ValueError(f"{self.name}: has no points")
        if len({p.size for p in self.points}) < len(self.points):
            raise ValueError(f"{self.name}: a size is measured twice; keep one point a size")
        for point in self.points:
            if len(point.size) != len(FAMILIES[self.family].grid) or min(point.size) < 1:
                raise ValueError(
                    f"{self.name}: size {point.size}: expected {FAMILIES[self.family].grid}, each at least 1"
                )
            if point.p50_ns < 1 and self.family not in REMAINDERS:
                raise ValueError(f"{self.name}: p50_ns={point.p50_ns} at {point.size}: a measured time is at least 1")

    @property
    def group(self) -> Group:
        """What an operator must match exactly."""
        return self.family, self.direction, self.dtype, self.shape

    @property
    def name(self) -> str:
        """For messages: `linear forward bf16 (in=4096, out=4096, bias=0)`."""
        return _group_name(self.group)


@noun
class FamilyError:
    """How well interpolation predicts points that were left out; None where no point has neighbours on both sides."""

    family: str
    points: int
    held_out_mape: float | None


@noun
class FittedTable:
    """A fitted profile. `reference_ns` is the median time of the reference GEMM while it was measured."""

    version: int = TABLE_VERSION
    device: str
    reference_ns: int
    curves: tuple[Curve, ...]
    families: tuple[FamilyError, ...]
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        if self.version != TABLE_VERSION:
            raise ValueError(f"version={self.version}: this muxtune reads version {TABLE_VERSION}")
        groups = [c.group for c in self.curves]
        if len(set(groups)) < len(groups):
            raise ValueError("two curves are of one operator group: merge their points")


class Table(CostBase):
    """Cost model of a measured profile. Energy is estimated from the data sheet's watts, not measured.

    Beside others (`share`) the measured time is stretched by the roofline's default, and counts as extrapolated.

    Raises:
        InputError: the profile is of another device, or an attention grid has holes.
    """

    calibrated = True

    def __init__(self, fitted: FittedTable, device: DeviceSpec, allow_extrapolation: bool = False) -> None:
        if fitted.device != device.name:
            raise InputError(
                f"the profile was measured on {fitted.device}, not on {device.name}: profile {device.name}"
            )
        self.fitted, self.device, self.allow_extrapolation = fitted, device, allow_extrapolation
        self.model_id = f"table:{fitted.device}:{digest(fitted)}"
        self._curves = {curve.group: (curve, interpolant(curve, device)) for curve in fitted.curves}
        self._mape = {f.family: f.held_out_mape for f in fitted.families}
        self._known: dict[Op, Cost] = {}

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        """Measured or interpolated cost.

        Raises:
            ExtrapolationError: the group was not measured, or the size is outside and extrapolation is not allowed.
            InputError: another device than the profile's.
        """
        if device.name != self.device.name:
            raise InputError(f"{self.model_id} has no figures for {device.name}: profile it")
        found = self._known.get(op)
        if found is None:
            found = self._known[op] = self._price(op)
        return beside(found, slowdown(op, device, share)) if share else found

    def link_latency(self, op: Op, link: Link) -> Cost:
        """Cost of a message from the measured curve of its family; the profile's own links stand for `link`.

        Where no message of the family was measured, extrapolation prices it by the link's data sheet.
        """
        require_message(op)
        if op.group not in self._curves and self.allow_extrapolation:
            return Cost(p50_ns=link_ns(op, link), relative_error=RELATIVE_ERROR, extrapolated=True)
        return self.latency(op, self.device)

    def _price(self, op: Op) -> Cost:
        group, size, share = self._measured(op)
        if group not in self._curves:
            raise ExtrapolationError(f"{_group_name(op.group)} was not measured: profile again with this workload")
        curve, interpolate = self._curves[group]
        extrapolated = share < 1 or not interpolate.covers(size)
        if extrapolated and not self.allow_extrapolation:
            raise ExtrapolationError(_outside(op, curve, size, share))
        p50_ns = round(share * interpolate.ns(size))
        mape = self._mape.get(curve.family)
        busy, guessed = self._utilisation(op, curve)
        return Cost(
            p50_ns=p50_ns,
            host_ns=self._host_ns(op, curve),
            relative_error=max(p.spread for p in curve.points) if mape is None else mape,
            extrapolated=extrapolated,
            joules=0.0 if op.family in UNPRICED | LINKED else dynamic_joules(op, self.device, p50_ns),
            utilisation=busy,
            utilisation_guessed=guessed,
        )

    def _measured(self, op: Op) -> tuple[Group, Size, float]:
        """The curve and the size that stand for an operator, and the operator's share of the time there.

        A chunk of a sequence has its own curve; without one it takes its share of the flops of square attention.
        """
        if op.family != "attention" or op.size[1] == op.size[2]:
            return op.group, op.size[:2] if op.family == "attention" else op.size, 1.0
        rows, length, queries = op.size
        chunked = (ops.CHUNK_ATTENTION, *op.group[1:])
        if chunked in self._curves:
            return chunked, (rows, length - queries, queries), 1.0
        return op.group, op.size[:2], queries * (2 * length - queries) / length**2

    def _utilisation(self, op: Op, curve: Curve) -> tuple[float, bool]:
        """(u_a, whether it is the roofline's): of the nearest measured size; on a CPU an adapter has its core alone."""
        if self.device.is_cpu or op.family not in ADAPTERS:
            return 1.0, False
        measured = [(abs(math.log(p.size[0] / op.size[0])), p.utilisation) for p in curve.points if p.utilisation]
        return (min(measured)[1], False) if measured else (utilisation(op, self.device), True)

    def _host_ns(self, op: Op, curve: Curve) -> int:
        """Issue time: measured (it does not depend on size), else the data sheet's; on a CPU it is inside p50."""
        if self.device.is_cpu or op.family in UNPRICED | LINKED:
            return 0
        measured = [p.host_ns for p in curve.points if p.host_ns is not None]
        return round(statistics.median(measured)) if measured else issue_ns(op, self.device)


def beside(alone: Cost, factor: float) -> Cost:
    """A measured cost stretched by a factor that was not measured."""
    stretched_ns = max(alone.p50_ns, math.ceil(alone.p50_ns * factor))
    error = max(alone.relative_error, RELATIVE_ERROR)
    return replace(alone, p50_ns=stretched_ns, relative_error=error, extrapolated=True)


def fit_table(
    curves: Sequence[Curve], device: DeviceSpec, reference_ns: int, provenance: Provenance | None = None
) -> FittedTable:
    """A table of curves with the held-out error of every family (mean over its curves' left-out points)."""
    held_out: dict[str, list[float]] = {}
    points: dict[str, int] = {}
    for curve in curves:
        held_out.setdefault(curve.family, []).extend(leave_one_out(curve, device))
        points[curve.family] = points.get(curve.family, 0) + len(curve.points)
    families = tuple(
        FamilyError(family=f, points=points[f], held_out_mape=statistics.fmean(e) if e else None)
        for f, e in sorted(held_out.items())
    )
    return FittedTable(
        device=device.name,
        reference_ns=reference_ns,
        curves=tuple(sorted(curves, key=lambda c: c.group)),
        families=families,
        provenance=provenance or Provenance(),
    )


def leave_one_out(curve: Curve, device: DeviceSpec) -> tuple[float, ...]:
    """|predicted − measured| / |measured| of every interior point, predicted without it."""
    return tuple(abs(error) for _, error in residuals(curve, device))


def residuals(curve: Curve, device: DeviceSpec) -> tuple[tuple[Size, float], ...]:
    """(size, predicted / measured − 1) of every interior point, predicted without it.

    On a grid whole rows and columns are left out. A remainder may be measured near 0, so it is held against the largest
    measurement of its curve.
    """
    measured_ns = {p.size: p.p50_ns for p in curve.points}
    largest_ns = max(1, *(abs(ns) for ns in measured_ns.values()))
    errors: list[tuple[Size, float]] = []
    for out in _left_out(measured_ns):
        rest = interpolant(curve, device, {size: ns for size, ns in measured_ns.items() if size not in out})
        for size in out:
            scale = largest_ns if curve.family in REMAINDERS else measured_ns[size]
            errors.append((size, (rest.ns(size) - measured_ns[size]) / scale))
    return tuple(errors)


def _left_out(sizes: Iterable[Size]) -> Iterator[list[Size]]:
    """For each variable and each interior value of it: the sizes that have this value."""
    ordered = sorted(sizes)
    for axis in range(len(ordered[0])):
        for value in sorted({size[axis] for size in ordered})[1:-1]:
            yield [size for size in ordered if size[axis] == value]


def interpolant(curve: Curve, device: DeviceSpec, measured_ns: Mapping[Size, int] | None = None) -> Interpolant:
    """The curve as a function of size, through its points or through `measured_ns` instead."""
    points = measured_ns or {p.size: p.p50_ns for p in curve.points}
    if curve.family in REMAINDERS:
        return Line(points)
    return Grid(points, lambda size: _baseline_ns(curve, device, size), curve.name)


def _baseline_ns(curve: Curve, device: DeviceSpec, size: Size) -> float:
    """Roofline time at the peaks; where flops and bytes are both proportional to size, the size itself does as well."""
    shape, dtype = curve.shape, curve.dtype
    if curve.family == "linear":
        op = ops.linear(size[0], (shape[0], shape[1]), bool(shape[2]), curve.direction, dtype, DTYPE_BYTES[dtype])
    elif curve.family in ADAPTERS:
        op = ops.adapter(curve.family, size[0], shape, curve.direction, dtype, DTYPE_BYTES[dtype])
    elif curve.family == "attention":
        heads = (shape[0], shape[1], shape[2])
        op = ops.attention(size[0], size[1], heads, curve.direction, dtype, DTYPE_BYTES[dtype])
    elif curve.family == ops.CHUNK_ATTENTION:
        heads, (rows, past, queries) = (shape[0], shape[1], shape[2]), size
        op = ops.attention(rows, past + queries, heads, curve.direction, dtype, DTYPE_BYTES[dtype], queries)
    else:
        return float(size[0])
    return max(op.flops / device.peak_flops(dtype), op.moved_bytes / device.bandwidth_bytes_per_s) * NS_PER_S


def _group_name(group: Group) -> str:
    family, direction, dtype, shape = group
    names = FAMILIES[family].shape if family in FAMILIES else ()
    labels = ", ".join(f"{n}={v}" for n, v in zip(names, shape, strict=False))
    return f"{family} {direction} {dtype} ({labels})"


def _outside(op: Op, curve: Curve, size: Size, share: float) -> str:
    """The sentence that refuses an operator outside the measured range."""
    parts: list[str] = []
    for i, variable in enumerate(FAMILIES[curve.family].grid):
        values = sorted({p.size[i] for p in curve.points})
        if not values[0] <= size[i] <= values[-1]:
            parts.append(f"{variable}={size[i]} is outside the measured {values[0]}..{values[-1]}")
    if share < 1:
        parts.append(f"a chunk of {op.size[2]} queries to {op.size[1]} keys was not measured")
    return (
        f"{curve.name}: {' and '.join(parts)}: profile again with this workload, or allow it by --allow-extrapolation"
    )
