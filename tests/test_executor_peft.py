"""Every PEFT method at once on real Megatron-core stages: mixed in one hTask, over ranks, with dropout, beside a NaN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from muxtune.executor.group import WorkerGroup
from muxtune.executor.messages import Gradients, Inspect, Poison
from muxtune.policies.base import SystemState
from muxtune.policies.build import make_instance
from muxtune.spec.align import Alignment
from muxtune.spec.bind import bind
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import ModelSpec, model_preset
from muxtune.spec.peft import peft_kinds
from muxtune.spec.peft.bottleneck import Bottleneck
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Plan
from muxtune.spec.task import Task, Workload

pytestmark = pytest.mark.dist

LAYOUTS: dict[str, dict[str, int]] = {"1 rank": {}, "pp=2": {"pp": 2}, "tp=2": {"tp": 2}}
EVERYWHERE = ("qkv", "proj", "fc1", "fc2")
METHODS = {
    **{kind: found(targets=EVERYWHERE) for kind, found in peft_kinds().items()},
    "lora-dropout": LoRA(rank=3, dropout=0.3, targets=("qkv", "fc2")),
    "bottleneck-late": Bottleneck(rank=4, targets=("fc2",)),
}


def plan_of(model: ModelSpec, layout: Layout, groups: Sequence[Sequence[str]], alignment: Alignment = "pad") -> Plan:
    """Every method's task in the given hTasks; global batches and lengths differ."""
    names = [t for g in groups for t in g]
    tasks = tuple(
        Task(
            task_id=name,
            peft=peft,
            dataset="sst2",
            billed_len_tokens=(16, 24, 32)[i % 3],
            global_batch_samples=1 + i % 2,
            learning_rate=1e-2,
        )
        for i, (name, peft) in enumerate(METHODS.items())
        if name in names
    )
    workload = Workload(name="w", model=model, datasets=(embedded_length("sst2"),), tasks=tasks)
    cluster = parse_cluster("2xcpu")
    state = SystemState(workload=workload, cluster=cluster, layout=layout, microbatches=2)
    buckets = [list(range(len(groups)))]
    return Plan(workload=workload, cluster=cluster, instances=(make_instance(state, "i", groups, buckets, alignment),))


@pytest.fixture(scope="module", params=LAYOUTS)
def group(request: pytest.FixtureRequest) -> Iterator[tuple[WorkerGroup, dict[str, int]]]:
    with WorkerGroup(even_layout(model_preset("tiny-test"), **LAYOUTS[request.param])) as workers:
        yield workers, LAYOUTS[request.param]


def shares_summed(ranks: list[Any]) -> list[Any]:
    """Gradients by rank; those of a bottleneck behind a row-parallel BaseOp, whose ranks share its tokens, as their sum."""
    for task in ("bottleneck", "bottleneck-late"):
        for name in ranks[0].get(task, {}):
            if name.split(".")[1] in ("proj", "fc2") and all(name in r[task] for r in ranks):
                whole = sum(r[task][name] for r in ranks)
                for rank in ranks:
                    rank[task][name] = whole
    return ranks


@pytest.mark.parametrize("preset", ["tiny-test", "tiny-gpt2"])
def test_batched_gradients_equal_solo_gradients(group: tuple[WorkerGroup, dict[str, int]], preset: str) -> None:
    """Gated and plain MLP, grouped and plain attention, without and with biases; one hTask and two of other neighbours."""
    workers, degrees = group
    model = model_preset(preset)
    layout = even_layout(model, **degrees)

    def gradients(groups: Sequence[Sequence[str]], alignment: Alignment = "pad") -> Any:
        workers.load("x", bind(plan_of(model, layout, groups, alignment), seed=3), random_adapters=True)
        return workers.ask(Gradients(name="x"))

    names = list(METHODS)
    together = [shares_summed(gradients([names])), shares_summed(gradients([names[::2], names[1::2]], "varlen"))]
    for task in names:
        solo = shares_summed(gradients([[task]]))
        for batched in together:
            for rank, found in enumerate(batched):
                assert found[task].keys() == solo[rank][task].keys()
                assert found[task]
                for name, expected in solo[rank][task].items():
                    size = np.linalg.norm(expected)
                    assert size > 0, (rank, task, name)
                    assert np.linalg.norm(found[task][name] - expected) <= 1e-5 * size, (rank, task, name)


def losses_of(workers: WorkerGroup, model: ModelSpec, layout: Layout) -> dict[str, tuple[float, ...]]:
    workers.load("x", bind(plan_of(model, layout, [list(METHODS)]), seed=3))
    for _ in range(4):
        workers.run("x")
    reports: dict[str, Any] = workers.ask(Inspect(name="x"))[-1].reports
    return {task: r.losses for task, r in reports.items()}


@pytest.fixture(scope="module")
def single_rank_losses() -> dict[str, dict[str, tuple[float, ...]]]:
    found = {}
    with WorkerGroup(even_layout(model_preset("tiny-test"))) as workers:
        for preset in ("tiny-test", "tiny-gpt2"):
            model = model_preset(preset)
            found[preset] = losses_of(workers, model, even_layout(model))
    return found


def test_losses_do_not_depend_on_the_layout(
    group: tuple[WorkerGroup, dict[str, int]], single_rank_losses: dict[str, dict[str, tuple[float, ...]]]
) -> None:
    """Sharded and whole sides, sums inside adapters, cut initial values and dropout over tp; every method learns."""
    workers, degrees = group
    for preset, expected in single_rank_losses.items():
        model = model_preset(preset)
        here = losses_of(workers, model, even_layout(model, **degrees))
        for task, losses in expected.items():
            assert losses[3] < losses[0], task
            assert here[task] == pytest.approx(losses, abs=1e-4), (preset, task)


def test_a_nan_of_one_method_leaves_the_others_bit_identical(group: tuple[WorkerGroup, dict[str, int]]) -> None:
    workers, degrees = group
    model = model_preset("tiny-test")
    plan = plan_of(model, even_layout(model, **degrees), [list(METHODS)])
    for sick in ("bottleneck", "ia3"):
        states = []
        for poisoned in (False, True):
            workers.load("x", bind(plan, seed=3))
            if poisoned:
                workers.ask(Poison(name="x", task=sick))
            workers.run("x")
            states.append(workers.ask(Inspect(name="x", state=True)))
        for clean, after in zip(*states, strict=True):
            assert after.reports[sick].skipped == 1
            for task in METHODS:
                for name, tensor in clean.state[task].items() if task != sick else ():
                    assert np.array_equal(tensor, after.state[task][name]), (sick, task, name)
