"""How sure a median is: its distribution-free 95 % interval from order statistics, as half a width relative to it.

P(x₍ₖ₎ ≤ median ≤ x₍ₙ₊₁₋ₖ₎) = 1 − 2·P(Bin(n, ½) < k); k is the largest with at least 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from muxtune.spec.noun import noun

CONFIDENCE = 0.95
#: A point is settled when the interval of its median ratio lies within this part of it.
PRECISION = 0.02


@noun
class Settled:
    """How many measured points have a median that is known to `precision`; `worst` names those furthest from it."""

    points: int
    settled: int
    precision: float
    worst: tuple[tuple[int, str, float], ...]

    @property
    def all(self) -> bool:
        """Whether another round can teach nothing that was asked for."""
        return self.settled == self.points


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The interval that holds the true median with at least 95 %; everything below 6 values."""
    count = len(values)
    if count < 6:
        return -math.inf, math.inf
    tail, low = 0.5**count, 0
    while 1 - 2 * tail >= CONFIDENCE:
        low += 1
        tail += math.comb(count, low) * 0.5**count
    ordered = np.sort(np.asarray(values, dtype=float))
    return float(ordered[low - 1]), float(ordered[count - low])


def median_half_width(values: Sequence[float]) -> float:
    """Half the width of the median's interval relative to the median; infinite where that is 0."""
    low, high = median_interval(values)
    middle = float(np.median(values))
    return (high - low) / 2 / abs(middle) if middle else math.inf


def settled(rows: pd.DataFrame, precision: float = PRECISION) -> Settled:
    """Of all (case, direction) of a profile's rows (columns case, direction, wall_ns, reference_ns)."""
    ratios = (rows["wall_ns"] / rows["reference_ns"]).to_list()
    points: dict[tuple[int, str], list[float]] = {}
    for case, direction, ratio in zip(rows["case"].to_list(), rows["direction"].to_list(), ratios, strict=True):
        points.setdefault((case, direction), []).append(ratio)
    widths = [(case, direction, median_half_width(values)) for (case, direction), values in sorted(points.items())]
    loose = sorted((w for w in widths if w[2] > precision), key=lambda w: (-w[2], w[0], w[1]))
    return Settled(points=len(widths), settled=len(widths) - len(loose), precision=precision, worst=tuple(loose[:5]))
