"""Bench of the planners that prove: the DP with the exact charge, and `ilp` on LLaMA2-7B, S=4, C=8."""

from __future__ import annotations

import time
from collections.abc import Iterator

from muxtune.policies.base import SystemState
from muxtune.policies.columns import columns_of
from muxtune.policies.fusion import exact_partition
from muxtune.policies.ilp import solve, starting_partitions
from muxtune.policies.master import Limits
from muxtune.policies.solver import usual_backend
from muxtune.policies.surrogate import Surrogate
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.task import Task, Workload

DATASETS = ("sst2", "openbookqa", "rte")
CLUSTERS = ("4xA40", "4xH200")
#: (tasks, types, target).
CASES = (
    (32, 6, "proven in 2 s"),
    (32, 32, "gap at most 0.5 % in 10 s"),
    (256, 12, "gap at most 0.4 % in 5 s"),
)


def workload(tasks: int, types: int) -> Workload:
    """Tasks whose data set, batch and rank repeat after so many."""
    made = []
    for i in range(tasks):
        kind = i % types
        table = embedded_length(DATASETS[kind % 3])
        made.append(
            Task(
                task_id=f"t{i:03d}",
                peft=LoRA(rank=8 << kind // 3 % 3 if types <= 12 else 4 + 4 * (kind // 3)),
                dataset=table.name,
                billed_len_tokens=table.covered_length(),
                global_batch_samples=8 * (1 + kind % 4) if types <= 12 else 8 + 2 * kind,
            )
        )
    tables = tuple(embedded_length(d) for d in DATASETS)
    return Workload(name="bench", model=model_preset("llama2-7b"), datasets=tables, tasks=tuple(made))


def surrogate_of(tasks: int, types: int, cluster: str) -> Surrogate:
    """Four stages, eight micro-batches."""
    made = workload(tasks, types)
    state = SystemState(
        workload=made, cluster=parse_cluster(cluster), layout=even_layout(made.model, pp=4), microbatches=8
    )
    return Surrogate(Roofline(), state, "pad")


def contiguous() -> str:
    """The DP with the exact charge: pricing its groups, and the DP over priced groups."""
    surrogate = surrogate_of(64, 12, "4xH200")
    order = surrogate.sorted_tasks()
    times = []
    for _ in range(2):
        start_s = time.process_time()
        exact_partition(surrogate, order)
        times.append(time.process_time() - start_s)
    return (
        f"DP with exact charge, 64 tasks, S=4: {1e3 * times[1]:.0f} ms over priced groups (target 100 ms), "
        f"pricing {len(surrogate.microbatches)} groups {times[0] - times[1]:.2f} s"
    )


def partitioning() -> Iterator[str]:
    """`ilp` without the arrangement of its hTasks: CPU seconds with pricing, greedy and DP, and what was proven."""
    usual_backend()
    for tasks, types, target in CASES:
        for cluster in CLUSTERS:
            start_s = time.process_time()
            surrogate = surrogate_of(tasks, types, cluster)
            columns = columns_of(surrogate)
            starts = starting_partitions(columns)
            master, bound_ns = solve(columns, surrogate, starts, usual_backend(), Limits())
            seconds = time.process_time() - start_s
            assert bound_ns is not None
            proven = "proven" if bound_ns == master.value_ns else f"gap {1 - bound_ns / master.value_ns:.2%}"
            yield (
                f"ilp, {tasks} tasks of {types} types, {cluster}: {proven} in {seconds:.1f} s CPU (target: {target}); "
                f"{master.nodes} nodes, {len(columns.found)} columns"
            )


def lines() -> Iterator[str]:
    """Every figure."""
    yield contiguous()
    yield from partitioning()
