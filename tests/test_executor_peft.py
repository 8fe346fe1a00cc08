"""Every PEFT method at once on real Megatron-core stages: mixed in one hTask, over layouts, with dropout, beside a NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from muxtune.executor.group import WorkerGroup
from muxtune.executor.messages import Gradients
from muxtune.executor.reports import Array
from muxtune.policies.base import SystemState
from muxtune.policies.build import make_instance
from muxtune.spec.bind import bind
from muxtune.spec.check import check
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.peft import peft_kinds
from muxtune.spec.peft.bottleneck import Bottleneck
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Plan
from muxtune.spec.task import Task, Workload
from tests.test_isolation import ALIGNMENTS, LAYOUTS, curves, interleaved, train

pytestmark = pytest.mark.dist

EVERYWHERE = ("qkv", "proj", "fc1", "fc2")
METHODS = {
    **{kind: found(targets=EVERYWHERE) for kind, found in peft_kinds().items()},  # type: ignore[call-arg]
    "lora-dropout": LoRA(rank=3, dropout=0.3, targets=("qkv", "fc2")),
    "bottleneck-late": Bottleneck(rank=4, targets=("fc2",)),
}
NAMES = tuple(METHODS)
Found = dict[str, dict[str, Array]]


def plan_of(model: str, layout: str, groups: Sequence[Sequence[str]], alignment: str = "pad") -> Plan:
    """Tasks of every method in the given hTasks of one bucket, interleaved; global batches and lengths differ."""
    names = [t for g in groups for t in g]
    degrees, devices = LAYOUTS[layout]
    spec = model_preset(model)
    tasks = tuple(
        Task(
            task_id=name,
            peft=peft,
            dataset="sst2",
            billed_len_tokens=(16, 24, 32)[i % 3],
            global_batch_samples=2 + i % 2,
            learning_rate=2e-3,
        )
        for i, (name, peft) in enumerate(METHODS.items())
        if name in names
    )
    workload = Workload(name="w", model=spec, datasets=(embedded_length("sst2"),), tasks=tasks)
    cluster = parse_cluster("4xcpu")
    state = SystemState(workload=workload, cluster=cluster, layout=even_layout(spec, **degrees), microbatches=2)
    instance = make_instance(state, "i", groups, [list(range(len(groups)))], *ALIGNMENTS[alignment])
    plan = Plan(workload=workload, cluster=cluster, instances=(interleaved(replace(instance, devices=devices)),))
    assert check(plan) == ()
    return plan


def gradients(workers: WorkerGroup, plan: Plan) -> list[Found]:
    """Gradients of one pass, by place in the instance."""
    workers.load("x", bind(plan, seed=3), random_adapters=True)
    ranks = workers.ask(Gradients(name="x"))
    return [ranks[device] for device in plan.instances[0].devices]


def joined(plan: Plan, ranks: Sequence[Found], task: str, name: str, shape: tuple[int, ...]) -> Array:
    """A parameter's gradient put together from the shards of the first replica; whole ones must agree."""
    layout = plan.instances[0].layout
    (first,) = (s for s in range(layout.pp) if name in ranks[s * layout.tp][task])
    shards: list[Array] = [ranks[r][task][name] for r in layout.stage_peers(first * layout.tp)]
    axes = [i for i, (a, b) in enumerate(zip(shards[0].shape, shape, strict=True)) if a != b]
    if not axes:
        assert all(np.array_equal(shards[0], s) for s in shards), (task, name)
        return shards[0]
    halves = 2 if plan.workload.model.gated and ".fc1." in name else 1
    parts = [np.split(s, halves, axes[0]) for s in shards]
    return np.concatenate([part[half] for half in range(halves) for part in parts], axes[0])


@pytest.fixture(scope="module")
def solo(rank_pool: Any) -> dict[str, Found]:
    """Each task alone on one rank, padded, on a gated model and on one with biases."""
    found: dict[str, Found] = {}
    for model in ("tiny-test", "tiny-gpt2"):
        plans = {t: plan_of(model, "1 rank", [[t]]) for t in NAMES}
        found[model] = {t: gradients(rank_pool.get(), plan)[0][t] for t, plan in plans.items()}
    return found


@pytest.mark.parametrize(
    ("model", "layout", "alignment", "fused"),
    [
        ("tiny-test", "1 rank", "chunks", True),
        ("tiny-test", "pp=2", "varlen", True),
        ("tiny-test", "tp=2", "pad", True),
        ("tiny-test", "tp=2 pp=2 sp", "chunks", False),
        ("tiny-test", "dp=2 tp=2", "varlen", False),
        ("tiny-gpt2", "1 rank", "varlen", True),
        ("tiny-gpt2", "tp=2 sp", "pad", True),
    ],
)
def test_mixed_gradients_are_those_of_each_task_alone_on_one_rank(
    workers: WorkerGroup, solo: dict[str, Found], model: str, layout: str, alignment: str, fused: bool
) -> None:
    plan = plan_of(model, layout, [NAMES] if fused else [NAMES[::2], NAMES[1::2]], alignment)
    ranks = gradients(workers, plan)
    for task in NAMES:
        assert solo[model][task]
        for name, expected in solo[model][task].items():
            found = joined(plan, ranks, task, name, expected.shape)
            size = np.linalg.norm(expected)
            assert size > 0, (task, name)
            assert np.linalg.norm(found - expected) <= 1e-5 * size, (task, name)


def test_losses_do_not_depend_on_the_layout(workers: WorkerGroup) -> None:
    """Initial values cut from the whole, sums inside adapters, dropout drawn anew in each step; every method learns."""
    for model in ("tiny-test", "tiny-gpt2"):
        alone = curves(train(workers, plan_of(model, "1 rank", [NAMES]), 4))
        spread = curves(train(workers, plan_of(model, "tp=2 pp=2 sp", [NAMES]), 4))
        for task, losses in alone.items():
            assert losses[3] < losses[0], task
            assert spread[task] == pytest.approx(losses, abs=1e-4), (model, task)


@pytest.mark.parametrize("sick", ["bottleneck", "ia3"])
def test_a_nan_of_one_method_leaves_the_others_bit_identical(workers: WorkerGroup, sick: str) -> None:
    plan = plan_of("tiny-test", "tp=2", [NAMES])
    clean, poisoned = (train(workers, plan, 1, poison) for poison in ("", sick))
    for device in plan.instances[0].devices:
        assert poisoned[device].reports[sick].skipped == 1
        for task in NAMES:
            for name, tensor in clean[device].state[task].items() if task != sick else ():
                assert np.array_equal(tensor, poisoned[device].state[task][name]), (task, name)
