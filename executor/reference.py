"""The reference GEMM: a fixed piece of compute timed beside every measurement, so that a drifting CPU divides out."""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch

#: (rows, inner, columns): about 0.7 ms on one core, of the size of a tiny model's linears.
SHAPE = (256, 256, 256)
REPEATS = 3


@cache
def _operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, inner, columns = SHAPE
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, inner, generator=generator)
    return a, torch.randn(inner, columns, generator=generator), torch.empty(rows, columns)


def reference_ns() -> int:
    """Median wall time of one reference GEMM right now."""
    a, b, out = _operands()
    times = []
    for _ in range(REPEATS):
        start_ns = time.perf_counter_ns()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter_ns() - start_ns)
    return int(statistics.median(times))
