"""Laws of every kernel file: values and all gradients equal its reference within its tolerance."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import muxtune.kernels.grouped_lora as sample

KERNELS = sorted(p.stem for p in Path(sample.__file__).parent.glob("*.py"))


def _cases() -> list[tuple[ModuleType, Any]]:
    modules = [importlib.import_module(f"muxtune.kernels.{name}") for name in KERNELS]
    return [(m, shape) for m in modules for shape in m.SHAPES]


def _run(module: ModuleType, function: Any, shape: Any) -> list[torch.Tensor]:
    """Output and the gradient of every tensor argument, for a fixed random gradient of the output."""
    out, x, groups, weights = module.inputs(shape)
    leaves = [t.requires_grad_(True) for t in (out, x, *weights)]
    result = function(out * 1.0, x, groups, weights)
    result.backward(torch.randn(result.shape, generator=torch.Generator().manual_seed(1)))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(("module", "shape"), _cases())
def test_values_and_gradients_equal_the_reference(module: ModuleType, shape: Any) -> None:
    expected = _run(module, module.reference, shape)
    found = _run(module, module.forward, shape)
    for e, f in zip(expected, found, strict=True):
        assert float((f - e).norm()) <= module.TOLERANCE["fp32"] * float(e.norm())


def test_a_task_does_not_see_its_neighbours_nan() -> None:
    shape = sample.SHAPES[0]
    out, x, groups, weights = sample.inputs(shape)
    clean = sample.forward(out.clone(), x, groups, weights)
    poisoned_x = x.clone()
    poisoned_x[groups[1].start : groups[1].end] = float("nan")
    poisoned = sample.forward(out.clone(), poisoned_x, groups, weights)
    for group in (groups[0], groups[2]):
        assert torch.equal(clean[group.start : group.end], poisoned[group.start : group.end])
    assert bool(poisoned[groups[1].start : groups[1].end].isnan().all())


def test_input_without_gradient_gets_none() -> None:
    out, x, groups, weights = sample.inputs(sample.SHAPES[1])
    a, b = (w.requires_grad_(True) for w in weights)
    sample.forward(out.clone(), x, groups, (a, b)).sum().backward()
    assert x.grad is None
    assert a.grad is not None
    assert b.grad is not None
