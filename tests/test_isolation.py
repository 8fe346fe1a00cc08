"""Isolation suite: a task's gradients and losses are its own under every layout, grouping, order and alignment (DESIGN §13)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muxtune.executor.checkpoint import checkpoints, newest_checkpoint
from muxtune.executor.group import WorkerGroup, measured_timeline
from muxtune.executor.messages import Call, Gradients, Inspect, Inspection, Poison
from muxtune.executor.reports import Array
from muxtune.executor.session import Session
from muxtune.policies.base import SystemState, make_policy
from muxtune.policies.build import make_instance
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import make_evaluate
from muxtune.spec.align import Alignment
from muxtune.spec.bind import bind, serial_launches
from muxtune.spec.check import check
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.files import write_noun
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import ModelSpec, model_preset
from muxtune.spec.order import bucket_major, chunks_of, one_f_one_b
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Action, Instance, Plan, StageOrder
from muxtune.spec.task import Task, Workload

pytestmark = pytest.mark.dist

SP = {"sequence_parallel": True}
AGAIN = {"recompute": "full"}
#: Every layout runs on the ranks of one group; devices need not be in order.
LAYOUTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "1 rank": ({}, (1,)),
    "pp=2": ({"pp": 2}, (2, 0)),
    "tp=2": ({"tp": 2}, (3, 1)),
    "tp=2 pp=2": ({"tp": 2, "pp": 2}, (0, 1, 3, 2)),
    "dp=2": ({"dp": 2}, (0, 1)),
    "dp=2 pp=2": ({"dp": 2, "pp": 2}, (0, 1, 2, 3)),
    "dp=2 tp=2": ({"dp": 2, "tp": 2}, (3, 1, 0, 2)),
    "tp=2 sp": ({"tp": 2, **SP}, (2, 1)),
    "tp=2 pp=2 sp": ({"tp": 2, "pp": 2, **SP}, (0, 1, 3, 2)),
    "pp=2 recompute": ({"pp": 2, **AGAIN}, (1, 2)),
    "tp=2 sp recompute": ({"tp": 2, **SP, **AGAIN}, (0, 3)),
}
GROUPINGS = {
    "fused": ([["a", "b", "c"]], [[0]]),
    "interleaved": ([["a"], ["b", "c"]], [[1, 0]]),
    "reordered": ([["c"], ["b"], ["a"]], [[2, 1], [0]]),
}
ALIGNMENTS: dict[str, tuple[Alignment, int]] = {
    "pad": ("pad", 0),
    "varlen": ("varlen", 0),
    "packed": ("chunk", 64),
    "chunks": ("chunk", 8),
}


def tasks() -> tuple[Task, ...]:
    """Three tasks of unequal rank, targets, batch and length; `b` adapts qkv only, `c` leaves qkv alone."""
    common: dict[str, Any] = {"dataset": "sst2", "learning_rate": 1e-2}
    return (
        Task(task_id="a", peft=LoRA(rank=4), billed_len_tokens=32, global_batch_samples=3, **common),
        Task(task_id="b", peft=LoRA(rank=2, targets=("qkv",)), billed_len_tokens=16, global_batch_samples=2, **common),
        Task(
            task_id="c",
            peft=LoRA(rank=3, targets=("fc1", "fc2")),
            billed_len_tokens=24,
            global_batch_samples=2,
            **common,
        ),
    )


def make_layout(model: ModelSpec, degrees: Mapping[str, Any]) -> Layout:
    """Layers spread evenly; `recompute` is no degree."""
    even = even_layout(model, **{k: v for k, v in degrees.items() if k != "recompute"})
    return replace(even, recompute=degrees.get("recompute", "none"))


def make_plan(
    layout: str = "1 rank",
    groups: Sequence[Sequence[str]] = (("a", "b", "c"),),
    buckets: Sequence[Sequence[int]] = ((0,),),
    alignment: str = "pad",
    model: str = "tiny-test",
    microbatches: int = 2,
    **changes: Any,
) -> Plan:
    """A plan of one instance that passes `check`."""
    names = {t for g in groups for t in g}
    degrees, devices = LAYOUTS[layout]
    spec = model_preset(model)
    mine = tuple(t for t in tasks() if t.task_id in names)
    workload = Workload(name="w", model=spec, datasets=(embedded_length("sst2"),), tasks=mine)
    state = SystemState(
        workload=workload,
        cluster=parse_cluster("4xcpu"),
        layout=make_layout(spec, degrees),
        microbatches=microbatches,
    )
    instance = make_instance(state, "i", groups, buckets, *ALIGNMENTS[alignment])
    instance = interleaved(replace(instance, devices=devices, **changes))
    plan = Plan(workload=workload, cluster=state.cluster, instances=(instance,))
    assert check(plan) == ()
    return plan


def interleaved(instance: Instance) -> Instance:
    """The hTasks of a bucket subgraph by subgraph in turn, so that one's collective runs under the other's compute."""
    buckets = []
    for bucket in instance.buckets:
        lists = []
        for stage in range(instance.layout.pp):
            for serial in serial_launches(instance, bucket, stage):
                order = tuple(sorted(serial.launches, key=lambda x: (x.subgraph, x.htask)))
                lists.append(replace(serial, launches=order))
        buckets.append(replace(bucket, launches=tuple(lists)))
    return replace(instance, buckets=tuple(buckets))


Found = dict[str, dict[str, Array]]


def gradients(workers: WorkerGroup, plan: Plan) -> Found:
    """Gradients of one pass by task and parameter, put together from the shards of the first replica."""
    workers.load("x", bind(plan, seed=3), random_adapters=True)
    return whole(plan, workers.ask(Gradients(name="x")))


def whole(plan: Plan, per_rank: Sequence[Found]) -> Found:
    """Join the shards of every parameter; replicas and tp peers that hold the same must agree bit by bit."""
    (instance,) = plan.instances
    layout, gated = instance.layout, plan.workload.model.gated
    found: Found = {t: {} for t in instance.tasks}
    for stage in range(layout.pp):
        first = per_rank[instance.devices[stage * layout.tp]]
        for task, name in ((t, n) for t in first for n in first[t]):
            shards = [per_rank[instance.devices[r]][task][name] for r in layout.stage_peers(stage * layout.tp)]
            for replica in range(1, layout.dp):
                ranks = (replica * layout.pp * layout.tp + r for r in layout.stage_peers(stage * layout.tp))
                for shard, rank in zip(shards, ranks, strict=True):
                    assert np.array_equal(shard, per_rank[instance.devices[rank]][task][name])
            found[task][name] = joined(name, shards, gated)
    return found


def joined(name: str, shards: Sequence[Array], gated: bool) -> Array:
    """A: sharded along its inputs beside row-parallel linears; B: along its outputs beside column-parallel ones."""
    _, target, tensor = name.split(".")
    sharded = (tensor == "a") == (target in ("proj", "fc2"))
    if len(shards) == 1 or not sharded:
        assert all(np.array_equal(shards[0], s) for s in shards)
        return shards[0]
    if tensor == "a":
        return np.concatenate(shards, 1)
    halves = [np.split(s, 2 if gated and target == "fc1" else 1) for s in shards]
    return np.concatenate([s[half] for half in range(len(halves[0])) for s in halves])


def assert_equal(found: Found, expected: Found) -> None:
    """Norm of the difference at most 1e-5 of the norm, parameter by parameter."""
    for task in found:
        assert found[task].keys() == expected[task].keys()
        for name, value in expected[task].items():
            assert np.linalg.norm(value) > 0
            error = np.linalg.norm(found[task][name] - value) / np.linalg.norm(value)
            assert error <= 1e-5, (task, name, error)


@pytest.fixture(scope="module")
def solo(rank_pool: Any) -> Found:
    """Each task alone on one rank, padded."""
    return {t: gradients(rank_pool.get(), make_plan(groups=[[t]]))[t] for t in "abc"}


CASES = [(g, a) for g in GROUPINGS for a in ALIGNMENTS if g == "interleaved" or a in ("varlen", "chunks")]


@pytest.mark.parametrize(("grouping", "alignment"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_task_alone_on_one_rank(
    workers: WorkerGroup, solo: Found, layout: str, grouping: str, alignment: str
) -> None:
    groups, buckets = GROUPINGS[grouping]
    assert_equal(gradients(workers, make_plan(layout, groups, buckets, alignment)), solo)


def train(workers: WorkerGroup, plan: Plan, steps: int, poisoned: str = "", seed: int = 3) -> list[Inspection]:
    """Run a plan's Program some times; the ranks' reports and parameters."""
    workers.load("x", bind(plan, seed=seed))
    if poisoned:
        workers.ask(Poison(name="x", task=poisoned))
    for _ in range(steps):
        workers.run("x")
    return workers.ask(Inspect(name="x", state=True))


def curves(inspections: Sequence[Inspection]) -> dict[str, tuple[float, ...]]:
    """Losses of every task, from the ranks that know them, which must agree."""
    found: dict[str, tuple[float, ...]] = {}
    for inspection in inspections:
        for task, report in inspection.reports.items():
            if report.losses:
                assert found.setdefault(task, report.losses) == report.losses
    return found


@pytest.fixture(scope="module")
def solo_curves(rank_pool: Any) -> dict[str, tuple[float, ...]]:
    """Four steps of each task alone on one rank, padded."""
    return {t: curves(train(rank_pool.get(), make_plan(groups=[[t]]), 4))[t] for t in "abc"}


@pytest.mark.parametrize("alignment", ["pad", "chunks"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_curves_are_those_of_the_task_alone_on_one_rank(
    workers: WorkerGroup, solo_curves: dict[str, tuple[float, ...]], layout: str, alignment: str
) -> None:
    found = curves(train(workers, make_plan(layout, *GROUPINGS["interleaved"], alignment), 4))
    for task, expected in solo_curves.items():
        assert expected[3] < expected[0]
        assert found[task] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("layout", ["1 rank", "pp=2", "tp=2", "tp=2 pp=2", "dp=2", "tp=2 pp=2 sp"])
def test_nan_of_one_task_leaves_the_others_bit_identical(workers: WorkerGroup, layout: str, alignment: str) -> None:
    plan = make_plan(layout, *GROUPINGS["interleaved"], alignment)
    clean, poisoned = train(workers, plan, 2), train(workers, plan, 2, "b")
    for rank in plan.instances[0].devices:
        assert poisoned[rank].reports["b"].skipped == 2
        for task in "ac":
            assert poisoned[rank].reports[task].skipped == 0
            for name, tensor in clean[rank].state[task].items():
                assert np.array_equal(tensor, poisoned[rank].state[task][name]), (rank, task, name)


def test_recomputation_takes_less_memory_for_the_same_gradients(workers: WorkerGroup) -> None:
    """Peaks as allocated: 4 layers and every unit in flight at once, so that what the units keep dominates."""
    kept = make_plan(model="tiny-llama", microbatches=2, order="gpipe")
    (instance,) = kept.instances
    again = replace(kept, instances=(replace(instance, layout=replace(instance.layout, recompute="full")),))
    peaks = []
    for plan in (kept, again):
        workers.load("x", bind(plan, seed=3))
        found = workers.run("x", memory=True)[instance.devices[0]]
        peaks.append((found.peak_bytes or 0) - (found.static_bytes or 0))
    assert peaks[1] < 0.6 * peaks[0]


def test_layer_norms_biases_and_learned_positions_under_sequence_parallelism(workers: WorkerGroup) -> None:
    single = gradients(workers, make_plan(model="tiny-gpt2"))
    for alignment in ("pad", "chunks"):
        found = gradients(workers, make_plan("tp=2 pp=2 sp", *GROUPINGS["interleaved"], alignment, model="tiny-gpt2"))
        assert_equal(found, single)


@pytest.mark.parametrize("layout", ["tp=2 pp=2", "tp=2 pp=2 sp", "dp=2 tp=2"])
def test_random_delays_around_everything_that_meets_change_no_bit(workers: WorkerGroup, layout: str) -> None:
    plan = make_plan(layout, [["a"], ["b"], ["c"]], [[0, 1], [2]], "chunks")
    wanted = train(workers, plan, 2)
    for seed in (1, 2):
        workers.load("x", bind(plan, seed=3))
        workers.ask(Call(function="muxtune.executor.comm:delay_collectives", arguments=("x", seed, 300)))
        for _ in range(2):
            workers.run("x")
        for found, expected in zip(workers.ask(Inspect(name="x", state=True)), wanted, strict=True):
            assert found.reports == expected.reports
            for task, state in expected.state.items():
                assert all(np.array_equal(found.state[task][name], tensor) for name, tensor in state.items())


def test_collectives_run_under_the_compute_of_another_htask_and_spans_say_so(workers: WorkerGroup) -> None:
    plan = make_plan("tp=2", [["a"], ["b"], ["c"]], [[0, 1, 2]], model="tiny-llama")
    bound = bind(plan, seed=3)
    workers.load("x", bound)
    workers.run("x")
    timeline = measured_timeline(bound, workers.run("x"))
    launched = {f"{x.bucket} {x.direction}": x.launches for x in bound.program.launches}
    hidden_ns = 0
    for rank in plan.instances[0].devices:
        for whole_span in timeline.instruction_spans(rank):
            if whole_span.op not in ("forward", "backward"):
                continue
            inner = [s for s in timeline.spans if (s.rank, s.index) == (rank, whole_span.index) and s.subgraph >= 0]
            assert all(whole_span.start_ns <= s.start_ns <= s.end_ns <= whole_span.end_ns for s in inner)
            compute = sorted((s for s in inner if s.stream == "compute"), key=lambda s: s.start_ns)
            assert all(a.end_ns <= b.start_ns for a, b in pairwise(compute))
            order = [x.subgraph for x in launched[f"{whole_span.key.bucket} {whole_span.op}"] if x.stream == "compute"]
            assert [s.subgraph for s in compute] == order
            for collective in (s for s in inner if s.stream == "comm"):
                own = [s for s in compute if s.tasks == collective.tasks]
                assert all(s.end_ns <= collective.start_ns for s in own if s.subgraph < collective.subgraph)
                assert all(s.start_ns >= collective.end_ns for s in own if s.subgraph > collective.subgraph)
                others = (s for s in compute if s.tasks != collective.tasks)
                hidden_ns += sum(
                    max(0, min(s.end_ns, collective.end_ns) - max(s.start_ns, collective.start_ns)) for s in others
                )
    assert hidden_ns > 0


@pytest.fixture(scope="module")
def two_steps(rank_pool: Any) -> tuple[dict[str, tuple[float, ...]], Found]:
    """Losses of two steps with fresh samples on one rank, and the adapters after them."""
    return two_step_run(rank_pool.get(), make_plan(microbatches=1))


def two_step_run(workers: WorkerGroup, plan: Plan) -> tuple[dict[str, tuple[float, ...]], Found]:
    """Run a Program of two optimizer steps once; losses, and adapters put together instance by instance."""
    workers.load("x", bind(plan, seed=3, steps=2))
    workers.run("x")
    inspections = workers.ask(Inspect(name="x", state=True))
    states: Found = {}
    for instance in plan.instances:
        mine = [{t: i.state[t] for t in instance.tasks if t in i.state} for i in inspections]
        states |= whole(replace(plan, instances=(instance,)), mine)
    return curves(inspections), states


def planned(policy: str, layout: str) -> Plan:
    """A policy's plan for the three tasks, on the layout's devices."""
    degrees, _ = LAYOUTS[layout]
    model = model_preset("tiny-test")
    workload = Workload(name="w", model=model, datasets=(embedded_length("sst2"),), tasks=tasks())
    cluster, cost = parse_cluster("4xcpu"), Roofline()
    state = SystemState(
        workload=workload,
        cluster=cluster,
        layout=make_layout(model, degrees),
        microbatches=2,
        evaluate=make_evaluate(cost, 0, draws=1),
    )
    return make_policy(policy, cost).plan(state)


@pytest.mark.parametrize("layout", ["1 rank", "tp=2 pp=2", "dp=2 pp=2"])
@pytest.mark.parametrize("policy", ["lorafusion:steps=2", "muxtune:alignment=chunk,chunk=8", "temporal", "hf-peft"])
def test_whatever_a_policy_plans_trains_every_task_alike(
    workers: WorkerGroup, two_steps: tuple[dict[str, tuple[float, ...]], Found], policy: str, layout: str
) -> None:
    """Tasks that step under each other's drains (R = 2), eager orders with chunks, tasks in turn, a backbone a task."""
    losses, states = two_step_run(workers, planned(policy, layout))
    for task, expected in two_steps[0].items():
        assert losses[task] == pytest.approx(expected, abs=1e-4)
        for name, tensor in two_steps[1][task].items():
            assert states[task][name] == pytest.approx(tensor, abs=2e-4), (task, name)


