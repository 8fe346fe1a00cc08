"""Building blocks that policies share: instances from groups of tasks, an hTask's planning batch, feasible plans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from muxtune.policies.base import Policy, SystemState
from muxtune.spec.align import ALIGNMENTS, Alignment, Batch, Row, chunk_rule, spread_slots
from muxtune.spec.catalogue import StageContext
from muxtune.spec.check import check
from muxtune.spec.draw import Sample, align_chunks
from muxtune.spec.errors import InfeasibleError
from muxtune.spec.layout import Layout
from muxtune.spec.noun import plain
from muxtune.spec.plan import Bucket, HTask, Instance, MadeBy, Part, Plan, SolverRecord, Unit, unit_chunks
from muxtune.spec.task import Task, Workload


def make_bucket(workload: Workload, htasks: Sequence[HTask], indices: Sequence[int], microbatches: int) -> Bucket:
    """A bucket of hTasks (indices into `htasks`) whose tasks' samples are spread evenly over C micro-batches."""
    parts: list[list[Part]] = [[] for _ in range(microbatches)]
    for index in indices:
        for task_id in htasks[index].tasks:
            spread = spread_slots(workload.task(task_id).global_batch_samples, microbatches)
            for c, slots in enumerate(spread):
                if slots:
                    parts[c].append(Part(htask=index, task=task_id, slots=slots))
    units = tuple(Unit(parts=tuple(p), chunks=unit_chunks(workload, htasks, p)) for p in parts if p)
    return Bucket(htasks=tuple(indices), units=units)


def make_htask(workload: Workload, tasks: Sequence[str], alignment: Alignment, chunk_tokens: int = 0) -> HTask:
    """An hTask of these tasks; a chunk size of 0 is chosen by the paper's rule (`chunk_rule`) where one is needed."""
    if alignment != "chunk":
        return HTask(tasks=tuple(tasks), alignment=alignment)
    chosen = chunk_tokens or chunk_rule(workload.task(t).billed_len_tokens for t in tasks)
    return HTask(tasks=tuple(tasks), alignment=alignment, chunk_tokens=chosen)


def require_alignment(alignment: Alignment, chunk: int) -> None:
    """Check the two options of a policy that decide the alignment; `chunk` 0 means the paper's rule.

    Raises:
        ValueError: an unknown alignment, a negative chunk, or a chunk size without alignment `chunk`.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment={alignment!r}: known are {list(ALIGNMENTS)}")
    if chunk < 0 or (chunk and alignment != "chunk"):
        raise ValueError(
            f"chunk={chunk} with alignment={alignment!r}: give a size above 0, and alignment=chunk with it"
        )


def make_instance(
    state: SystemState,
    name: str,
    groups: Sequence[Sequence[str]],
    buckets: Sequence[Sequence[int]],
    alignment: Alignment = "pad",
    chunk_tokens: int = 0,
) -> Instance:
    """An instance on the first devices of the cluster, in order `1f1b`.

    `groups` are the hTasks' task ids, `buckets` hold indices of hTasks. `chunk_tokens` 0: the paper's rule, hTask by hTask.
    """
    htasks = tuple(make_htask(state.workload, g, alignment, chunk_tokens) for g in groups)
    made = tuple(make_bucket(state.workload, htasks, indices, state.microbatches) for indices in buckets)
    return Instance(
        name=name,
        devices=tuple(range(state.layout.ranks)),
        layout=state.layout,
        htasks=htasks,
        buckets=made,
        microbatches=state.microbatches,
    )


def make_plan(
    policy: Policy, key: str, state: SystemState, instances: Sequence[Instance], solver: SolverRecord | None = None
) -> Plan:
    """Wrap instances into a Plan that says who made it."""
    config = ",".join(f"{k}={_option(v)}" for k, v in plain(policy.config).items())
    made_by = MadeBy(policy=key, config=config, cost_model=policy.cost.model_id, solver=solver)
    return Plan(workload=state.workload, cluster=state.cluster, instances=tuple(instances), made_by=made_by)


def _option(value: object) -> str:
    """A config value as `NAME:key=value` spells it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def require_feasible(plan: Plan) -> Plan:
    """The plan itself if it can be executed.

    Raises:
        InfeasibleError: `check` found a problem; where memory is short it names rank, bytes needed and bytes there.
    """
    problems = check(plan)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InfeasibleError(f"policy {plan.made_by.policy}: {problems[0]}{more}")
    return plan


def microbatch_samples(task: Task, microbatches: int, index: int = 0) -> int:
    """Samples of a task in micro-batch `index`; micro-batch 0 has the most."""
    base, extra = divmod(task.global_batch_samples, microbatches)
    return base + (index < extra)


def planning_batch(workload: Workload, tasks: Sequence[str], microbatches: int, alignment: Alignment) -> Batch:
    """The largest micro-batch of an hTask, as planned with: billed lengths (`pad`) or mean lengths (`varlen`)."""
    members = [workload.task(t) for t in tasks]
    longest = max(t.billed_len_tokens for t in members)
    rows: list[Row] = []
    for task in members:
        length = longest if alignment == "pad" else mean_length(workload, task.task_id)
        rows += [planning_row(task.task_id, slot, length) for slot in range(microbatch_samples(task, microbatches))]
    return Batch(htask=0, rows=tuple(rows))


def planning_row(task_id: str, slot: int, length_tokens: int) -> Row:
    """A row of a length that no sample was drawn for."""
    return Row(
        task=task_id,
        slot=slot,
        sample=0,
        prompt_tokens=length_tokens - 1,
        response_tokens=1,
        length_tokens=length_tokens,
    )


def planning_chunks(
    workload: Workload, tasks: Sequence[str], samples: Sequence[int], chunk_tokens: int
) -> tuple[tuple[Row, ...], ...]:
    """The rows of each chunk of a micro-batch that has so many samples of each task: billed lengths, hence any draw."""
    members = [workload.task(t) for t in tasks]
    longest = max(t.billed_len_tokens for t in members)
    rows: list[tuple[Row, ...]] = []
    for task, count in zip(members, samples, strict=True):
        sample = Sample(sample=0, prompt_tokens=task.billed_len_tokens - 1, response_tokens=1)
        chunks = align_chunks(task, range(count), [sample] * count, chunk_tokens, longest)
        rows += [()] * (len(chunks) - len(rows))
        rows[: len(chunks)] = [mine + more for mine, more in zip(rows, chunks, strict=False)]
    return tuple(rows)


def mean_length(workload: Workload, task_id: str) -> int:
    """Mean tokens of a task's samples after truncation to its billed length, at least 1."""
    task = workload.task(task_id)
    lengths = workload.lengths(task)
    prompt, response = lengths.lengths(lengths.probed())
    return max(1, round(float(np.minimum(prompt + response, task.billed_len_tokens).mean())))


def stage_contexts(workload: Workload, layout: Layout) -> tuple[StageContext, ...]:
    """The operator context of every stage, with every task's adapter known."""
    adapters = tuple((t.task_id, t.peft) for t in workload.tasks)
    return tuple(
        StageContext(model=workload.model, layout=layout, stage=s, adapters=adapters) for s in range(layout.pp)
    )
