"""Laws of the executor on real Megatron-core stages: isolation, layouts, order, Program identity (DESIGN §13)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from muxtune.executor.group import WorkerGroup, measured_timeline
from muxtune.executor.messages import Gradients, Inspect, Poison
from muxtune.executor.tasks import Array
from muxtune.policies.base import SystemState
from muxtune.policies.build import make_instance
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import simulate
from muxtune.spec.align import Alignment
from muxtune.spec.bind import bind
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import ModelSpec, model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Plan
from muxtune.spec.program import Bound
from muxtune.spec.task import Task, Workload
from muxtune.spec.timeline import span_op

pytestmark = pytest.mark.dist

LAYOUTS = {"1 rank": {}, "pp=2": {"pp": 2}, "tp=2": {"tp": 2}}


def _tasks() -> tuple[Task, ...]:
    """Three tasks of unequal rank, targets, batch and length; `b` adapts qkv only, `c` leaves qkv alone."""
    common: dict[str, Any] = {"dataset": "sst2", "learning_rate": 1e-2}
    return (
        Task(task_id="a", peft=LoRA(rank=4), billed_len_tokens=32, global_batch_samples=3, **common),
        Task(task_id="b", peft=LoRA(rank=2, targets=("qkv",)), billed_len_tokens=16, global_batch_samples=2, **common),
        Task(
            task_id="c",
            peft=LoRA(rank=8, targets=("fc1", "fc2")),
            billed_len_tokens=24,
            global_batch_samples=1,
            **common,
        ),
    )


def _plan(
    model: ModelSpec,
    layout: Layout,
    groups: Sequence[Sequence[str]],
    buckets: Sequence[Sequence[int]],
    alignment: Alignment = "pad",
) -> Plan:
    names = [t for g in groups for t in g]
    tasks = tuple(t for t in _tasks() if t.task_id in names)
    workload = Workload(name="w", model=model, datasets=(embedded_length("sst2"),), tasks=tasks)
    cluster = parse_cluster("2xcpu")
    state = SystemState(workload=workload, cluster=cluster, layout=layout, microbatches=2)
    return Plan(workload=workload, cluster=cluster, instances=(make_instance(state, "i", groups, buckets, alignment),))


@pytest.fixture(scope="module", params=LAYOUTS)
def group(request: pytest.FixtureRequest) -> Iterator[tuple[WorkerGroup, Layout, ModelSpec]]:
    model = model_preset("tiny-test")
    layout = even_layout(model, **LAYOUTS[request.param])
    with WorkerGroup(layout) as workers:
        yield workers, layout, model


def _gradients(workers: WorkerGroup, plan: Plan, name: str) -> list[dict[str, dict[str, Array]]]:
    workers.load(name, bind(plan, seed=3), random_adapters=True)
    return workers.ask(Gradients(name=name))


def _losses(workers: WorkerGroup, plan: Plan, name: str, steps: int) -> dict[str, tuple[float, ...]]:
    workers.load(name, bind(plan, seed=3))
    for _ in range(steps):
        workers.run(name)
    return {task: r.losses for task, r in workers.ask(Inspect(name=name))[-1].reports.items()}


@pytest.mark.parametrize("alignment", ["pad", "varlen"])
@pytest.mark.parametrize(
    ("groups", "buckets"),
    [([["a", "b", "c"]], [[0]]), ([["a", "b"], ["c"]], [[0, 1]]), ([["a"], ["b"], ["c"]], [[1], [2, 0]])],
    ids=["one hTask", "two hTasks in a bucket", "two buckets"],
)
def test_batched_gradients_equal_solo_gradients(
    group: tuple[WorkerGroup, Layout, ModelSpec],
    groups: list[list[str]],
    buckets: list[list[int]],
    alignment: Alignment,
) -> None:
    workers, layout, model = group
    batched = _gradients(workers, _plan(model, layout, groups, buckets, alignment), "batched")
    for task in "abc":
        solo = _gradients(workers, _plan(model, layout, [[task]], [[0]]), "solo")
        for rank, found in enumerate(batched):
            assert found[task].keys() == solo[rank][task].keys()
            assert found[task]
            for name, expected in solo[rank][task].items():
                assert np.linalg.norm(expected) > 0
                assert np.linalg.norm(found[task][name] - expected) <= 1e-5 * np.linalg.norm(expected), (
                    rank,
                    task,
                    name,
                )


def test_loss_curves_equal_solo_curves(group: tuple[WorkerGroup, Layout, ModelSpec]) -> None:
    workers, layout, model = group
    batched = _losses(workers, _plan(model, layout, [["a", "b"], ["c"]], [[0], [1]]), "batched", 5)
    for task in "abc":
        solo = _losses(workers, _plan(model, layout, [[task]], [[0]]), "solo", 5)[task]
        assert len(solo) == 5
        assert solo[4] < solo[0]
        assert batched[task] == pytest.approx(solo, abs=1e-4)


@pytest.fixture(scope="module")
def single_rank_losses() -> dict[str, tuple[float, ...]]:
    """Losses of all three tasks in one hTask on one rank."""
    model = model_preset("tiny-test")
    layout = even_layout(model)
    with WorkerGroup(layout) as workers:
        return _losses(workers, _plan(model, layout, [["a", "b", "c"]], [[0]]), "single", 3)


def test_losses_do_not_depend_on_the_layout(
    group: tuple[WorkerGroup, Layout, ModelSpec], single_rank_losses: dict[str, tuple[float, ...]]
) -> None:
    workers, layout, model = group
    here = _losses(workers, _plan(model, layout, [["a", "b", "c"]], [[0]]), "here", 3)
    for task, losses in single_rank_losses.items():
        assert here[task] == pytest.approx(losses, abs=1e-4)


def test_nan_of_one_task_leaves_the_others_bit_identical(group: tuple[WorkerGroup, Layout, ModelSpec]) -> None:
    workers, layout, model = group
    plan = _plan(model, layout, [["a", "b", "c"]], [[0]])
    states = {}
    for name, poisoned in (("clean", False), ("poisoned", True)):
        workers.load(name, bind(plan, seed=3))
        if poisoned:
            workers.ask(Poison(name=name, task="b"))
        for _ in range(3):
            workers.run(name)
        states[name] = workers.ask(Inspect(name=name, state=True))
    for clean, poisoned_rank in zip(states["clean"], states["poisoned"], strict=True):
        assert poisoned_rank.reports["b"].skipped == 3
        for task in "ac":
            assert poisoned_rank.reports[task].skipped == 0
            for name, tensor in clean.state[task].items():
                assert np.array_equal(tensor, poisoned_rank.state[task][name]), (task, name)


def _bound(layout: Layout, model: ModelSpec) -> Bound:
    return bind(_plan(model, layout, [["a", "b"], ["c"]], [[0], [1]]), seed=1)


def test_predicted_and_measured_timelines_are_of_one_program_in_one_order(
    group: tuple[WorkerGroup, Layout, ModelSpec],
) -> None:
    workers, layout, model = group
    bound = _bound(layout, model)
    workers.load("x", bound)
    measured = measured_timeline(bound, workers.run("x"))
    predicted = simulate(bound, Roofline()).timeline
    assert measured.program_digest == predicted.program_digest == bound.program.digest()
    for listing in bound.program.ranks:
        wanted = [(i, span_op(x), x.key) for i, x in enumerate(listing.instructions)]
        for timeline in (measured, predicted):
            spans = timeline.instruction_spans(listing.rank)
            assert [(s.index, s.op, s.key) for s in spans] == wanted
            assert all(a.end_ns <= b.start_ns for a, b in pairwise(spans))


def test_steps_move_every_task_and_nothing_else(group: tuple[WorkerGroup, Layout, ModelSpec]) -> None:
    workers, layout, model = group
    workers.load("x", _bound(layout, model))
    before = workers.ask(Inspect(name="x", state=True))
    workers.run("x")
    after = workers.ask(Inspect(name="x", state=True))
    for one, other in zip(before, after, strict=True):
        for task in "abc":
            moved = [not np.array_equal(t, other.state[task][n]) for n, t in one.state[task].items()]
            assert any(moved), task
