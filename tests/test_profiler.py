"""The profiler: cases cover every plan, fitting divides drift out, a killed run resumes, and a real round is usable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from muxtune.experiments.laws import with_options
from muxtune.policies.base import SystemState, make_policy, policies
from muxtune.profiler.bench import Bench
from muxtune.profiler.cases import (
    EMPTY,
    EMPTY_LORA,
    PASSAGE,
    Case,
    block_of,
    message_sizes,
    needed_cases,
    octaves,
    passage_batch,
    passage_stage,
    shared_cases,
)
from muxtune.profiler.coverage import missing
from muxtune.profiler.fit import fit
from muxtune.profiler.provenance import birth
from muxtune.profiler.run import Profiling
from muxtune.profiler.store import Meta, Store
from muxtune.sim.cost.base import total
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.cost.table import Curve, Point, Table, fit_table
from muxtune.sim.simulate import make_evaluate, simulate
from muxtune.spec.bind import bind
from muxtune.spec.catalogue import StageContext, stage_subgraphs, subgraph_ops
from muxtune.spec.cluster import device_presets, parse_cluster
from muxtune.spec.errors import ExtrapolationError, InputError
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.ops import COLLECTIVES, OVERHEADS, attention
from muxtune.spec.peft import peft_kinds
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.task import Task, Workload

CPU = device_presets()["cpu"]
MODEL = replace(model_preset("tiny-test"), max_positions=160)
REFERENCE_NS = 350_000
#: Families that are timed without an autograd graph of their own.
UNHARNESSED = ("embedding", "residual", "cross_entropy", "adamw", "launch", "instruction")


def _workload() -> Workload:
    tasks = (
        Task(task_id="a", peft=LoRA(rank=4), dataset="sst2", billed_len_tokens=16, global_batch_samples=3),
        Task(
            task_id="b",
            peft=LoRA(rank=2, targets=("proj", "fc2")),
            dataset="sst2",
            billed_len_tokens=32,
            global_batch_samples=2,
        ),
        Task(task_id="c", peft=LoRA(rank=4), dataset="sst2", billed_len_tokens=160, global_batch_samples=1),
    )
    return Workload(name="w", model=MODEL, datasets=(embedded_length("sst2"),), tasks=tasks)


def _layouts() -> list[Layout]:
    return [even_layout(MODEL), even_layout(MODEL, pp=2)]


def _more_layouts() -> list[Layout]:
    sharded = even_layout(MODEL, tp=2, sequence_parallel=True)
    return [*_layouts(), even_layout(MODEL, tp=2), even_layout(MODEL, dp=2), sharded]


def _true_ns(case: Case, direction: str) -> int:
    """A made-up machine: fixed cost, plus time proportional to size; backward twice; a passage far above its operators,
    three tenths of it in attention blocks and four in MLP blocks.

    Timing itself costs 500 ns forward and 1,000 backward.
    """
    if case.family in (EMPTY, EMPTY_LORA):
        return 500 if direction == "forward" else 1_000
    size = int(np.prod(case.size))
    return (2_000 + 300 * size) * (1 if direction == "forward" else 2) * (40 if case.family == PASSAGE else 1)


def _meta(cases: Sequence[Case], sizes_bytes: tuple[int, ...], shared: Sequence[Case] = ()) -> Meta:
    return Meta(
        device="cpu",
        model=MODEL,
        shared=tuple(shared),
        cases=tuple(cases),
        message_bytes=sizes_bytes,
        meeting_ranks=(2,) if sizes_bytes else (),
        provenance=birth("cpu"),
    )


def _rows(
    cases: Sequence[Case], sizes_bytes: tuple[int, ...], drift: float, shared: Sequence[Case] = ()
) -> list[tuple[int, str, int, int, int]]:
    """One round of the made-up machine, slowed down by `drift` as a whole, reference included."""
    reference_ns = round(REFERENCE_NS * drift)
    rows = []
    for index, case in enumerate(cases):
        for direction in ("weights",) if case.direction == "weights" else ("forward", "backward"):
            parts = {"": 1.0, ".attention": 0.3, ".mlp": 0.4} if case.family == PASSAGE else {"": 1.0}
            for part, share in parts.items():
                ns = round(_true_ns(case, direction) * share * drift)
                rows.append((index, direction + part, ns, ns, reference_ns))
    for offset, size_bytes in enumerate(sizes_bytes):
        for family in ("send", "p2p", "recv"):
            ns = round((10_000 + size_bytes) * drift)
            rows.append((len(cases) + offset, family, ns, ns, reference_ns))
    ns = round(90_000 * drift)
    rows.append((len(cases) + len(sizes_bytes), "all_reduce", ns, ns, reference_ns))
    for place, case in enumerate(shared, start=len(cases) + len(sizes_bytes) + 1):
        for direction in ("forward",) if case.family in COLLECTIVES else ("forward", "backward"):
            ns = round(_true_ns(case, direction) * drift)
            rows.append((place, direction, ns, ns, reference_ns))
    return rows


@pytest.fixture
def profile(tmp_path: Path) -> tuple[Path, Workload, tuple[Case, ...]]:
    workload = _workload()
    cases, sizes_bytes = needed_cases([workload], _layouts()), message_sizes([workload])
    store = Store(tmp_path / "p")
    assert store.open(_meta(cases, sizes_bytes)) == 0
    for number, drift in enumerate((1.0, 1.7, 0.6, 1.2, 3.0)):
        store.append(number, _rows(cases, sizes_bytes, drift))
    return store.folder, workload, cases


def test_octaves_enclose_the_range() -> None:
    assert octaves(8, 100) == (8, 16, 32, 64, 128)
    assert octaves(9, 16) == (8, 16)
    assert octaves(1, 1) == (1,)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("alignment", ["", ":alignment=varlen"])
@pytest.mark.parametrize("name", sorted(policies()))
def test_the_cases_cover_every_operator_of_every_policys_plan(
    profile: tuple[Path, Workload, tuple[Case, ...]], name: str, alignment: str, pp: int
) -> None:
    folder, workload, _ = profile
    policy = policies()[name]
    if alignment and "alignment" not in getattr(policy.Config, "__dataclass_fields__", {}):
        pytest.skip(f"{name} has no alignment option")
    table = Table(fit(folder, workload.tasks), CPU)
    layout = even_layout(workload.model, pp=pp)
    evaluate = make_evaluate(Roofline(), 0, 1)
    state = SystemState(
        workload=workload, cluster=parse_cluster("2xcpu"), layout=layout, microbatches=2, evaluate=evaluate
    )
    plan = make_policy(with_options(name + alignment, policy.quick), Roofline()).plan(state)
    for seed in range(3):
        found = simulate(bind(plan, seed=seed), table).estimate
        assert found.extrapolated_fraction == 0
        assert found.calibrated


def test_shards_collectives_and_chunks_are_covered(tmp_path: Path) -> None:
    """Chunk-aligned plans under tensor parallelism, with sequence parallelism, under replicas and on a pipeline."""
    workload, layouts = _workload(), _more_layouts()
    cases, sizes_bytes, shared = (
        needed_cases([workload], layouts),
        message_sizes([workload]),
        shared_cases([workload], layouts),
    )
    store = Store(tmp_path / "p")
    store.open(_meta(cases, sizes_bytes, shared))
    for number in range(2):
        store.append(number, _rows(cases, sizes_bytes, 1.0, shared))
    fitted = fit(store.folder, workload.tasks)
    assert missing(fitted, workload, layouts) == ()
    table = Table(fitted, CPU)
    chunked = 0
    for layout in layouts:
        for name in ("muxtune:alignment=chunk", "muxtune:alignment=varlen", "temporal"):
            evaluate = make_evaluate(Roofline(), 0, 1)
            state = SystemState(
                workload=workload, cluster=parse_cluster("2xcpu"), layout=layout, microbatches=2, evaluate=evaluate
            )
            bound = bind(make_policy(name, table).plan(state), seed=1)
            assert simulate(bound, table).estimate.extrapolated_fraction == 0, (layout.name, name)
            chunked += any(q < n for w in bound.program.units for b in w.batches for _, n, q in b.attention_runs())
    assert chunked == len(layouts)


def test_a_chunk_without_a_curve_takes_its_share_and_says_so() -> None:
    """Two thirds of a sequence of 96 are past: 32 · (192 − 32) / 96² of the square's flops."""
    points = tuple(Point(size=(1, n), p50_ns=n * n, spread=0.0) for n in (64, 96, 128))
    square = Curve(family="attention", direction="forward", dtype="fp32", shape=(4, 2, 8), points=points)
    chunks = tuple(Point(size=(1, n, 32), p50_ns=50_000 + n, spread=0.0) for n in (32, 64))
    own = Curve(family="chunk_attention", direction="forward", dtype="fp32", shape=(4, 2, 8), points=chunks)
    op = attention(1, 96, (4, 2, 8), "forward", "fp32", 4, queries=32)
    guessed = Table(fit_table([square], CPU, 1), CPU, allow_extrapolation=True).latency(op, CPU)
    assert (guessed.p50_ns, guessed.extrapolated) == (32 * (192 - 32), True)
    with pytest.raises(ExtrapolationError, match="a chunk of 32 queries to 96 keys was not measured"):
        Table(fit_table([square], CPU, 1), CPU).latency(op, CPU)
    measured = Table(fit_table([square, own], CPU, 1), CPU).latency(op, CPU)
    assert (measured.p50_ns, measured.extrapolated) == (50_064, False)


