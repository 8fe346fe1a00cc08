"""Laws that hold for every cost model found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from muxtune.policies.build import make_instance
from muxtune.sim.cost._links import LINKED
from muxtune.sim.cost.base import CostModel, batch_ops, cost_models, require_cost_model, stage_latency_ns
from muxtune.sim.cost.paper import Paper
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.cost.table import Curve, Point, Table, fit_table
from muxtune.sim.simulate import simulate
from muxtune.spec import ops
from muxtune.spec.align import Batch, Row
from muxtune.spec.bind import bind
from muxtune.spec.catalogue import StageContext, adapter_sizes
from muxtune.spec.cluster import LINKS, Link, device_presets
from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.layout import even_layout
from muxtune.spec.memory import stage_context
from muxtune.spec.model import model_preset
from muxtune.spec.ops import Op
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Plan

CPU = device_presets()["cpu"]
LOCAL = LINKS["local"]
MODEL = model_preset("tiny-llama")
LAYOUT = even_layout(MODEL, pp=2)
#: Token counts and (rows, length) that the synthetic profile covers.
TOKENS = (1, 16, 256, 4096)
ROWS, LENGTHS = (1, 4, 64), (1, 32, 512)
BYTES = (1, 10**3, 10**6, 10**8)


def contexts() -> Iterator[StageContext]:
    for stage in range(LAYOUT.pp):
        yield StageContext(
            model=MODEL, layout=LAYOUT, stage=stage, adapters=(("t0", LoRA(rank=4)), ("t1", LoRA(rank=8)))
        )


def batch(rows: int, length: int) -> Batch:
    def row(task: str, slot: int) -> Row:
        return Row(task=task, slot=slot, sample=0, prompt_tokens=length - 1, response_tokens=1, length_tokens=length)

    return Batch(htask=0, rows=tuple(row(task, slot) for task in ("t0", "t1") for slot in range(rows)))


def catalogue() -> tuple[Op, ...]:
    """Every operator that two tasks on two stages need, whatever its size."""
    found: dict[Any, Op] = {}
    for context in contexts():
        for way in ("forward", "backward"):
            for op in (*batch_ops(context, batch(2, 16), way), ops.host("instruction", way)):
                found.setdefault(op.group, op)
        for task in ("t0", "t1"):
            step = ops.adamw(*adapter_sizes(context, task))
            found.setdefault(step.group, step)
    for family, shape in (("send", ()), ("recv", ()), ("p2p", ()), *((c, (2,)) for c in ops.COLLECTIVES)):
        found.setdefault(family, ops.message(family, 64, shape))
    return tuple(found.values())


def resized(op: Op, size: tuple[int, ...]) -> Op:
    """The same operator at another size (flops and bytes in proportion where no constructor says better)."""
    if op.family == "linear":
        return ops.linear(size[0], (op.shape[0], op.shape[1]), bool(op.shape[2]), op.direction, op.dtype, 4)
    if op.family == "lora":
        return ops.lora(size[0], (op.shape[0], op.shape[1]), op.shape[2], op.direction, op.dtype, 4)
    if op.family == "attention":
        return ops.attention(size[0], size[1], (op.shape[0], op.shape[1], op.shape[2]), op.direction, op.dtype, 4)
    factor = size[0] / op.size[0]
    return Op(
        family=op.family,
        direction=op.direction,
        dtype=op.dtype,
        size=size,
        shape=op.shape,
        flops=round(op.flops * factor),
        moved_bytes=round(op.moved_bytes * factor),
    )


def sizes(op: Op) -> tuple[tuple[int, ...], ...]:
    """Sizes inside every profile, ascending in each variable."""
    if op.dtype == "host":
        return ((1,),)
    if op.family == "attention":
        return tuple((r, n) for r in ROWS for n in LENGTHS)
    return tuple((n,) for n in (BYTES if op.dtype == "bytes" or op.family == "adamw" else TOKENS))


def synthetic_table() -> Table:
    """A table whose measurements are the roofline's, with a launch of 1 µs on top."""
    roofline = Roofline()
    curves = []
    for op in catalogue():
        points = tuple(
            Point(size=size, p50_ns=1000 + roofline.latency(resized(op, size), CPU).p50_ns, spread=0.05)
            for size in sizes(op)
        )
        curves.append(Curve(family=op.family, direction=op.direction, dtype=op.dtype, shape=op.shape, points=points))
    return Table(fit_table(curves, CPU, 1_000_000), CPU)


