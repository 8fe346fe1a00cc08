"""Laws of every kernel file: values and all gradients equal its reference in fp64 within its tolerance, on every back end.

Triton's kernels run in its interpreter on CPU, in a process of their own: the interpreter is chosen when Triton is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import muxtune.kernels.grouped_lora as sample
from muxtune.kernels._choice import chosen, force
from muxtune.kernels._dropout import Dropout, kept
from tests import bench_kernels

KERNELS = sorted(p.stem for p in Path(sample.__file__).parent.glob("[!_]*.py"))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BUDGET = Path(__file__).parent / "kernel_budget.json"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install 'muxtune[gpu]'"
)


def _cases() -> list[tuple[ModuleType, Any]]:
    modules = [importlib.import_module(f"muxtune.kernels.{name}") for name in KERNELS]
    return [(m, shape) for m in modules for shape in m.SHAPES]


def run(module: ModuleType, function: Any, shape: Any, given: torch.dtype, used: torch.dtype) -> list[torch.Tensor]:
    """Output and the gradient of every tensor argument, for a fixed random gradient; numbers of `given`, computed in `used`."""
    out, x, groups, weights, counters = module.inputs(shape, dtype=given)
    leaves = [t.to(used, copy=True).requires_grad_(True) for t in (out, x, *weights)]
    result = function(leaves[0] * 1.0, leaves[1], groups, leaves[2:], counters)
    above = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(given)
    result.backward(above.to(used))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def worst(module: ModuleType, function: Any, shape: Any, dtype: torch.dtype) -> float:
    """Largest relative error of values and gradients against the reference in fp64 on the same numbers."""
    expected = run(module, module.reference, shape, dtype, torch.float64)
    found = run(module, function, shape, dtype, dtype)
    return max(
        float((f.double() - e).norm()) / float(e.norm()) if e.any() else float(f.norm())
        for e, f in zip(expected, found, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("module", "shape"), _cases())
def test_values_and_gradients_equal_the_reference(module: ModuleType, shape: Any, dtype: str) -> None:
    assert worst(module, module.forward, shape, DTYPES[dtype]) <= module.TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_grouped_mm_equals_the_reference(dtype: str) -> None:
    forward = partial(sample.forward, kernel="grouped-mm")
    for shape in sample.SHAPES:
        if shape.features_in % 8 == 0 and shape.features_out % 8 == 0:
            assert worst(sample, forward, shape, DTYPES[dtype]) <= sample.TOLERANCE[dtype], shape
    out, x, groups, weights, counters = sample.inputs(sample.SHAPES[-1])
    with pytest.raises(ValueError, match="widths 33 and 17 are not whole 16 bytes: take the loop"):
        forward(out, x, groups, weights, counters)


def interpreted() -> dict[str, Any]:
    """What a process with Triton's interpreter finds: worst errors by dtype and shape, and whether a repeat is bit-equal."""
    forward = partial(sample.forward, kernel="triton")
    errors = {name: [worst(sample, forward, s, t) for s in sample.SHAPES] for name, t in DTYPES.items()}
    twice = [run(sample, forward, sample.SHAPES[-1], torch.float32, torch.float32) for _ in range(2)]
    return {"errors": errors, "same_bits": all(torch.equal(a, b) for a, b in zip(*twice, strict=True))}


@needs_triton
def test_triton_equals_the_reference_in_its_interpreter() -> None:
    code = "import json; from tests.laws.test_kernels import interpreted; print(json.dumps(interpreted()))"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for dtype, errors in found["errors"].items():
        assert len(errors) == len(sample.SHAPES)
        assert max(errors) <= sample.TOLERANCE[dtype], (dtype, errors)
    assert found["same_bits"]


@needs_triton
def test_compiled_kernels_stay_in_the_recorded_budget() -> None:
    """Registers, shared memory and spills of every kernel without a GPU; the budget is what was seen with Triton 3.6.0."""
    budget = json.loads(BUDGET.read_text())
    command = [sys.executable, "-m", "muxtune.kernels._compile", *budget]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found.keys() == budget.keys()
    for configuration, kernels in found.items():
        assert kernels.keys() == budget[configuration].keys()
        for kernel, figures in kernels.items():
            assert figures["spilled_bytes"] == 0
            for name, value in figures.items():
                assert value <= budget[configuration][kernel][name], (configuration, kernel, name)


