"""make bench-kernels: grouped LoRA on a CUDA device against no adapter, a loop of addmm and torch._grouped_mm.

Forward and backward of one BaseOp at LLaMA2-7B's widths; operands rotate over more than twice the L2, as in a step. A machine
without a CUDA device says so and exits 0. The device's ceilings are measured in the same run: a copy and a square GEMM.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path

import torch
from torch import Tensor

from muxtune.kernels import grouped_lora
from muxtune.kernels._choice import Kernel

#: (in, out) of LLaMA2-7B's proj, qkv, one of gate and up, fc1 (both) and fc2.
WIDTHS = ((4096, 4096), (4096, 12288), (4096, 11008), (4096, 22016), (11008, 4096))
TASKS = (1, 2, 8, 32)
RANKS = (8, 16, 32, 64)
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
KERNELS: tuple[Kernel, ...] = ("loop", "grouped-mm", "triton")
REPEATS = 20
ELEMENT_BYTES = 2
#: Targets at 8 tasks and at least 8192 tokens: time with adapters over the frozen base alone; the bytes floor; the loop.
RATIO_TARGETS = {(4096, 4096): 1.30, (4096, 11008): 1.22}
FLOOR_TARGET, LOOP_TARGET = 1.25, 1.3
TARGET_TASKS, TARGET_TOKENS = 8, 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One shape: microseconds of forward and backward, base alone and with adapters by back end."""

    features: tuple[int, int]
    tasks: int
    rank: int
    tokens: int
    base_us: float
    with_us: dict[str, float]


def adapter_flops(point: Point) -> int:
    """Forward and backward of all adapters: three times 2 · tokens · rank · (in + out)."""
    return 6 * point.tokens * point.rank * sum(point.features)


def adapter_bytes(point: Point) -> int:
    """Least traffic of unfused adapters.

    Forward x, the base output read and written; backward dy for dh and for dB, x for dA, dx written; A and B read three times
    and their gradients written once. h and dh, rank wide, are written once and read twice each.
    """
    k, n = point.features
    wide = point.tokens * (k + 2 * n) + point.tokens * (2 * n + 2 * k)
    return ELEMENT_BYTES * (wide + 4 * point.tasks * point.rank * (k + n) + 6 * point.tokens * point.rank)


def judged(points: Sequence[Point], bytes_per_s: float) -> list[str]:
    """A line for each target: the worst figure of the points that it speaks of, and whether it is met."""
    lines = []
    large = [p for p in points if p.tasks == TARGET_TASKS and p.tokens >= TARGET_TOKENS]
    for features, target in RATIO_TARGETS.items():
        ratios = [p.with_us["triton"] / p.base_us for p in large if p.features == features]
        lines += [_line(f"{features[0]}x{features[1]} against base alone", max(ratios), target, True)] if ratios else []
    if large:
        floors = [(p.with_us["triton"] - p.base_us) / (adapter_bytes(p) / bytes_per_s * 1e6) for p in large]
        lines.append(_line("added time against the bytes floor", max(floors), FLOOR_TARGET, True))
        gains = [(p.with_us["loop"] - p.base_us) / (p.with_us["triton"] - p.base_us) for p in large]
        lines.append(_line("faster than the loop", min(gains), LOOP_TARGET, False))
    return lines


def _line(what: str, figure: float, target: float, at_most: bool) -> str:
    met = figure <= target if at_most else figure >= target
    return f"{what}: {figure:.2f} ({'≤' if at_most else '≥'} {target}) {'met' if met else 'MISSED'}"


def middle_us(call: Callable[[int], None], repeats: int = REPEATS) -> float:
    """Median time of a call by CUDA events, after three warm-up calls; it is handed the number of the repeat."""
    for i in range(3):
        call(i)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (start, end) in enumerate(marks):
        start.record()
        call(i)
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in marks)) * 1e3


