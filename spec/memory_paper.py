"""Memory in mode `paper`: M_stage = [M_b + Σ_i M_g^(i)] / S + Σ_i M_a^(i)(b_i, l_i), all tasks in flight at once (MuxTune Eq. 5).

How each symbol is read, where the paper leaves it open:
- M_b: the backbone's weights over all stages. Adapters, optimizer states, workspace and rounding are not in Eq. 5.
- M_g of a task: the gradients of the inputs of all layers, one hidden vector a token and layer of one micro-batch. (That is
  why it is divided by S as the layers are. The paper remarks that in practice it re-uses M_a's memory.)
- M_a of a task: activations of one micro-batch over all stages (`held_tensors`), b_i samples padded to the task's own l_i. A
  stage holds 1/S of it for each micro-batch in flight, of which there are at most S and at most C: M_a · min(S, C) / S.
- Tensor parallelism, which Eq. 5 does not have: every symbol is what one tp rank holds, so replicated tensors count fully.
- S equal stages, as in Eq. 5: embedding and head are spread over all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from muxtune.spec.align import Batch, Row
from muxtune.spec.catalogue import StageContext
from muxtune.spec.memory import stage_context
from muxtune.spec.noun import noun
from muxtune.spec.plan import Instance, Plan
from muxtune.spec.task import Task
from muxtune.spec.tensors import backbone_bytes, held_bytes


@noun
class TaskLoad:
    """What Eq. 5 knows of a task: b_i samples of l_i tokens a micro-batch, C micro-batches."""

    task: str
    samples: int
    length_tokens: int
    microbatches: int


def paper_stage_bytes(contexts: Sequence[StageContext], loads: Iterable[TaskLoad]) -> int:
    """Eq. 5 for one backbone and its tasks: bytes of one rank of the worst stage. `contexts` has one entry a stage."""
    stages, model = len(contexts), contexts[0].model
    shared = sum(map(backbone_bytes, contexts))
    own = 0
    for load in loads:
        batch = _batch(load)
        shared += model.layers * batch.tokens * model.hidden * model.element_bytes
        own += min(stages, load.microbatches) * sum(held_bytes(c, batch, fused=True) for c in contexts)
    return -(-(shared + own) // stages)


def paper_peak_bytes(plan: Plan) -> tuple[int, ...]:
    """Eq. 5 for every rank that a plan uses, in rank order; instances that share a device add up, each with its backbone."""
    found: dict[int, int] = {}
    for index, instance in enumerate(plan.instances):
        contexts = [stage_context(plan, index, stage) for stage in range(instance.layout.pp)]
        needed = paper_stage_bytes(contexts, [_load(plan.workload.task(t), instance) for t in instance.tasks])
        for device in instance.devices:
            found[device] = found.get(device, 0) + needed
    return tuple(found[device] for device in sorted(found))


def _load(task: Task, instance: Instance) -> TaskLoad:
    """A task's largest micro-batch, and how many it has, in the units of its instance (dealt to the replicas)."""
    units = (u for b in instance.buckets for u in b.units)
    samples = [sum(len(p.slots) for p in u.parts if p.task == task.task_id) for u in units]
    return TaskLoad(
        task=task.task_id,
        samples=max(samples, default=0),
        length_tokens=task.billed_len_tokens,
        microbatches=-(-sum(n > 0 for n in samples) // instance.layout.dp),
    )


def _batch(load: TaskLoad) -> Batch:
    """One micro-batch of a task alone."""
    length = load.length_tokens
    row = Row(task=load.task, slot=0, sample=0, prompt_tokens=length - 1, response_tokens=1, length_tokens=length)
    return Batch(htask=0, rows=tuple(replace(row, slot=slot) for slot in range(load.samples)))
