"""How much one operator slows another that runs beside it: on two CUDA streams, or taking turns on a CPU."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import cycle, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muxtune.executor.megatron import DTYPES
from muxtune.executor.reference import timed_by_clock
from muxtune.kernels import grouped_lora
from muxtune.profiler.clocks import copies_of
from muxtune.spec.model import ModelSpec

Operator = Callable[[], object]
#: Calls in one timing, timings of one pair.
CALLS, TIMINGS = 10, 5
#: The neighbour is issued for this many times the operator's own time, so that it is there all along.
COVER = 3


class Corun:
    """Operators of one backbone on the current device: `linear` is a BaseOp's GEMM, `lora` the adapters of several tasks."""

    def __init__(self, model: ModelSpec, device: torch.device, rank: int, tasks: int) -> None:
        self.width, self.device, self.rank, self.tasks = model.hidden, device, rank, tasks
        self.dtype = DTYPES[model.dtype]

    def operator(self, family: str, tokens: int) -> Operator:
        """A runner of the forward over so many tokens."""
        return {"linear": self._linear, "lora": self._lora}[family](tokens)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def _linear(self, tokens: int) -> Operator:
        size_bytes = self.width * self.width * self.dtype.itemsize
        weights = cycle([self._random(self.width, self.width) for _ in range(copies_of(size_bytes, self.device))])
        x = self._random(tokens, self.width)
        return lambda: F.linear(x, next(weights))

    def _lora(self, tokens: int) -> Operator:
        x, out = self._random(tokens, self.width), self._random(tokens, self.width)
        shapes = ((self.rank, self.width), (self.width, self.rank))
        weights = [self._random(*shape) for _ in range(self.tasks) for shape in shapes]
        cuts = [tokens * i // self.tasks for i in range(self.tasks + 1)]
        groups = [grouped_lora.Group(start=a, end=b, scale=2.0) for a, b in pairwise(cuts)]
        return lambda: grouped_lora.forward(out, x, groups, weights)


def measure_slowdown(
    run: Operator, beside: Operator, device: torch.device, cuda: Any = torch.cuda
) -> tuple[float, float]:
    """(median of time beside / time alone, its relative spread (p80 − p20) / p50)."""
    once = _taking_turns if device.type != "cuda" else lambda a, b: _on_two_streams(a, b, cuda)
    for operator in (run, beside):
        operator()
    ratios = sorted(once(run, beside) for _ in range(TIMINGS))
    low, middle, high = ratios[TIMINGS // 5], statistics.median(ratios), ratios[-1 - TIMINGS // 5]
    return middle, (high - low) / middle


def _taking_turns(run: Operator, beside: Operator) -> float:
    """On one core the neighbour's time is added."""
    alone_ns, other_ns = timed_by_clock(run), timed_by_clock(beside)
    return (alone_ns + other_ns) / alone_ns


def _on_two_streams(run: Operator, beside: Operator, cuda: Any) -> float:
    alone_ms, other_ms = _timed_ms(run, CALLS, cuda), _timed_ms(beside, CALLS, cuda)
    count = 1 + math.ceil(COVER * CALLS * alone_ms / other_ms)
    side = cuda.Stream()
    while True:
        cuda.synchronize()
        with cuda.stream(side):
            for _ in range(count):
                beside()
            there = cuda.Event(enable_timing=True)
            there.record()
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        for _ in range(CALLS):
            run()
        end.record()
        cuda.synchronize()
        if end.elapsed_time(there) >= 0:
            return float(start.elapsed_time(end)) / alone_ms
        count *= 2  # the neighbour ended first: it was not there all along


def _timed_ms(call: Operator, count: int, cuda: Any) -> float:
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cuda.synchronize()
    start.record()
    for _ in range(count):
        call()
    end.record()
    cuda.synchronize()
    return float(start.elapsed_time(end))
