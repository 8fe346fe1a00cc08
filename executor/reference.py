"""The reference GEMM: a fixed piece of compute timed beside every measurement, so that a drifting machine divides out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

#: (rows, inner, columns): about 0.7 ms on one core, of the size of a tiny model's linears.
SHAPE = (256, 256, 256)
REPEATS = 3
CPU = torch.device("cpu")


@cache
def _operands(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, inner, columns = SHAPE
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    return a.to(device), b.to(device), torch.empty(rows, columns, device=device)


def reference_ns(device: torch.device = CPU) -> int:
    """Median time of one reference GEMM right now: wall time on a CPU, between two events on CUDA."""
    a, b, out = _operands(device)
    gemm = partial(torch.mm, a, b, out=out)
    once = timed_by_events if device.type == "cuda" else timed_by_clock
    return int(statistics.median(once(gemm) for _ in range(REPEATS)))


def timed_by_clock(call: Callable[[], object]) -> int:
    """Nanoseconds of a call that computes while it runs."""
    start_ns = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - start_ns


def timed_by_events(call: Callable[[], object], cuda: Any = torch.cuda) -> int:
    """Nanoseconds that a call takes on the current stream, however early it returns."""
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    elapsed_ms: float = start.elapsed_time(end)
    return round(elapsed_ms * 1e6)
