"""Laws of every PEFT method: noun and torch file come in pairs, agree, compute their formula, and keep tasks apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muxtune.executor.adapters import AdapterBank
from muxtune.executor.peft.base import Place, adapter_classes, make_adapter
from muxtune.kernels._dropout import Dropout, drop, kept
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec import ops
from muxtune.spec.cluster import device_presets
from muxtune.spec.peft import TARGETS, PeftSpec, peft_kinds
from muxtune.spec.peft.lora import LoRA

KINDS = sorted(peft_kinds())
IN, OUT = 24, 40
COUNTERS = torch.arange(64) + (3 << 32)


def place(column_parallel: bool, tp: int = 1, rank: int = 0, dtype: torch.dtype = torch.float64) -> Place:
    """A shard of a (24, 40) BaseOp whose output is two blocks, with a late bias."""
    generator = torch.Generator().manual_seed(5)
    whole = Place(features=(IN, OUT), column_parallel=column_parallel, tp=1, tp_rank=0, device=torch.device("cpu"))
    weight = torch.randn(OUT, IN, generator=generator).to(dtype)
    bias = torch.randn(OUT, generator=generator).to(dtype)
    features = (IN, OUT // tp) if column_parallel else (IN // tp, OUT)
    shard = replace(whole, features=features, tp=tp, tp_rank=rank, blocks=2, key=77)
    cut = shard.cut_out(weight, 0) if column_parallel else shard.cut_in(weight, 1)
    return replace(shard, weight=cut, late_bias=shard.cut_out(bias, 0))


def adapter(spec: PeftSpec, at: Place, seed: int = 0, random: bool = True) -> Any:
    """An adapter whose parameters are random, so that no gradient is zero."""
    made = make_adapter(spec, at, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in made.parameters() if random else ():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return made.to(torch.float64)


def bank(at: Place, adapters: dict[str, Any], segments: list[tuple[str, int, int]]) -> AdapterBank:
    made = AdapterBank("fc1", at.column_parallel, at.features, 2, at.weight, None, at.late_bias)
    made.adapters = adapters
    made.bind(segments, COUNTERS[: segments[-1][2]])
    return made


def through(of: AdapterBank, x: Tensor) -> Tensor:
    """Dispatch, BaseOp, Aggregate."""
    assert of.weight is not None
    seen = of.dispatch(x)
    return of.aggregate(seen, F.linear(seen, of.weight))


def formula(made: Any, at: Place, x: Tensor, counters: Tensor) -> Tensor:
    """The method's own formula, out of place, for autograd to differentiate."""
    weight, bias, spec = at.weight, at.late_bias, made.spec
    assert weight is not None
    assert bias is not None
    if spec.kind == "lora":
        choice = Dropout(rate=spec.dropout, key=at.key, step=made.steps_taken())
        seen = drop(x, kept(choice, counters, IN), choice) if spec.dropout else x
        return x @ weight.T + spec.scale * seen @ made.a.T @ made.b.T
    if spec.kind == "bottleneck":
        y = x @ weight.T
        return y + F.gelu((y + bias) @ made.a.T) @ made.b.T
    if spec.kind == "diff-pruning":
        return (
            x
            @ (
                weight
                + torch.zeros_like(weight).reshape(-1).index_add(0, made.places, made.delta.reshape(-1)).view_as(weight)
            ).T
        )
    if spec.kind == "ia3":
        return (x @ weight.T + bias) * made.scale - bias if at.column_parallel else (x * made.scale) @ weight.T
    assert spec.kind == "dora", "give every method its formula"
    direction = weight + spec.scale * made.b @ made.a
    return x @ direction.T * (made.m / direction.detach().norm(dim=1))


def test_every_noun_has_a_torch_file_of_its_name() -> None:
    assert sorted(adapter_classes()) == KINDS