#: How to build the models that need more than their class.
BUILDERS: dict[str, Callable[[], CostModel]] = {"table": synthetic_table}


@pytest.fixture(scope="module", params=sorted(cost_models()))
def model(request: pytest.FixtureRequest) -> CostModel:
    key: str = request.param
    found: CostModel = BUILDERS.get(key, cost_models()[key])()
    return found


def price(model: CostModel, op: Op, link: Link = LOCAL) -> Any:
    return model.link_latency(op, link) if op.family in LINKED else model.latency(op, CPU)


def test_every_model_is_found_and_an_unknown_one_is_named() -> None:
    assert {"roofline", "table", "paper", "interference"} <= set(cost_models())
    with pytest.raises(UnknownKeyError, match=r"unknown cost model 'oracle': known are .*roofline.*table"):
        require_cost_model("oracle")


def test_it_is_a_cost_model_with_an_identity(model: CostModel) -> None:
    assert isinstance(model, CostModel)
    assert model.model_id
    assert isinstance(model.calibrated, bool)


@pytest.mark.parametrize("op", catalogue(), ids=lambda op: f"{op.family}-{op.direction}-{op.shape}")
def test_every_operator_has_a_sound_price(model: CostModel, op: Op) -> None:
    for size in sizes(op):
        found = price(model, resized(op, size))
        assert type(found.p50_ns) is int
        priced = op.flops or (op.family in LINKED and not isinstance(model, Paper))
        assert found.p50_ns >= (1 if priced else 0)
        assert 0 < found.utilisation <= 1
        assert found.host_ns == 0, "on a CPU host and compute are one resource"
        assert found.relative_error >= 0
        assert math.isfinite(found.relative_error)
        assert math.isfinite(found.joules)
        assert found.joules >= 0
        assert not found.extrapolated
        assert price(model, resized(op, size)) == found, "pricing is pure"


@pytest.mark.parametrize("op", catalogue(), ids=lambda op: f"{op.family}-{op.direction}-{op.shape}")
def test_more_work_never_takes_less_time(model: CostModel, op: Op) -> None:
    for small in sizes(op):
        for large in sizes(op):
            if all(a <= b for a, b in zip(small, large, strict=True)):
                assert price(model, resized(op, small)).p50_ns <= price(model, resized(op, large)).p50_ns


@pytest.mark.parametrize("op", catalogue(), ids=lambda op: f"{op.family}-{op.direction}-{op.shape}")
def test_company_never_makes_an_operator_faster(model: CostModel, op: Op) -> None:
    for size in sizes(op):
        alone = model.latency(resized(op, size), CPU)
        for share in (ops.collective_load(8, 10**9), ops.linear(64, (64, 64), False, "forward", "fp32", 4)):
            assert model.latency(resized(op, size), CPU, (share,)).p50_ns >= alone.p50_ns


def test_prices_between_measured_sizes_lie_between(model: CostModel) -> None:
    for op in catalogue():
        if op.family == "linear":
            low, mid, high = (price(model, resized(op, (n,))).p50_ns for n in (16, 100, 256))
            assert low <= mid <= high


def test_only_messages_travel_over_links(model: CostModel) -> None:
    with pytest.raises(InputError, match="does not travel over a link"):
        model.link_latency(ops.linear(16, (8, 8), False, "forward", "fp32", 4), LOCAL)


def test_a_stage_costs_more_with_more_rows(model: CostModel) -> None:
    for context in contexts():
        for way in ("forward", "backward"):
            few, many = (stage_latency_ns(model, CPU, context, batch(rows, 32), way) for rows in (1, 4))
            assert 0 < few < many


def test_a_program_can_be_simulated(model: CostModel, tiny_workload: Any, tiny_state: Any) -> None:
    workload = tiny_workload(2, ranks=(4, 8))
    state = tiny_state(workload, pp=2)
    instance = make_instance(state, "both", [["t0"], ["t1"]], [[0], [1]])
    plan = Plan(workload=workload, cluster=state.cluster, instances=(instance,))
    assert {stage_context(plan, 0, s).layout for s in (0, 1)} == {LAYOUT}
    found = simulate(bind(plan, seed=0), model).estimate
    assert found.iteration_ns > 0
    assert found.extrapolated_fraction == 0.0
    assert (found.cost_model, found.calibrated) == (model.model_id, model.calibrated)
