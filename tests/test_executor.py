"""Laws of the executor on real Megatron-core stages: order, Program identity, what a step moves (DESIGN §13)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muxtune.executor.failures import exit_text, log_tail
from muxtune.executor.group import WorkerGroup, measured_timeline
from muxtune.executor.messages import Call, Inspect
from muxtune.policies.base import SystemState
from muxtune.policies.build import make_instance
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import simulate
from muxtune.spec.bind import bind
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.errors import ExecutionError
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


def _gpt2() -> ModelSpec:
    """Learned positions, layer norms, biases everywhere, a tied output layer, as many key heads as heads."""
    changes: dict[str, Any] = {"norm": "layernorm", "activation": "gelu", "positions": "learned", "biases": "all"}
    return replace(model_preset("tiny-test"), name="like-gpt2", tied_embeddings=True, kv_heads=4, **changes)


def _gpt2_losses(workers: WorkerGroup, layout: Layout) -> dict[str, tuple[float, ...]]:
    """Losses of three steps on a backbone whose biases and norms are random (they start as zeros and ones)."""
    workers.load("gpt2", _bound(layout, _gpt2()))
    counts = workers.ask(Call(function="in_worker:give_biases", arguments=("gpt2",)))
    assert all(count > 4 for count in counts[: layout.ranks])
    for _ in range(3):
        workers.run("gpt2")
    reports = [i.reports for i in workers.ask(Inspect(name="gpt2"))[: layout.ranks]]
    return {task: reports[-1][task].losses for task in "abc"}


def test_a_gpt2_like_backbone_has_the_same_losses_under_every_layout(
    group: tuple[WorkerGroup, Layout, ModelSpec],
) -> None:
    workers, layout, _ = group
    single = _gpt2_losses(workers, even_layout(_gpt2()))
    here = _gpt2_losses(workers, layout)
    for task, losses in single.items():
        assert losses[2] < losses[0]
        assert here[task] == pytest.approx(losses, abs=1e-4)


def test_a_dead_worker_is_named_with_how_it_ended() -> None:
    here = {"PYTHONPATH": str(Path(__file__).parent)}
    with WorkerGroup(1, environment=here) as workers:
        with pytest.raises(ExecutionError, match=r"^rank 0 died: exit code 7: terminate: out of luck \(log: ") as found:
            workers.ask(Call(function="in_worker:fall"))
        log = Path(str(found.value).rpartition("log: ")[2].rstrip(")"))
        assert "UserWarning" in log.read_text()
        log.unlink()
        assert all(p.poll() is not None for p in workers.processes)
        with pytest.raises(ExecutionError, match=r"^rank 0 died"):
            workers.ask(Inspect(name="x"))


def test_how_a_process_ended_is_said_in_words() -> None:
    codes = (None, 3, -9, -99)
    ends = ("its connection broke, the process still runs", "exit code 3", "killed by SIGKILL", "killed by signal 99")
    assert tuple(map(exit_text, codes)) == ends
    log = (
        "a.py:1: UserWarning: x\n  warnings.warn(x)\nTraceback (most recent call last):\n  File x\nValueError: bad\n\n"
    )
    assert log_tail(log) == "ValueError: bad"
    assert log_tail("") == "its log says nothing"
