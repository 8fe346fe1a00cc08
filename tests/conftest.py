"""Fixtures that any test may use: tiny workloads, states of planning, cost models that are simple formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from muxtune.policies.base import SystemState
from muxtune.policies.build import make_instance
from muxtune.sim.cost.base import Cost
from muxtune.spec.align import Alignment
from muxtune.spec.bind import bind
from muxtune.spec.cluster import Cluster, DeviceSpec, Link, parse_cluster
from muxtune.spec.estimate import Estimate, formula_estimate
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.ops import Op
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Plan
from muxtune.spec.task import Task, Workload

settings.register_profile("muxtune", deadline=None, derandomize=True)
settings.load_profile("muxtune")


@dataclass(frozen=True)
class FakeCost:
    """p50 = fixed_ns + flops // flops_per_ns for every operator (constant by default); links cost `fixed_ns`."""

    fixed_ns: int = 1000
    flops_per_ns: int | None = None
    launch_host_ns: int = 0
    model_id: str = "fake"
    calibrated: bool = False

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        if op.dtype == "host":
            return Cost(p50_ns=0, host_ns=self.launch_host_ns)
        return Cost(p50_ns=self.fixed_ns + (op.flops // self.flops_per_ns if self.flops_per_ns else 0))

    def link_latency(self, op: Op, link: Link) -> Cost:
        return Cost(p50_ns=self.fixed_ns)


def make_workload(
    tasks: int = 4,
    *,
    model: str = "tiny-llama",
    datasets: Sequence[str] = ("sst2", "openbookqa", "rte"),
    samples: Sequence[int] = (2, 3, 4),
    ranks: Sequence[int] = (4, 8, 12),
    targets: Sequence[tuple[str, ...]] = (("qkv", "proj", "fc1", "fc2"),),
) -> Workload:
    """Tasks t0, t1, …; data sets, samples per global batch, ranks and targets repeat in turn."""
    tables = {name: embedded_length(name) for name in datasets}
    made = []
    for i in range(tasks):
        table = tables[datasets[i % len(datasets)]]
        made.append(
            Task(
                task_id=f"t{i}",
                peft=LoRA(rank=ranks[i % len(ranks)], targets=targets[i % len(targets)]),
                dataset=table.name,
                billed_len_tokens=table.covered_length(),
                global_batch_samples=samples[i % len(samples)],
            )
        )
    used = {t.dataset for t in made}
    kept = tuple(table for name, table in tables.items() if name in used)
    return Workload(name="tiny", model=model_preset(model), datasets=kept, tasks=tuple(made))


def make_state(
    workload: Workload | None = None,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    sequence_parallel: bool = False,
    microbatches: int = 2,
    cluster: str = "4xcpu",
    memory_bytes: int | None = None,
    seed: int = 0,
) -> SystemState:
    """A state of planning for a workload (4 tiny tasks by default); `memory_bytes` replaces the device's."""
    work = workload or make_workload()
    place = parse_cluster(cluster)
    if memory_bytes is not None:
        place = with_memory(place, memory_bytes)
    return SystemState(
        workload=work,
        cluster=place,
        layout=even_layout(work.model, tp=tp, pp=pp, dp=dp, sequence_parallel=sequence_parallel),
        microbatches=microbatches,
        seed=seed,
        evaluate=count_tokens_processed,
    )


def with_memory(cluster: Cluster, memory_bytes: int) -> Cluster:
    """The cluster with another size of device memory."""
    return replace(cluster, device=replace(cluster.device, memory_bytes=memory_bytes))


def count_tokens_processed(plan: Plan) -> Estimate:
    """A stand-in for the simulator: one nanosecond a processed token."""
    tokens = sum(w.tokens for w in bind(plan, seed=0).program.units)
    return formula_estimate("tokens", tokens, tokens)


def make_hand_plan(
    state: SystemState,
    groups: Sequence[Sequence[str]],
    buckets: Sequence[Sequence[int]] | None = None,
    alignment: Alignment = "pad",
    **changes: Any,
) -> Plan:
    """A plan of one instance: hTasks `groups`, one bucket each unless `buckets` says otherwise; `changes` to the instance."""
    packed = [[h] for h in range(len(groups))] if buckets is None else buckets
    instance = make_instance(state, "shared", groups, packed, alignment)
    return Plan(workload=state.workload, cluster=state.cluster, instances=(replace(instance, **changes),))


@pytest.fixture(scope="session")
def hand_plan() -> Callable[..., Plan]:
    """Factory of plans by hand: `hand_plan(state, groups, buckets, alignment, order=…, feed=…, orders=…)`."""
    return make_hand_plan


@pytest.fixture(scope="session")
def tiny_workload() -> Callable[..., Workload]:
    """Factory of workloads: `tiny_workload(tasks, model=…, datasets=…, samples=…, ranks=…, targets=…)`."""
    return make_workload


@pytest.fixture(scope="session")
def tiny_state() -> Callable[..., SystemState]:
    """Factory of states: `tiny_state(workload, tp=…, pp=…, dp=…, sequence_parallel=…, microbatches=…, cluster=…, …)`."""
    return make_state


@pytest.fixture(scope="session")
def fake_cost() -> Callable[..., Any]:
    """Factory of cost models by formula: `fake_cost(fixed_ns=…, flops_per_ns=…, launch_host_ns=…)`."""
    return FakeCost


class RankPool:
    """Four worker processes that every test may use; a failure closes them, and the next test starts new ones."""

    def __init__(self) -> None:
        self.group: Any = None

    def get(self) -> Any:
        """The running group."""
        from muxtune.executor.group import WorkerGroup  # noqa: PLC0415 # tests of the lower floors run without torch

        if self.group is None or self.group.log.closed:
            # Workers find tests/in_worker.py.
            self.group = WorkerGroup(4, environment={"PYTHONPATH": str(Path(__file__).parent)})
        return self.group

    def close(self) -> None:
        """End the processes."""
        if self.group is not None and not self.group.log.closed:
            self.group.close()


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """One pool for the whole run."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def workers(rank_pool: RankPool) -> Any:
    """A WorkerGroup of four ranks; instances use any of them."""
    return rank_pool.get()
