"""Isolation suite: a task's gradients and losses are its own under every layout, grouping, order and alignment (DESIGN §13)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from muxtune.executor.group import WorkerGroup
from muxtune.executor.messages import Gradients
from muxtune.executor.tasks import Array
from muxtune.policies.base import SystemState
from muxtune.policies.build import make_instance
from muxtune.spec.align import Alignment
from muxtune.spec.bind import bind
from muxtune.spec.check import check
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Plan
from muxtune.spec.task import Task, Workload

pytestmark = pytest.mark.dist

SP = {"sequence_parallel": True}
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
}
GROUPINGS = {
    "fused": ([["a", "b", "c"]], [[0]]),
    "interleaved": ([["a", "b"], ["c"]], [[0, 1]]),
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
        workload=workload, cluster=parse_cluster("4xcpu"), layout=even_layout(spec, **degrees), microbatches=microbatches
    )
    instance = make_instance(state, "i", groups, buckets, *ALIGNMENTS[alignment])
    plan = Plan(workload=workload, cluster=state.cluster, instances=(replace(instance, devices=devices, **changes),))
    assert check(plan) == ()
    return plan


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerGroup]:
    """Four ranks for all tests of this file."""
    with WorkerGroup(4) as group:
        yield group


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
def solo(workers: WorkerGroup) -> Found:
    """Each task alone on one rank, padded."""
    return {t: gradients(workers, make_plan(groups=[[t]]))[t] for t in "abc"}


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_task_alone_on_one_rank(
    workers: WorkerGroup, solo: Found, layout: str, grouping: str, alignment: str
) -> None:
    groups, buckets = GROUPINGS[grouping]
    assert_equal(gradients(workers, make_plan(layout, groups, buckets, alignment)), solo)
