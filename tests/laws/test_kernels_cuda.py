"""The compiled Triton kernels on a CUDA device against the reference in fp64; skipped, and pending, where there is none."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from muxtune.kernels import grouped_lora as kernel
from tests.laws.test_kernels import DTYPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: pending (profiles/README.md)")


def gradients(function: Any, shape: kernel.Shape, given: torch.dtype, used: torch.dtype) -> list[torch.Tensor]:
    out, x, groups, weights, counters = kernel.inputs(shape, dtype=given)
    leaves = [t.to("cuda", used, copy=True).requires_grad_(True) for t in (out, x, *weights)]
    result = function(leaves[0] * 1.0, leaves[1], groups, leaves[2:], counters.cuda())
    above = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(given)
    result.backward(above.to("cuda", used))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        *kernel.SHAPES,
        kernel.Shape(tokens=(1000, 0, 1, 3095), ranks=(16, 64, 8, 256), features_in=4096, features_out=4096),
        kernel.Shape(tokens=(700, 324), ranks=(8, 16), features_in=4096, features_out=11008, rates=(0.1, 0.0)),
    ],
)
def test_compiled_kernels_equal_the_reference_twice_with_the_same_bits(shape: kernel.Shape, name: str) -> None:
    forward = partial(kernel.forward, kernel="triton")
    expected = gradients(kernel.reference, shape, DTYPES[name], torch.float64)
    found, again = (gradients(forward, shape, DTYPES[name], DTYPES[name]) for _ in range(2))
    for e, f, g in zip(expected, found, again, strict=True):
        assert torch.equal(f, g)
        assert float((f.double() - e).norm()) <= kernel.TOLERANCE[name] * float(e.norm())
