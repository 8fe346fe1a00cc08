"""Useful flops of PEFT: forward, input gradients and adapters of each sample; no backbone weight gradients, nothing twice.

A sample of n tokens takes a·n + b·n² flops: a from linears and adapters, b from causal attention, whose backward counts twice
its forward (the 2.5× that a flash kernel runs holds a recomputation). MFU = useful flops / (devices · peak · time).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Literal

from muxtune.spec.align import Batch, Row
from muxtune.spec.catalogue import StageContext, stage_ops
from muxtune.spec.layout import even_layout
from muxtune.spec.model import ModelSpec
from muxtune.spec.noun import noun
from muxtune.spec.peft import PeftSpec
from muxtune.spec.task import Workload

#: A backward of attention has four GEMMs besides the recomputed scores, its forward two.
ATTENTION_BACKWARD = 2


@noun
class SampleFlops:
    """Useful flops of one sample of n tokens: `per_token` · n + `per_square` · n²."""

    per_token: int
    per_square: int

    def of(self, tokens: int) -> int:
        """Forward and backward of a sample of `tokens` tokens."""
        return self.per_token * tokens + self.per_square * tokens * tokens


@cache
def sample_flops(model: ModelSpec, peft: PeftSpec) -> SampleFlops:
    """Flops of a task's sample on the whole backbone, as if it ran alone: GEMMs of linears, attention and adapters.

    Pointwise operators, and what no gradient flows through (below the first adapter), are left out. Diff-Pruning's product is
    counted dense, as it is computed.
    """
    task = "sample"
    context = StageContext(model=model, layout=even_layout(model), stage=0, adapters=((task, peft),))
    row = Row(task=task, slot=0, sample=0, prompt_tokens=0, response_tokens=1, length_tokens=1)
    counted = {"linear", peft.kind}
    per_token = per_square = 0
    for _, forward, backward in stage_ops(context, Batch(htask=0, rows=(row,))):
        per_token += sum(op.flops for op in (*forward, *backward) if op.family in counted)
        attention = sum(op.flops for op in forward if op.family == "attention")
        turned = any(op.family == "attention" for op in backward)
        per_square += attention * (1 + ATTENTION_BACKWARD * turned)
    return SampleFlops(per_token=per_token, per_square=per_square)


def useful_flops(workload: Workload, batches: Iterable[Batch], tokens: Literal["raw", "billed"]) -> int:
    """Useful flops of all rows: at their own length (`raw`), or at the padded length l that the tenant pays for (`billed`).

    They depend on the samples alone, not on the plan, so that MFU compares plans.
    """
    tasks = {t.task_id: (sample_flops(workload.model, t.peft), t.billed_len_tokens) for t in workload.tasks}
    total = 0
    for row in (row for batch in batches for row in batch.rows):
        flops, billed_len_tokens = tasks[row.task]
        total += flops.of(row.raw_tokens if tokens == "raw" else billed_len_tokens)
    return total
