"""Separate instances against one shared backbone in mode `paper`: [M_b + Σ M_g] / S + Σ M_a (MuxTune Eq. 5, Fig. 17)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from muxtune.experiments.recipes.base import Check, Recipe
from muxtune.policies.base import SystemState
from muxtune.policies.build import make_instance
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.memory_paper import paper_peak_bytes
from muxtune.spec.model import model_preset
from muxtune.spec.noun import noun
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Instance, Plan
from muxtune.spec.task import Task, Workload

#: An A40 shows 46,068 MiB: the paper's "48 GB" are decimal.
GPU_BYTES = 48 * 10**9
LENGTHS = {"sst2": 64, "openbookqa": 128, "rte": 256}
#: Table 2: data set and batch size of tasks 1 to 8; Fig. 17 adds them in this order, four times over.
WL_A = (
    *(("sst2", 4), ("openbookqa", 2), ("openbookqa", 4), ("sst2", 4)),
    *(("sst2", 8), ("sst2", 2), ("openbookqa", 4), ("openbookqa", 4)),
)
WL_B = (("rte", 4), ("sst2", 2), ("rte", 4), ("sst2", 4), ("sst2", 8), ("rte", 2), ("rte", 4), ("rte", 4))
TARGETS = ("qkv", "proj")
RANK = 16
#: Half width of the range around the paper's ratios (DESIGN §13).
TOLERANCE = 0.06


@noun
class Figure:
    """One part of Fig. 17: tp · pp GPUs, the count of separate tasks that still fit, the ratio at that count."""

    model: str
    tp: int
    pp: int
    tasks: tuple[tuple[str, int], ...]
    fit: int
    ratio: float


#: §5.1: its grid search puts 2 GPUs inside a stage and 4 between stages.
GPT = Figure(model="gpt3-2.7b", tp=2, pp=1, tasks=WL_A, fit=15, ratio=4.67)
LLAMA = Figure(model="llama2-7b", tp=1, pp=4, tasks=WL_B, fit=11, ratio=3.57)


class MemoryCapacity(Recipe):
    """Tasks of Table 2, each with its own backbone on the same GPUs, or all on one backbone."""

    SOURCE = "MuxTune §5.3, Fig. 17: OOM after 15 and 11 tasks, 4.67x and 3.57x less there, 5.29x at 32 tasks"
    KIND = "derived"
    ASSUMES = (
        "Eq. 5 with M_g one hidden vector a token and layer, all tasks in flight, one micro-batch each",
        f"LoRA on {' and '.join(TARGETS)}, rank {RANK} (not stated in the paper; its 4.3 GB of activations fit attention only)",
        "fp16, no dropout, fused attention; GPUs of 48 decimal GB; no adapters, optimizer states or workspace (Eq. 5)",
    )

    def checks(self) -> tuple[Check, ...]:
        """Capacities exactly, ratios within 6 %."""
        at_capacity = (c for f in (GPT, LLAMA) for c in (_capacity(f), _ratio(f, f.fit, f.ratio)))
        return (*at_capacity, _ratio(GPT, 32, 5.29))


def _capacity(figure: Figure) -> Check:
    """How many separate tasks fit; the next one does not."""
    fit = next(n for n in count(1) if needed_bytes(figure, n + 1)[0] > GPU_BYTES)
    gpus = figure.tp * figure.pp
    return Check(
        what=f"{figure.model} on {gpus} GPUs: separate tasks before OOM",
        expected=str(figure.fit),
        low=figure.fit,
        high=figure.fit,
        found=fit,
    )


def _ratio(figure: Figure, tasks: int, ratio: float) -> Check:
    alone, shared = needed_bytes(figure, tasks)
    return Check(
        what=f"{figure.model}, {tasks} tasks: separate / shared bytes",
        expected=f"{ratio} within 6 %",
        low=ratio * (1 - TOLERANCE),
        high=ratio * (1 + TOLERANCE),
        found=alone / shared,
    )


def needed_bytes(figure: Figure, tasks: int) -> tuple[int, int]:
    """Bytes that each GPU needs for the first tasks with (a backbone each, one backbone for all)."""
    ids = [f"t{i}" for i in range(tasks)]
    chosen = [figure.tasks[i % len(figure.tasks)] for i in range(tasks)]
    rows = tuple(_task(task_id, *of) for task_id, of in zip(ids, chosen, strict=True))
    model = model_preset(figure.model)
    tables = tuple(embedded_length(name) for name in LENGTHS)
    state = SystemState(
        workload=Workload(name="Table 2", model=model, datasets=tables, tasks=rows),
        cluster=parse_cluster(f"{figure.tp * figure.pp}xA40"),
        layout=even_layout(model, tp=figure.tp, pp=figure.pp),
        microbatches=1,
    )
    alone = [make_instance(state, i, [[i]], [[0]]) for i in ids]
    shared = [make_instance(state, "shared", [[i] for i in ids], [[h] for h in range(tasks)])]
    return _per_gpu(state, alone), _per_gpu(state, shared)


def _task(task_id: str, dataset: str, samples: int) -> Task:
    return Task(
        task_id=task_id,
        peft=LoRA(rank=RANK, targets=TARGETS),
        dataset=dataset,
        billed_len_tokens=LENGTHS[dataset],
        global_batch_samples=samples,
    )


def _per_gpu(state: SystemState, instances: Sequence[Instance]) -> int:
    plan = Plan(workload=state.workload, cluster=state.cluster, instances=tuple(instances))
    return max(paper_peak_bytes(plan))