@pytest.mark.parametrize("column_parallel", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_noun_counts_what_the_adapter_holds(kind: str, column_parallel: bool) -> None:
    spec = peft_kinds()[kind]()
    at = place(column_parallel, tp=2, rank=1)
    made = make_adapter(spec, at, torch.Generator().manual_seed(0))
    held = list(made.parameters())
    assert len(held) == spec.tensors_on()
    assert sum(p.numel() for p in held) == spec.parameters_on(*at.features, column_parallel)
    assert sum(p.numel() for p in made.replicated()) == spec.replicated_on(*at.features, column_parallel)


@pytest.mark.parametrize("column_parallel", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_noun_counts_what_is_kept_for_the_backward(kind: str, column_parallel: bool) -> None:
    spec, at = peft_kinds()[kind](), place(column_parallel)
    made = adapter(spec, at)
    x = torch.randn(16, IN, dtype=torch.float64, requires_grad=True)
    known = {t.data_ptr() for t in (x, at.weight, at.late_bias, *made.parameters(), *made.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = through(bank(at, {"a": made}, [("a", 0, 16)]), x)
    assert sum(saved.values()) == spec.kept_on(16, at.features, column_parallel), out.shape


@pytest.mark.parametrize("column_parallel", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_the_formula_s(kind: str, column_parallel: bool) -> None:
    at, spec = place(column_parallel), peft_kinds()[kind]()
    specs = [spec, replace(spec, dropout=0.4)] if isinstance(spec, LoRA) else [spec]
    for each in specs:
        made = adapter(each, at)
        x = torch.randn(16, IN, dtype=torch.float64, requires_grad=True)
        above = torch.randn(16, OUT, dtype=torch.float64)
        outs = through(bank(at, {"a": made}, [("a", 0, 16)]), x), formula(made, at, x, COUNTERS[:16])
        results = [[out, *torch.autograd.grad(out, [x, *made.parameters()], above)] for out in outs]
        for found, expected in zip(*results, strict=True):
            size = float(expected.detach().norm())
            assert size > 0
            assert float((found - expected).detach().norm()) <= 1e-6 * size


def mixed(at: Place) -> tuple[dict[str, Any], list[tuple[str, int, int]]]:
    """One task of every method, two of LoRA with dropout, and a task without an adapter here, in one batch."""
    specs = {f"t{i}": peft_kinds()[kind]() for i, kind in enumerate(KINDS)}
    specs |= {"d0": LoRA(rank=3, dropout=0.5), "d1": LoRA(rank=5, dropout=0.1)}
    adapters = {name: adapter(spec, at, seed=i) for i, (name, spec) in enumerate(specs.items())}
    names = [*specs, "none"]
    return adapters, [(name, 6 * i, 6 * i + 6) for i, name in enumerate(names)]


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("column_parallel", [True, False])
def test_a_mixed_batch_is_each_task_alone(column_parallel: bool, live: bool) -> None:
    at = place(column_parallel)
    adapters, segments = mixed(at)
    x = torch.randn(segments[-1][2], IN, dtype=torch.float64, requires_grad=live)
    above = torch.randn(len(x), OUT, dtype=torch.float64)
    out = through(bank(at, adapters, segments), x)
    parameters = {name: list(a.parameters()) for name, a in adapters.items()}
    everything = [p for each in parameters.values() for p in each]
    found = dict(zip(everything, torch.autograd.grad(out, everything, above, retain_graph=True), strict=True))
    dx = torch.autograd.grad(out, x, above)[0] if live else None
    for name, start, end in segments:
        alone = x[start:end].detach().requires_grad_(live)
        routed = bank(at, adapters, [(name, 0, end - start)])
        routed.counters = COUNTERS[start:end]
        result = through(routed, alone)
        assert torch.allclose(out[start:end], result, rtol=1e-9, atol=1e-12)
        if name in adapters:
            wanted = torch.autograd.grad(result, parameters[name], above[start:end], retain_graph=True)
            for parameter, expected in zip(parameters[name], wanted, strict=True):
                assert torch.allclose(found[parameter], expected, rtol=1e-9, atol=1e-12), name
        if dx is not None:
            expected = torch.autograd.grad(result, alone, above[start:end])[0]
            assert torch.allclose(dx[start:end], expected, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("column_parallel", [True, False])
@pytest.mark.parametrize("poisoned", [*(f"t{i}" for i in range(len(KINDS))), "d0", "none"])
def test_a_nan_stays_in_its_task(poisoned: str, column_parallel: bool) -> None:
    at = place(column_parallel)
    adapters, segments = mixed(at)
    clean = torch.randn(segments[-1][2], IN, dtype=torch.float64)
    above = torch.randn(len(clean), OUT, dtype=torch.float64)
    (rows,) = (slice(start, end) for name, start, end in segments if name == poisoned)
    results = []
    for value in (0.0, float("nan")):
        x = clean.clone()
        x[rows] += value
        x.requires_grad_(True)
        out = through(bank(at, adapters, segments), x)
        parameters = [p for name, a in adapters.items() if name != poisoned for p in a.parameters()]
        results.append([out, *torch.autograd.grad(out, [x, *parameters], above)])
    others = torch.ones(len(clean), dtype=torch.bool)
    others[rows] = False
    for i, (one, other) in enumerate(zip(*results, strict=True)):
        assert torch.equal(one[others], other[others]) if i < 2 else torch.equal(one, other)


@pytest.mark.parametrize("column_parallel", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_cut_from_the_whole_and_depend_on_the_seed_only(kind: str, column_parallel: bool) -> None:
    spec = peft_kinds()[kind]()
    whole, again = (adapter(spec, place(column_parallel), seed=4, random=False) for _ in range(2))
    shards = [adapter(spec, place(column_parallel, 2, rank), seed=4, random=False) for rank in (0, 1)]
    for (name, one), other in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        parts = [dict(s.named_parameters())[name] for s in shards]
        if parts[0].shape == one.shape:
            # DoRA's magnitudes beside a row-parallel BaseOp are sums over tp, which only a run has.
            assert name == "m" or (torch.equal(parts[0], one) and torch.equal(parts[1], one))
        else:
            assert sum(p.numel() for p in parts) == one.numel()
            assert torch.equal(torch.cat(parts).flatten().sort()[0], one.flatten().sort()[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_noun_states_its_rules(kind: str) -> None:
    spec = peft_kinds()[kind]()
    assert spec.kind == kind
    assert spec.targets
    assert set(spec.targets) <= set(TARGETS)
    assert spec.DISPATCH
    assert spec.AGGREGATE


@pytest.mark.parametrize("direction", ["forward", "backward", "weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_has_a_price_that_grows_with_tokens(kind: str, direction: Any) -> None:
    spec, cost, device = peft_kinds()[kind](), Roofline(), device_presets()["A40"]
    for column_parallel in (True, False):
        shape = spec.shape_on((4096, 4096), column_parallel, 2)
        assert len(shape) == len(spec.SHAPE)
        assert type(spec).of_shape(shape).shape_on((4096, 4096), column_parallel, 2) == shape
        few, many = (ops.adapter(kind, n, shape, direction, "bf16", 2) for n in (64, 4096))
        assert 0 < few.flops < many.flops
        assert 0 < few.moved_bytes < many.moved_bytes
        assert 0 < cost.latency(few, device).p50_ns < cost.latency(many, device).p50_ns
        assert cost.latency(few, device).host_ns == device.launch_ns * max(1, len(spec.products(direction, 64, shape)))