def test_a_task_does_not_see_its_neighbours_nan() -> None:
    shape = sample.SHAPES[0]
    out, x, groups, weights, _ = sample.inputs(shape)
    for kernel in ("loop", "grouped-mm"):
        clean = sample.forward(out.clone(), x, groups, weights, kernel=kernel)
        poisoned_x = x.clone()
        poisoned_x[groups[1].start : groups[1].end] = float("nan")
        poisoned = sample.forward(out.clone(), poisoned_x, groups, weights, kernel=kernel)
        for group in (groups[0], groups[2]):
            assert torch.equal(clean[group.start : group.end], poisoned[group.start : group.end])
        assert bool(poisoned[groups[1].start : groups[1].end].isnan().all())


def test_input_without_gradient_gets_none() -> None:
    out, x, groups, weights, _ = sample.inputs(sample.SHAPES[1])
    a, b = (w.requires_grad_(True) for w in weights)
    sample.forward(out.clone(), x, groups, (a, b)).sum().backward()
    assert x.grad is None
    assert a.grad is not None
    assert b.grad is not None


def test_dropout_is_a_function_of_its_numbers_alone() -> None:
    one = Dropout(rate=0.3, key=1234567, step=2)
    counters = torch.arange(400) + (7 << 32)
    mask = kept(one, counters, 300)
    assert torch.equal(mask[50:60], kept(one, counters[50:60], 300))
    assert torch.equal(mask[:, 100:], kept(Dropout(rate=0.3, key=1234567, step=2, first_column=100), counters, 200))
    # 120,000 draws: 0.7 ± 6 standard deviations; each row and column by itself within 8.
    assert abs(float(mask.double().mean()) - 0.7) < 0.008
    assert float((mask.double().mean(0) - 0.7).abs().max()) < 8 * (0.21 / 400) ** 0.5
    assert float((mask.double().mean(1) - 0.7).abs().max()) < 8 * (0.21 / 300) ** 0.5
    for other in (Dropout(rate=0.3, key=1234568, step=2), Dropout(rate=0.3, key=1234567, step=3)):
        agree = float((mask == kept(other, counters, 300)).double().mean())
        assert abs(agree - 0.58) < 0.01  # 0.7² + 0.3² of independent masks


def test_one_door_chooses_the_back_end() -> None:
    cpu = torch.device("cpu")
    assert chosen(cpu) == "loop"
    assert chosen(cpu, "grouped-mm") == "grouped-mm"
    with pytest.raises(ValueError, match="needs a CUDA device"):
        chosen(cpu, "triton")
    with pytest.raises(ValueError, match="kernel='fast': known are"):
        force("fast")
    try:
        force("grouped-mm")
        assert chosen(cpu) == "grouped-mm"
    finally:
        force("auto")


def test_the_benchmark_says_so_without_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_kernels.main() == 0
    assert "no CUDA device here, nothing measured" in capsys.readouterr().out


def test_the_benchmark_judges_its_targets_by_hand() -> None:
    """1 rank-8 shape, 8 tasks, 8192 tokens, 4096x4096: 0.27 GB forward, 0.27 backward, 4.2 MB of A and B, 0.8 MB of h."""
    times = {"loop": 300.0, "grouped-mm": 250.0, "triton": 240.0}
    point = bench_kernels.Point(features=(4096, 4096), tasks=8, rank=8, tokens=8192, base_us=200.0, with_us=times)
    assert bench_kernels.adapter_bytes(point) == 2 * (7 * 8192 * 4096 + 4 * 8 * 8 * 8192 + 6 * 8192 * 8)
    assert bench_kernels.adapter_flops(point) == 6 * 8192 * 8 * 8192
    lines = bench_kernels.judged([point], bytes_per_s=3e12)
    assert lines == [
        "4096x4096 against base alone: 1.20 (≤ 1.3) met",
        "added time against the bytes floor: 0.25 (≤ 1.25) met",
        "faster than the loop: 2.50 (≥ 1.3) met",
    ]
    assert "MISSED" in bench_kernels.judged([point], bytes_per_s=3e13)[1]