def measured(features: tuple[int, int], tasks: int, rank: int, tokens: int) -> Point:
    """Time one shape on the current CUDA device, bf16."""
    k, n = features
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    copies = 1 + 2 * l2_bytes // (ELEMENT_BYTES * (k * n + tokens * (k + n)))

    def random(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_(grad)

    bases = [random(n, k) for _ in range(copies)]
    inputs = [random(tokens, k, grad=True) for _ in range(copies)]
    above = [random(tokens, n) for _ in range(copies)]
    weights = [random(*shape, grad=True) for _ in range(tasks) for shape in ((rank, k), (n, rank))]
    cuts = [tokens * i // tasks for i in range(tasks + 1)]
    groups = [grouped_lora.Group(start=a, end=b, scale=2.0) for a, b in pairwise(cuts)]

    def step(i: int, kernel: Kernel | None) -> None:
        x = inputs[i % copies]
        out = torch.nn.functional.linear(x, bases[i % copies])
        if kernel is not None:
            out = grouped_lora.forward(out, x, groups, weights, kernel=kernel)
        leaves = [x] if kernel is None else [x, *weights]
        torch.autograd.grad(out, leaves, above[i % copies])

    return Point(
        features=features,
        tasks=tasks,
        rank=rank,
        tokens=tokens,
        base_us=middle_us(lambda i: step(i, None)),
        with_us={kernel: middle_us(lambda i, kernel=kernel: step(i, kernel)) for kernel in KERNELS},  # type: ignore[misc]
    )


def ceilings() -> tuple[float, float]:
    """(bytes/s of a copy of 1 GiB, flops/s of a bf16 GEMM of 8192³) of the current CUDA device."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy_us, gemm_us = middle_us(lambda i: target.copy_(source)), middle_us(lambda i: torch.mm(a, a))  # type: ignore[arg-type]
    return 2 * source.numel() * ELEMENT_BYTES / copy_us * 1e6, 2 * 8192**3 / gemm_us * 1e6


def described(point: Point) -> str:
    """One row: times, ratio to the base, and what Triton's adapters reach of bandwidth and flops."""
    added_s = max(point.with_us["triton"] - point.base_us, 1e-3) / 1e6
    times = "  ".join(f"{k} {point.with_us[k]:9.1f} ({point.with_us[k] / point.base_us:.2f}x)" for k in KERNELS)
    reached = f"{adapter_bytes(point) / added_s / 1e9:7.0f} GB/s {adapter_flops(point) / added_s / 1e12:6.1f} Tflop/s"
    k, n = point.features
    shape = f"{k:5}x{n:<5} tasks {point.tasks:2} rank {point.rank:2} tokens {point.tokens:5}"
    return f"{shape}  base {point.base_us:9.1f} us  {times}  {reached}"


def say(text: str) -> None:
    """One line of the report."""
    sys.stdout.write(text + "\n")


def main(out: str | None = None) -> int:
    """Measure everything; `out` gets the points as JSON."""
    if not torch.cuda.is_available():
        say("bench-kernels: no CUDA device here, nothing measured; the figures stay pending (profiles/README.md)")
        return 0
    bytes_per_s, flops_per_s = ceilings()
    name = torch.cuda.get_device_name(0)
    say(f"{name}, torch {torch.__version__}: copy {bytes_per_s / 1e9:.0f} GB/s, GEMM {flops_per_s / 1e12:.0f} Tflop/s")
    points = []
    for features, tasks, rank, tokens in product(WIDTHS, TASKS, RANKS, TOKENS):
        points.append(measured(features, tasks, rank, tokens))
        say(described(points[-1]))
    for line in judged(points, bytes_per_s):
        say(line)
    if out:
        ceiling = {"bytes_per_s": bytes_per_s, "flops_per_s": flops_per_s}
        Path(out).write_text(json.dumps({"device": name, **ceiling, "points": [asdict(p) for p in points]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