def test_fit_divides_out_the_drift(profile: tuple[Path, Workload, tuple[Case, ...]]) -> None:
    folder, workload, cases = profile
    fitted = fit(folder, workload.tasks)
    assert fitted.reference_ns == round(REFERENCE_NS * 1.2)  # the median of the five rounds
    points = {(c.family, c.direction, c.shape, p.size): p.p50_ns for c in fitted.curves for p in c.points}
    checked = 0
    for case in cases:
        if case.family not in (PASSAGE, EMPTY, EMPTY_LORA) and case.direction == "forward":
            found = points[case.family, "forward", case.shape, case.size]
            harness_ns = {"rope": 1000, **dict.fromkeys(UNHARNESSED, 0)}
            net_ns = _true_ns(case, "forward") - harness_ns.get(case.family, 500)
            assert found == pytest.approx(1.2 * net_ns, rel=1e-3)
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_overheads_are_what_the_operators_do_not_explain(
    profile: tuple[Path, Workload, tuple[Case, ...]], direction: Literal["forward", "backward"]
) -> None:
    """Any passage priced by the fitted table takes the time that its nodes took, and so do its blocks."""
    folder, workload, cases = profile
    # The largest passages have more rows than any batch.
    table = Table(fit(folder, workload.tasks), CPU, allow_extrapolation=True)
    passages = [c for c in cases if c.family == PASSAGE]
    assert {c.shape for c in passages} == {(1, 1), (1, 0), (0, 1)}
    task = workload.task(passages[0].task)
    for case in passages:
        layout, stage = passage_stage(workload.model, case.shape)
        context = StageContext(model=workload.model, layout=layout, stage=stage, adapters=((task.task_id, task.peft),))
        groups = subgraph_ops(context, passage_batch(task, case.size[0]), direction)
        nodes_ns = 1.2 * _true_ns(case, direction)
        assert total(table, CPU, [op for g in groups for op in g]).p50_ns == pytest.approx(nodes_ns, rel=1e-3)
        if case.shape == (1, 1):
            blocks = {
                block_of(layout, stage, s): total(table, CPU, groups[s.index]).p50_ns
                for s in stage_subgraphs(layout, stage, direction)
            }
            assert blocks["attention"] == pytest.approx(0.3 * nodes_ns, rel=1e-3)
            assert blocks["mlp"] == pytest.approx(0.4 * nodes_ns, rel=1e-3)