def test_a_step_between_other_tasks_units_gives_the_same_bits(workers: WorkerGroup) -> None:
    """Two steps in one order, each task stepping as soon as its backwards are done, against one step a pass."""
    plan = make_plan("pp=2", [["a"], ["b"], ["c"]], [[0], [1], [2]], "chunks")
    (instance,) = plan.instances
    free = replace(plan, instances=(replace(instance, order="explicit", orders=free_steps(instance), steps=2),))
    assert check(free) == ()
    stage = free.instances[0].orders[0].actions
    first_step = next(i for i, a in enumerate(stage) if a.op == "step")
    assert any(a.op == "backward" and a.step == 0 for a in stage[first_step:])
    one, other = two_step_run(workers, plan), two_step_run(workers, free)
    assert one[0] == other[0]
    for task, state in one[1].items():
        assert all(np.array_equal(other[1][task][name], tensor) for name, tensor in state.items())


def free_steps(instance: Instance) -> tuple[StageOrder, ...]:
    """1F1B over two steps without a flush; a task's step stands right behind its last backward of it."""
    buckets = instance.buckets * 2
    orders = one_f_one_b(
        bucket_major(buckets), instance.layout.pp, chunks=chunks_of(replace(instance, buckets=buckets))
    )
    return tuple(replace(o, actions=tuple(_with_steps(instance, o.actions))) for o in orders)


