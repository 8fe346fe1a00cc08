"""Operators that share a device: grouped adapters, compute beside collectives, co-run grids, and what a result says of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from muxtune.experiments.commands.inputs import load_cost
from muxtune.policies.base import SystemState, make_policy
from muxtune.policies.build import make_instance
from muxtune.sim.cost._tiles import Gemm, gemms, taken_flops, utilisation
from muxtune.sim.cost.base import Cost, comm_load, grouped, prices
from muxtune.sim.cost.interference import CoRun, CoRunGrid, Interference
from muxtune.sim.cost.paper import Paper
from muxtune.sim.cost.roofline import Roofline, slowdown
from muxtune.sim.cost.table import Curve, Point, Table, fit_table
from muxtune.sim.recurrence import recur_blocks
from muxtune.sim.simulate import estimate
from muxtune.sim.stage import Site, StageCache, stage_run
from muxtune.spec import ops
from muxtune.spec.align import Batch, Row
from muxtune.spec.catalogue import StageContext, stage_subgraphs
from muxtune.spec.cluster import LINKS, DeviceSpec, Link, device_presets, parse_cluster
from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.files import read_noun, write_noun
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.ops import Op
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Launch, Plan
from muxtune.spec.task import Task, Workload

A40, CPU = device_presets()["A40"], device_presets()["cpu"]
GEMM = ops.linear(1024, (4096, 4096), False, "forward", "bf16", 2)
LORA = ops.lora(1024, (4096, 4096), 16, "forward", "bf16", 2)
LOAD = ops.collective_load(8, 56_250_000_000)


def test_tiles_and_waves_by_hand() -> None:
    # 1024 x 4096 outputs are 8 x 32 tiles of 128 x 128: 4 waves on 84 SMs, the last with 4 tiles.
    (gemm,) = gemms(GEMM)
    assert (gemm.tiles, gemm.tile_flops) == (256, 2 * 128 * 128 * 4096)
    assert taken_flops(GEMM, A40) == 4 * 84 * 2 * 128 * 128 * 4096
    assert utilisation(GEMM, A40) == 256 / (4 * 84)
    # A narrow side is padded to 16; on a CPU nothing is.
    assert Gemm(rows=100, columns=9, depth=64).tile_flops == 2 * 112 * 16 * 64
    assert taken_flops(GEMM, CPU) == GEMM.flops
    assert utilisation(LORA, CPU) == 1.0
    # A: 8 tiles of 84 SMs, B: 256 tiles in 4 waves, weighted by what they move.
    moved = [1024 * 4096 + 4096 * 16 + 1024 * 16, 1024 * 16 + 16 * 4096 + 1024 * 4096]
    assert utilisation(LORA, A40) == pytest.approx(
        (moved[0] * 8 / 84 + moved[1] * 256 / (4 * 84)) / sum(moved), rel=1e-12
    )


def test_gradients_have_their_own_gemms() -> None:
    backward, weights = (ops.lora(1024, (4096, 512), 16, way, "bf16", 2) for way in ("backward", "weights"))  # type: ignore[arg-type]
    shapes = [(g.rows, g.columns, g.depth) for g in gemms(backward)]
    assert shapes == [(1024, 16, 512), (512, 16, 1024), (16, 4096, 1024), (1024, 4096, 16)]
    assert gemms(weights) == gemms(backward)[:3]
    for op in (backward, weights, LORA, GEMM, ops.linear(1024, (4096, 512), False, "backward", "bf16", 2)):
        assert sum(2 * g.rows * g.columns * g.depth for g in gemms(op)) == op.flops


def test_grouped_adapters_by_hand() -> None:
    half = Cost(p50_ns=100, host_ns=9, relative_error=0.1, utilisation=0.5, joules=1.0)
    small = Cost(p50_ns=20, host_ns=9, relative_error=0.4, utilisation=0.1, joules=1.0)
    # Σ u·t = 50 + 2 is below the slowest.
    both = grouped([half, small])
    assert (both.p50_ns, both.host_ns, both.joules) == (100, 9, 2.0)
    assert both.relative_error == pytest.approx((0.1 * 100 + 0.4 * 20) / 120)
    assert grouped([half] * 3).p50_ns == 150
    assert grouped([half]) is half
    guessed = replace(small, utilisation_guessed=True)
    assert not grouped([guessed]).extrapolated
    assert grouped([half, guessed]).extrapolated


def test_only_adapters_of_one_base_op_are_grouped() -> None:
    calls = (GEMM, LORA, replace(LORA, shape=(4096, 4096, 8)), GEMM, replace(LORA, shape=(4096, 512, 8)))
    names = [family for family, _ in prices(Roofline(), A40, calls)]
    assert names == ["linear", "lora", "linear", "lora"]
    assert [f for f, _ in prices(Roofline(), A40, calls, fuse_adapters=False)] == [op.family for op in calls]


@dataclass(frozen=True)
class Half:
    """Adapters take 100 ns at half of the device and 10 of the host, all else nothing."""

    model_id: str = "half"
    calibrated: bool = False

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        return Cost(p50_ns=100, host_ns=10, utilisation=0.5) if op.family == "lora" else Cost(p50_ns=0)

    def link_latency(self, op: Op, link: Link) -> Cost:
        return Cost(p50_ns=0)


def stage(tp: int, tasks: int = 4) -> tuple[StageContext, list[Batch]]:
    """A middle stage of one LLaMA2-7B layer, and a batch of 8 rows of 128 tokens for each task."""
    names = [f"t{i}" for i in range(tasks)]
    context = StageContext(
        model=replace(model_preset("llama2-7b"), layers=3),
        layout=Layout(tp=tp, pp=3, layers_per_stage=(1, 1, 1)),
        stage=1,
        adapters=tuple((name, LoRA(rank=16)) for name in names),
    )
    batches = []
    for h, name in enumerate(names):
        rows = (
            Row(task=name, slot=i, sample=0, prompt_tokens=127, response_tokens=1, length_tokens=128) for i in range(8)
        )
        batches.append(Batch(htask=h, rows=tuple(rows)))
    return context, batches


def serial(context: StageContext, htasks: int, way: Any) -> tuple[Launch, ...]:
    """One hTask after the other."""
    return tuple(
        Launch(htask=h, subgraph=s.index, stream="comm" if s.collective else "compute")
        for h in range(htasks)
        for s in stage_subgraphs(context.layout, context.stage, way)
    )


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_fused_htask_launches_one_grouped_operator_a_base_op(way: Any) -> None:
    """Four BaseOps, three tasks: grouped 4·max(3·50, 100) and 4 issues, else 12 of each."""
    context, batches = stage(1, 3)
    batch = Batch(htask=0, rows=tuple(row for b in batches for row in b.rows))
    found = {}
    for unfused in ((), (0,)):
        site = Site(context=context, device=A40, unfused=unfused)
        found[unfused] = stage_run(Half(), site, [batch], way, serial(context, 1, way), recur_blocks)
    assert (found[()].costs.p50_ns, found[()].costs.host_ns) == (4 * 150, 4 * 10)
    assert (found[(0,)].costs.p50_ns, found[(0,)].costs.host_ns) == (12 * 100, 12 * 10)


def test_the_plan_says_what_is_fused_and_what_collectives_hold(tiny_state: Any) -> None:
    state = tiny_state(tp=2, cluster="2xA40")
    instance = make_instance(state, "shared", [["t0", "t1"], ["t2", "t3"]], [[0, 1]])

    def run(**changes: Any) -> int:
        changed = replace(instance, **changes)
        plan = Plan(workload=state.workload, cluster=state.cluster, instances=(changed,))
        return estimate(plan, Half(), seed=0).iteration_ns

    loose = tuple(replace(h, fuse_adapters=False) for h in instance.htasks)
    assert run(htasks=loose) > run()
    with pytest.raises(ValueError, match="comm_ctas=-1: must be at least 0"):
        replace(instance, comm_ctas=-1)


def test_caches_tell_sites_apart() -> None:
    context, batches = stage(2)
    cache = StageCache(Roofline(), recur_blocks)
    launches = turns(context, 4, "forward")
    link = LINKS["nvlink"]
    sites = [Site(context=context, device=A40, link=link, comm_ctas=n, unfused=u) for n in (0, 8) for u in ((), (1,))]
    runs = [cache.run(site, batches, "forward", launches) for site in sites]
    assert [r.slowed_ns > 0 for r in runs] == [False, False, True, True]
    assert len({id(r) for r in runs}) == 4


def test_compute_and_memory_that_a_collective_leaves_by_hand() -> None:
    assert slowdown(GEMM, A40, (LOAD,)) == pytest.approx(84 / (84 - 8))
    copy = ops.pointwise("residual", 1024, (4096,), 3, 1, "forward", "bf16", 2)
    assert slowdown(copy, A40, (LOAD,)) == pytest.approx(696 / (696 - 2 * 56.25))
    # A link as fast as memory takes no more than half of it, CTAs never the last SM.
    assert slowdown(copy, A40, (ops.collective_load(8, 10**12),)) == pytest.approx(2.0)
    assert slowdown(GEMM, A40, (ops.collective_load(999, 1),)) == pytest.approx(84.0)
    assert slowdown(GEMM, A40, ()) == slowdown(GEMM, CPU, (LOAD,)) == 1.0
    alone = Roofline().latency(GEMM, A40)
    assert Roofline().latency(GEMM, A40, (LOAD,)).joules == alone.joules
    # Two GEMMs that keep 3/4 of the SMs busy each take turns for half of the time.
    busy = 256 / 336
    assert Roofline().latency(GEMM, A40, (GEMM,)).p50_ns == pytest.approx(2 * busy * alone.p50_ns, rel=1e-6)


def test_nothing_is_held_on_a_cpu_without_a_link_or_without_ctas() -> None:
    assert comm_load(A40, LINKS["nvlink"]) == (ops.collective_load(8, LINKS["nvlink"].bandwidth_bytes_per_s),)
    assert comm_load(CPU, LINKS["local"]) == comm_load(A40, None) == comm_load(A40, LINKS["nvlink"], 0) == ()


def turns(context: StageContext, htasks: int, way: Any) -> tuple[Launch, ...]:
    """Shallow first: the same subgraph of every hTask in turn."""
    return tuple(sorted(serial(context, htasks, way), key=lambda x: (x.subgraph // 2, x.htask, x.subgraph)))


def test_overlap_of_one_layer_on_four_gpus() -> None:
    """MuxTune measured 1.10x; uncalibrated roofline, 8 CTAs (DESIGN §13: 1.05-1.20)."""
    context, batches = stage(4)
    cluster = parse_cluster("4xA40-nvlink")
    site = Site(context=context, device=cluster.device, link=cluster.slowest_link(range(4)))
    times = []
    for order in (serial, turns):
        runs = [
            stage_run(Roofline(), site, batches, way, order(context, 4, way), recur_blocks)  # type: ignore[arg-type]
            for way in ("forward", "backward")
        ]
        times.append(sum(r.duration_ns for r in runs))
    assert 1.05 <= times[0] / times[1] <= 1.20


def grid(*points: tuple[str, str, int, int, float]) -> CoRunGrid:
    return CoRunGrid(
        device="A40",
        points=tuple(
            CoRun(family=family, beside=beside, size=size, load=load, slowdown=slow, spread=0.03)
            for family, beside, size, load, slow in points
        ),
    )


def test_saturation_of_one_gpu() -> None:
    """8 tasks of 8 x 128 tokens, one A40, 8 layers of LLaMA2-7B: batched against one by one (MuxTune Fig. 9b: 1.12x).

    Roofline and mode `paper`, both uncalibrated (DESIGN §13: 1.05-1.25); what batching saves are partial waves, the small
    operators of adapters, and weights read once.
    """
    model, table = replace(model_preset("llama2-7b"), layers=8), embedded_length("openbookqa")
    tasks = (
        Task(task_id=f"t{i}", peft=LoRA(), dataset=table.name, billed_len_tokens=128, global_batch_samples=8)
        for i in range(8)
    )
    workload = Workload(name="saturation", model=model, datasets=(table,), tasks=tuple(tasks))
    state = SystemState(workload=workload, cluster=parse_cluster("1xA40"), layout=even_layout(model), microbatches=1)
    for cost in (Roofline(), Paper()):
        plans = [make_policy(policy, cost).plan(state) for policy in ("temporal", "sl-peft")]
        one_by_one, batched = (estimate(plan, cost, seed=0).iteration_ns for plan in plans)
        assert 1.05 <= one_by_one / batched <= 1.25


GRID = grid(
    ("linear", "collective_load", 1024, 4, 1.02),
    ("linear", "collective_load", 1024, 16, 1.20),
    ("linear", "lora", 1024, 1024, 1.5),
    ("linear", "linear", 1024, 1024, 0.99),
)


def test_a_measured_pair_stretches_the_base_s_time() -> None:
    cost, alone = Interference(grid=GRID), Roofline().latency(GEMM, A40)
    assert cost.latency(GEMM, A40) == alone
    held = cost.latency(GEMM, A40, (ops.collective_load(4, 1),))
    assert held == replace(alone, p50_ns=math.ceil(alone.p50_ns * 1.02))
    between = cost.latency(GEMM, A40, (LOAD,))  # 8 lies half way from 4 to 16 on a log scale
    assert between.p50_ns == pytest.approx(alone.p50_ns * math.sqrt(1.02 * 1.20), rel=1e-4)
    assert not between.extrapolated
    assert cost.latency(GEMM, A40, (ops.collective_load(32, 1),)).extrapolated
    # Several beside it multiply, and a measured gain is none.
    assert cost.latency(GEMM, A40, (LORA, GEMM)).p50_ns == math.ceil(alone.p50_ns * 1.5)


def test_a_pair_that_was_not_measured_takes_the_stated_default_and_says_so() -> None:
    for cost in (Interference(), Interference(grid=GRID)):
        found = cost.latency(LORA, A40, (LOAD,))
        assert found == replace(Roofline().latency(LORA, A40, (LOAD,)), extrapolated=True)
    assert Interference().model_id == "interference:roofline:default"
    assert Interference(grid=GRID).model_id.startswith("interference:roofline:")
    assert not Interference(grid=GRID).calibrated


def test_wrong_grids_are_refused() -> None:
    with pytest.raises(InputError, match="measured on A40, not on H100: measure it there"):
        Interference(grid=GRID).latency(GEMM, device_presets()["H100"], (LOAD,))
    with pytest.raises(InputError, match="linear beside lora: the measured sizes are no full grid"):
        Interference(grid=grid(("linear", "lora", 1, 2, 1.1), ("linear", "lora", 2, 1, 1.1)))
    with pytest.raises(ValueError, match="measured twice"):
        grid(("linear", "lora", 1, 2, 1.1), ("linear", "lora", 1, 2, 1.2))
    with pytest.raises(ValueError, match="beside='gemv': known are"):
        grid(("linear", "gemv", 1, 2, 1.1))
    with pytest.raises(ValueError, match="slowdown=0"):
        grid(("linear", "lora", 1, 2, 0))


def test_cost_models_are_chosen_by_name_and_options(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    write_noun(GRID, path)
    assert read_noun(CoRunGrid, path) == GRID
    cluster = parse_cluster("1xA40")
    chosen = load_cost(f"interference:grid={path}", cluster)
    assert chosen.model_id == Interference(grid=GRID).model_id
    table = tmp_path / "costs.json"
    write_noun(lora_table().fitted, table)
    assert load_cost(f"paper:base={table}", cluster).model_id == f"paper:{lora_table().model_id}"
    assert load_cost("paper", cluster).model_id == "paper:roofline"
    assert load_cost("roofline:all_reduce=tree", cluster).model_id == "roofline:all_reduce=tree"
    with pytest.raises(UnknownKeyError, match="unknown option of cost model paper 'bass'"):
        load_cost("paper:bass=roofline", cluster)


def lora_table(measured: float | None = None) -> Table:
    """An adapter measured at two sizes, and a linear."""
    adapter = tuple(Point(size=(n,), p50_ns=n * 10, spread=0.02, utilisation=measured) for n in (512, 2048))
    linear = tuple(Point(size=(n,), p50_ns=n * 100, spread=0.02) for n in (512, 2048))
    curves = [
        Curve(family="lora", direction="forward", dtype="bf16", shape=(4096, 4096, 16), points=adapter),
        Curve(family="linear", direction="forward", dtype="bf16", shape=(4096, 4096, 0), points=linear),
    ]
    return Table(fit_table(curves, A40, 1), A40)


def test_a_table_knows_the_utilisation_it_measured() -> None:
    measured, guessed = (lora_table(u).latency(LORA, A40) for u in (0.3, None))
    assert (measured.utilisation, measured.utilisation_guessed) == (0.3, False)
    assert (guessed.utilisation, guessed.utilisation_guessed) == (utilisation(LORA, A40), True)
    assert grouped([guessed, guessed]).extrapolated
    with pytest.raises(ValueError, match="utilisation=0: must be above 0 and at most 1"):
        Point(size=(1,), p50_ns=1, spread=0.0, utilisation=0)


def test_a_table_stretches_by_the_default_and_flags_it() -> None:
    table = lora_table()
    alone, held = table.latency(GEMM, A40), table.latency(GEMM, A40, (LOAD,))
    assert held.p50_ns == math.ceil(alone.p50_ns * slowdown(GEMM, A40, (LOAD,)))
    assert (held.extrapolated, held.relative_error, alone.extrapolated) == (True, 0.5, False)


@dataclass(frozen=True)
class Sure:
    """Everything takes 1000 ns for certain; beside a collective 1500, of which the model says how far it trusts them."""

    error: float
    guessed: bool
    model_id: str = "sure"
    calibrated: bool = True

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        if op.dtype == "host":
            return Cost(p50_ns=0)
        return Cost(p50_ns=1500, relative_error=self.error, extrapolated=self.guessed) if share else Cost(p50_ns=1000)

    def link_latency(self, op: Op, link: Link) -> Cost:
        return Cost(p50_ns=20_000)


@pytest.mark.parametrize("order", [serial, turns])
def test_slowing_is_charged_with_its_error_and_as_extrapolated(order: Any) -> None:
    context, batches = stage(4)
    site = Site(context=context, device=A40, link=LINKS["nvlink"])
    launches = order(context, 4, "forward")
    runs = [
        stage_run(model, site, batches, "forward", launches, recur_blocks)
        for model in (Sure(0.5, False), Sure(0.5, True), Sure(0.0, False))
    ]
    assert len({r.duration_ns for r in runs}) == 1
    slowed_ns = runs[0].slowed_ns
    assert (slowed_ns > 0) == (order is turns)
    assert dict(runs[0].costs.error_ns).get("interference", 0.0) == pytest.approx(0.5 * slowed_ns)
    assert [r.costs.extrapolated_ns for r in runs] == [0, slowed_ns, 0]
    assert runs[2].costs.relative_error == 0.0


def test_the_estimate_carries_both(tiny_state: Any) -> None:
    """With Algorithm 1's launch lists collectives run under other hTasks; without CTAs nothing rests on the default."""
    state = tiny_state(tp=2, cluster="2xA40")
    plan = make_policy("muxtune:fusion=false", Sure(0.0, False)).plan(state)
    assert any(b.launches for b in plan.instances[0].buckets)
    quiet, loud = (estimate(plan, cost, seed=0) for cost in (Sure(0.0, False), Sure(0.5, True)))
    assert quiet.iteration_ns == loud.iteration_ns
    assert quiet.relative_error == quiet.extrapolated_fraction == 0.0
    assert 0 < loud.relative_error < 0.5
    assert 0 < loud.extrapolated_fraction < 1
    free = replace(plan, instances=(replace(plan.instances[0], comm_ctas=0),))
    unslowed = estimate(free, Sure(0.5, True), seed=0)
    assert unslowed.relative_error == unslowed.extrapolated_fraction == 0.0
    assert unslowed.iteration_ns <= quiet.iteration_ns
