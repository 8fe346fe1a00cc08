"""Tokens a micro-batch of Table 2 computes: each task padded to its own length, in chunks, and zero-padded to the longest."""

from __future__ import annotations

from collections.abc import Iterator

from muxtune.experiments.recipes.base import Check, Recipe
from muxtune.experiments.recipes.memory_capacity import LENGTHS, WL_A, WL_B
from muxtune.policies.base import SystemState
from muxtune.policies.build import make_instance
from muxtune.spec.align import Alignment, count_tokens
from muxtune.spec.bind import bind
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Plan
from muxtune.spec.task import Task, Workload

#: Workload, chunk size of Fig. 20, and for the first 4, 5, 6, 8 tasks (effective, chunked, zero-padded) tokens.
EXPECTED = {
    "WL-A": (WL_A, 64, {4: (1280, 1280, 1792), 5: (1792, 1792, 2816), 6: (1920, 1920, 3072), 8: (2944, 2944, 4096)}),
    "WL-B": (WL_B, 128, {4: (2432, 2816, 3584), 5: (2944, 3840, 5632), 6: (3456, 4352, 6144), 8: (5504, 6400, 8192)}),
}


class TokenCounts(Recipe):
    """All tasks in one hTask with one micro-batch, as Fig. 20 adds them."""

    SOURCE = "MuxTune Table 2 with Fig. 20's chunks of 64 and 128; the counts follow from its lengths and batch sizes"
    KIND = "derived"
    ASSUMES = ("SST2, OpenBookQA and RTE billed at 64, 128 and 256 tokens (§5.1)",)

    def checks(self) -> tuple[Check, ...]:
        """Three counts for each number of tasks."""
        return tuple(self._checks())

    def _checks(self) -> Iterator[Check]:
        for name, (tasks, chunk, expected) in EXPECTED.items():
            for count, numbers in expected.items():
                state = _state(tasks[:count])
                kinds = zip(
                    ("effective", f"chunks of {chunk}", "zero-padded"), _counts(state, chunk), numbers, strict=True
                )
                for kind, found, number in kinds:
                    yield Check(
                        what=f"{name}, {count} tasks, {kind}: tokens",
                        expected=f"exactly {number:,}",
                        low=number,
                        high=number,
                        found=found,
                    )


def _state(tasks: tuple[tuple[str, int], ...]) -> SystemState:
    made = tuple(
        Task(
            task_id=f"#{i}",
            peft=LoRA(),
            dataset=dataset,
            billed_len_tokens=LENGTHS[dataset],
            global_batch_samples=samples,
        )
        for i, (dataset, samples) in enumerate(tasks, start=1)
    )
    model, tables = model_preset("tiny-llama"), tuple(embedded_length(d) for d in sorted({d for d, _ in tasks}))
    workload = Workload(name="Table 2", model=model, datasets=tables, tasks=made)
    return SystemState(workload=workload, cluster=parse_cluster("cpu"), layout=even_layout(model), microbatches=1)


def _counts(state: SystemState, chunk: int) -> tuple[int, int, int]:
    """(billed, processed in chunks, processed with zero padding) tokens of one micro-batch."""
    _, billed, padded = _tokens(state, "pad", 0)
    return billed, _tokens(state, "chunk", chunk)[2], padded


def _tokens(state: SystemState, alignment: Alignment, chunk: int) -> tuple[int, int, int]:
    ids = [t.task_id for t in state.workload.tasks]
    instance = make_instance(state, "one hTask", [ids], [[0]], alignment, chunk)
    plan = Plan(workload=state.workload, cluster=state.cluster, instances=(instance,))
    batches = (b for work in bind(plan, seed=0).program.units for b in work.batches)
    return count_tokens(batches, [(t.task_id, t.billed_len_tokens) for t in state.workload.tasks])
