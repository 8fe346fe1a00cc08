"""Interpolation of measured times: efficiency over a baseline in log space, or the times themselves on a line."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Protocol

from muxtune.spec.errors import InputError

Size = tuple[int, ...]
#: size → a time that has the right shape in size; a constant factor cancels.
Baseline = Callable[[Size], float]


class Interpolant(Protocol):
    """A curve that can be asked at any size; outside its measured range it holds the nearest efficiency."""

    def covers(self, size: Size) -> bool:
        """Whether the size lies inside the measured range."""
        ...

    def ns(self, size: Size) -> float:
        """The time at a size: exact at measured points."""
        ...


class Line:
    """Piecewise linear times over one variable, for remainders that may be measured at or below 0 and stay so."""

    def __init__(self, measured_ns: Mapping[Size, int]) -> None:
        self.sizes = sorted(size[0] for size in measured_ns)
        self.measured_ns = measured_ns

    def covers(self, size: Size) -> bool:
        """Whether the size lies inside the measured range."""
        return self.sizes[0] <= size[0] <= self.sizes[-1]

    def ns(self, size: Size) -> float:
        """The time at a size; outside the range that of the nearest point."""
        nearest = min(max(size[0], self.sizes[0]), self.sizes[-1])
        low, high = _neighbours(self.sizes, nearest)
        weight = (nearest - low) / (high - low) if low < high else 0.0
        return (1 - weight) * self.measured_ns[(low,)] + weight * self.measured_ns[(high,)]


class Grid:
    """Log-efficiency over one or two variables, multilinear in their logarithms on a full grid of measured sizes.

    A convex baseline would let the time dip below both neighbours where a launch cost dominates them. So a time between
    measured points stays between the least and the greatest of its neighbours: monotone points give a monotone curve.
    """

    def __init__(self, measured_ns: Mapping[Size, int], baseline: Baseline, place: str) -> None:
        self.axes = tuple(sorted(set(values)) for values in zip(*measured_ns, strict=True))
        missing = [size for size in itertools.product(*self.axes) if size not in measured_ns]
        if missing:
            raise InputError(
                f"{place}: the measured sizes are no full grid: {missing[0]} is missing (and {len(missing) - 1} more); "
                f"measure every combination of {[list(axis) for axis in self.axes]}"
            )
        self.measured_ns = measured_ns
        self.baseline = baseline
        self.log_efficiency = {size: math.log(baseline(size) / ns) for size, ns in measured_ns.items()}

    def covers(self, size: Size) -> bool:
        """Whether every variable lies inside its measured range."""
        return size == self._nearest(size)

    def ns(self, size: Size) -> float:
        """The time at a size; outside the grid with the efficiency of the nearest point on its border."""
        corners = self._corners(self._nearest(size))
        log_efficiency = sum(weight * self.log_efficiency[corner] for corner, weight in corners)
        value = self.baseline(size) / math.exp(log_efficiency)
        if not self.covers(size):
            return value
        neighbours = [self.measured_ns[corner] for corner, _ in corners]
        return min(max(value, min(neighbours)), max(neighbours))

    def _nearest(self, size: Size) -> Size:
        return tuple(min(max(value, axis[0]), axis[-1]) for value, axis in zip(size, self.axes, strict=True))

    def _corners(self, size: Size) -> list[tuple[Size, float]]:
        """The measured neighbours of a size inside the grid that have weight, with their weights."""
        sides: list[tuple[tuple[int, float], tuple[int, float]]] = []
        for axis, value in zip(self.axes, size, strict=True):
            low, high = _neighbours(axis, value)
            weight = _log_weight(low, value, high)
            sides.append(((low, 1 - weight), (high, weight)))
        found = [
            (tuple(value for value, _ in corner), math.prod(weight for _, weight in corner))
            for corner in itertools.product(*sides)
        ]
        return [(size, weight) for size, weight in found if weight > 0]


def _neighbours(axis: list[int], value: int) -> tuple[int, int]:
    """The measured values on both sides of a value inside the range; twice the value itself where it was measured."""
    at = bisect.bisect_left(axis, value)
    return (value, value) if axis[at] == value else (axis[at - 1], axis[at])


def _log_weight(low: int, value: int, high: int) -> float:
    """How far a value lies from low to high on a log scale, in [0, 1)."""
    return math.log(value / low) / math.log(high / low) if low < high else 0.0