def test_a_profile_resumes_and_refuses_a_foreign_one(profile: tuple[Path, Workload, tuple[Case, ...]]) -> None:
    folder, _, cases = profile
    (folder / "round-0005.part").write_bytes(b"half a round")
    assert Store(folder).open(_meta(cases, message_sizes([_workload()]))) == 5
    with pytest.raises(InputError, match=r"meta\.json: holds a profile of another workload"):
        Store(folder).open(_meta(cases[:-1], ()))


def test_a_folder_without_a_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no profile"):
        Store(tmp_path).meta()


@pytest.mark.dist
def test_two_real_rounds_are_stored_resumed_and_fitted(tmp_path: Path) -> None:
    workload = _workload()
    told: list[tuple[int, int]] = []
    for until in (1, 2):
        with Profiling([workload], [*_layouts(), even_layout(MODEL, tp=2)], tmp_path / "p") as profiling:
            assert profiling.done == until - 1
            profiling.rounds(until, lambda done, total: told.append((done, total)))
    assert told == [(1, 1), (2, 2)]
    fitted = fit(tmp_path / "p", workload.tasks)
    measured = {c.family for c in fitted.curves}
    assert measured >= {
        "linear",
        "lora",
        "attention",
        "adamw",
        "attention_overhead",
        "mlp_overhead",
        "stage_overhead",
        "launch",
        "instruction",
        "send",
        "p2p",
        "recv",
        "all_reduce",
        "chunk_attention",
    }
    assert all(p.p50_ns > 0 for c in fitted.curves for p in c.points if c.family not in OVERHEADS)
    assert fitted.provenance.environment


@pytest.mark.parametrize("kind", sorted(peft_kinds()))
def test_every_peft_method_is_measured_on_every_side(kind: str) -> None:
    """The bench runs the executor's own call for each operator shape of the catalogue, in every direction."""
    bench = Bench.__new__(Bench)
    bench.device, bench.dtype = torch.device("cpu"), torch.float32
    for column_parallel in (True, False):
        shape = peft_kinds()[kind]().shape_on((24, 40), column_parallel, 1)
        for direction, parts in (("forward", ["forward", "backward"]), ("weights", ["weights"])):
            case = Case(family=kind, dtype="fp32", size=(16,), shape=shape, direction=direction)  # type: ignore[arg-type]
            with torch.no_grad():
                run = bench.build(case)
                for _ in range(2):
                    found = run()
            assert [name for name, _, _ in found] == parts
            assert all(wall_ns > 0 for _, wall_ns, _ in found)
