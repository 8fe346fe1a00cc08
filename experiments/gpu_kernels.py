"""GPU suite: every kernel of the kernels folder against its own reference, and grouped LoRA against the frozen base alone."""

from __future__ import annotations

import importlib
import inspect
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import muxtune.kernels.grouped_lora as grouped_lora
from muxtune.executor.reference import timed_by_clock, timed_by_events
from muxtune.experiments.gpu_context import Context

#: Back ends of a kernel that offers several; what a device lacks says so itself.
BACK_ENDS = ("loop", "grouped-mm", "triton")
TASKS, RANK, REPEATS = 8, 16, 20
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def kernels() -> dict[str, ModuleType]:
    """Every kernel by file name: modules that have a reference, inputs and shapes."""
    folder = Path(inspect.getfile(grouped_lora)).parent
    names = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    modules = {name: importlib.import_module(f"muxtune.kernels.{name}") for name in names}
    return {name: m for name, m in modules.items() if all(hasattr(m, x) for x in ("reference", "inputs", "SHAPES"))}


def variants(module: ModuleType) -> tuple[dict[str, str], ...]:
    """Keyword arguments that choose each back end; none where the kernel has one."""
    if "kernel" not in inspect.signature(module.forward).parameters:
        return ({},)
    return tuple({"kernel": name} for name in BACK_ENDS)


def correctness(context: Context) -> dict[str, Any]:
    """Largest relative error of values and gradients against `reference` over all shapes, beside the tolerance."""
    rows = [
        _checked(context, name, module, variant, dtype)
        for name, module in kernels().items()
        for variant in variants(module)
        for dtype in module.TOLERANCE
    ]
    return {"rows": rows, "wrong": [r for r in rows if r["error"] is not None and r["error"] > r["tolerance"]]}


def _checked(context: Context, name: str, module: ModuleType, variant: dict[str, str], dtype: str) -> dict[str, Any]:
    """One back end and dtype; shapes that it refuses are counted."""
    errors: list[float] = []
    refused: list[str] = []
    for shape in module.SHAPES:
        try:
            errors += _errors(context, module, shape, variant, dtype)
        except Exception as error:  # a back end that cannot run here must not cost the others
            refused.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return {
        "kernel": name,
        "back_end": variant.get("kernel", ""),
        "dtype": dtype,
        "error": max(errors, default=None),
        "tolerance": module.TOLERANCE[dtype],
        "refused": len(refused),
        "reason": refused[0] if refused else "",
    }


def _errors(context: Context, module: ModuleType, shape: Any, variant: dict[str, str], dtype: str) -> list[float]:
    """Relative errors of the value and of every gradient against the reference in fp64."""
    arguments = module.inputs(shape)
    wanted = _with_gradients(module.reference, _moved(tuple(arguments), context.device, torch.float64), {})
    found = _with_gradients(module.forward, _moved(tuple(arguments), context.device, DTYPES[dtype]), variant)
    pairs = zip(found, wanted, strict=True)
    return [float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs if b.numel()]


def _with_gradients(call: Callable[..., Tensor], arguments: tuple[Any, ...], variant: dict[str, str]) -> list[Tensor]:
    """The value, and the gradient of its weighted sum by every floating argument but the first, which may be overwritten."""
    leaves = [x for x in _tensors(arguments[1:]) if x.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_(True)
    with torch.enable_grad():
        value = call(*arguments, **variant)
        weights = torch.linspace(-1, 1, value.numel(), dtype=torch.float64, device=value.device).view_as(value)
        gradients = torch.autograd.grad(value, leaves, weights.to(value.dtype))
    return [value.detach(), *gradients]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for x in value for t in _tensors(x)] if isinstance(value, (tuple, list)) else []


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Copies of tensors on a device, floating ones in a dtype, whatever tuples hold them."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
    if type(value) in (tuple, list):
        return type(value)(_moved(x, device, dtype) for x in value)
    return value


def benchmark(context: Context) -> dict[str, Any]:
    """Forward and backward of one BaseOp: the frozen base alone, and with the adapters of 8 tasks by each back end."""
    rows = []
    tokens = context.scale.tokens
    for features in context.scale.kernel_features:
        for count in (tokens // 8, tokens):
            rows.append(_timed(context, features, count))
            context.current["rows"] = rows
            context.save()
    return {"rows": rows}


def _timed(context: Context, features: tuple[int, int], tokens: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    k, n = features

    def random(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(*shape, device=context.device, dtype=dtype).requires_grad_(grad)

    weight, x, above = random(n, k), random(tokens, k, grad=True), random(tokens, n)
    adapters = [random(*shape, grad=True) for _ in range(TASKS) for shape in ((RANK, k), (n, RANK))]
    cuts = [tokens * i // TASKS for i in range(TASKS + 1)]
    groups = [grouped_lora.Group(start=a, end=b, scale=2.0) for a, b in pairwise(cuts)]

    def base() -> None:
        with torch.enable_grad():
            torch.autograd.grad(F.linear(x, weight), x, above)

    def adapted(**variant: str) -> None:
        with torch.enable_grad():
            out = grouped_lora.forward(F.linear(x, weight), x, groups, adapters, **variant)  # type: ignore[arg-type]
            torch.autograd.grad(out, [x, *adapters], above)

    row: dict[str, Any] = {"in": k, "out": n, "tokens": tokens, "tasks": TASKS, "rank": RANK}
    row["base_ns"] = _median_ns(context.device, base)
    for variant in variants(grouped_lora):
        name = variant.get("kernel", "loop")
        try:
            row[f"{name}_over_base"] = _median_ns(context.device, lambda v=variant: adapted(**v)) / row["base_ns"]  # type: ignore[misc]
        except Exception as error:  # a back end that cannot run here must not cost the others
            row[f"{name}_over_base"] = None
            row[f"{name}_reason"] = str(error).splitlines()[0]
    return row


def _median_ns(device: torch.device, call: Callable[[], object]) -> int:
    once = timed_by_events if device.type == "cuda" else timed_by_clock
    repeats = REPEATS if device.type == "cuda" else 3
    times: Sequence[int] = [once(call) for _ in range(repeats + 3)][3:]
    return round(statistics.median(times))
