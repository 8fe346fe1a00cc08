"""Laws of the executor on real Megatron-core stages: order, Program identity, what a step moves (DESIGN §13)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from muxtune.executor.group import WorkerGroup, measured_timeline
from muxtune.executor.messages import Inspect
from muxtune.policies.base import SystemState
from muxtune.policies.build import make_instance
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import simulate
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

LAYOUTS = {"1 rank": {}, "pp=2": {"pp": 2}, "tp=2": {"tp": 2}, "tp=2 pp=2": {"tp": 2, "pp": 2}}


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


@pytest.fixture(params=LAYOUTS)
def group(request: pytest.FixtureRequest, workers: WorkerGroup) -> tuple[WorkerGroup, Layout, ModelSpec]:
    """A layout on the first ranks of the group, and the model."""
    model = model_preset("tiny-test")
    return workers, even_layout(model, **LAYOUTS[request.param]), model


def _bound(layout: Layout, model: ModelSpec) -> Bound:
    workload = Workload(name="w", model=model, datasets=(embedded_length("sst2"),), tasks=_tasks())
    cluster = parse_cluster("4xcpu")
    state = SystemState(workload=workload, cluster=cluster, layout=layout, microbatches=2)
    instance = make_instance(state, "i", [["a", "b"], ["c"]], [[0], [1]])
    return bind(Plan(workload=workload, cluster=cluster, instances=(instance,)), seed=1)


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
    for one, other in zip(before[: layout.ranks], after[: layout.ranks], strict=True):
        for task in "abc":
            moved = [not np.array_equal(t, other.state[task][n]) for n, t in one.state[task].items()]
            assert any(moved), task