def _with_steps(instance: Instance, actions: Sequence[Action]) -> Iterator[Action]:
    count = len(instance.buckets)
    real = [replace(a, bucket=a.bucket % count, step=a.bucket // count) for a in actions]
    for index, action in enumerate(real):
        yield action
        later = real[index + 1 :]
        if action.op == "backward" and not any(
            (x.op, x.bucket, x.step) == ("backward", action.bucket, action.step) for x in later
        ):
            (htask,) = instance.buckets[action.bucket].htasks
            for task in instance.htasks[htask].tasks:
                yield Action(op="step", task=task, step=action.step)


def test_torchrun_trains_like_workers(workers: WorkerGroup, tmp_path: Path) -> None:
    """And saves like them: workers begin the run, torchrun goes on with it, workers end it; bit for bit as without a stop."""
    plan = make_plan("dp=2", microbatches=1)
    write_noun(plan, tmp_path / "plan.json")
    state = tmp_path / "state"
    session = Session(workers, plan, seed=3, checkpoint=state)
    session.iterate()
    session.save()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "muxtune.experiments.main"]
    command += ["execute", str(tmp_path / "plan.json"), "--iterations", "3", "--seed", "3", "--json"]
    command += ["--checkpoint", str(state), "--every", "1", "--keep", "2", "--resume"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert (found["ranks"], found["resumed_at"]) == (2, 1)
    assert [p.name for p in checkpoints(state)] == ["iteration-00000003", "iteration-00000002"]
    newest = newest_checkpoint(state)
    assert newest is not None
    assert {f.rank for f in newest.manifest.files} == {0, 1}
    whole_run = Session(workers, plan, seed=3)
    for _ in range(4):
        whole_run.iterate()
    expected = {t: [r.loss for r in reports] for t, reports in whole_run.curves().items()}
    assert found["losses"] == {t: x[:3] for t, x in expected.items()}
    last = Session.resume(workers, newest, state)
    last.iterate()
    assert {t: [r.loss for r in reports] for t, reports in last.curves().items()} == expected
