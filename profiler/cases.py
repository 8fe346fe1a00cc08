"""Which operators to measure: groups and size ranges come from the catalogue for a workload and its layouts, never by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Literal

from muxtune.spec.align import Batch, Row
from muxtune.spec.catalogue import StageContext, Subgraph, adapter_sizes, stage_ops
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.model import ModelSpec
from muxtune.spec.noun import noun
from muxtune.spec.ops import ADAPTER_SUM, ADAPTERS, OVERHEADS, Op
from muxtune.spec.task import Task, Workload

#: A whole stage run through the executor's own nodes; `shape` says whether it is the first and the last one. What blocks
#: and stage cost beyond their operators become `attention_overhead`, `mlp_overhead` and `stage_overhead`.
PASSAGE = "passage"
#: What timing itself costs: an autograd graph of one trivial operator, and a grouped adapter call without groups. An operator
#: inside a stage does not pay it again, so fitting takes it off; what a node pays once is part of an overhead.
EMPTY = "empty"
EMPTY_LORA = "empty_lora"


@noun
class Case:
    """One operator at one size; `task` names the adapter's owner where the family needs one."""

    family: str
    dtype: str
    size: tuple[int, ...]
    shape: tuple[int, ...]
    direction: Literal["forward", "weights"] = "forward"
    task: str = ""
    layers: tuple[int, ...] = ()


def one_task_batch(task: Task, rows: int, length: int) -> Batch:
    """Rows of one task, all of one length."""
    made = (
        Row(task=task.task_id, slot=i, sample=i, prompt_tokens=length - 1, response_tokens=1, length_tokens=length)
        for i in range(rows)
    )
    return Batch(htask=0, rows=tuple(made))


def passage_batch(task: Task, tokens: int) -> Batch:
    """The batch of a passage: rows of 64 tokens, or one shorter row."""
    return one_task_batch(task, max(1, tokens // 64), min(tokens, 64))


def passage_stage(model: ModelSpec, kind: tuple[int, ...]) -> tuple[Layout, int]:
    """A layout and its stage that is (first, last) as `kind` says: of one stage, of two, or the middle one of three."""
    first, last = kind
    pp = 1 if first and last else 2 if first or last else 3
    return even_layout(model, pp=pp), 0 if first else 1


def block_of(layout: Layout, stage: int, subgraph: Subgraph) -> str | None:
    """`attention` or `mlp` where the subgraph is a block of a layer like any other; the stage's first layer is not.

    On stage 0 it has no gradient to hand on. A stage of one layer has no other.
    """
    piece = subgraph.pieces[-1]
    layers = layout.layers_of(stage)
    if piece.name not in ("attention", "mlp") or (piece.layer == layers[0] and len(layers) > 1):
        return None
    return piece.name


def octaves(low: int, high: int) -> tuple[int, ...]:
    """Powers of two from below `low` to at least `high`."""
    start = 1 << (low.bit_length() - 1)
    sizes: list[int] = []
    while not sizes or sizes[-1] < high:
        sizes.append(start << len(sizes))
    return tuple(sizes)


def token_ranges(workload: Workload) -> tuple[tuple[int, int], tuple[int, int], int]:
    """((fewest, most) tokens of a batch, (shortest, longest) row, most rows of a batch) that any grouping can produce.

    The most tokens are all tasks' global batches in one unit, padded to the longest billed length.
    """
    longest = max(t.billed_len_tokens for t in workload.tasks)
    rows = sum(t.global_batch_samples for t in workload.tasks)
    shortest = min(_shortest(workload, t) for t in workload.tasks)
    return (shortest, rows * longest), (shortest, longest), rows


def _shortest(workload: Workload, task: Task) -> int:
    lengths = workload.lengths(task)
    if lengths.quantiles_tokens:
        return min(lengths.quantiles_tokens[0], task.billed_len_tokens)
    pairs = zip(lengths.prompt_tokens, lengths.response_tokens, strict=True)
    return min(min(p + r for p, r in pairs), task.billed_len_tokens)


def needed_cases(workloads: Sequence[Workload], layouts: Sequence[Layout]) -> tuple[Case, ...]:
    """Every case for some workloads on one backbone under some layouts.

    Each operator group once, over an octave grid of the sizes that it can meet; an attention grid is filled up.
    """
    found: dict[Case, None] = {}
    passing = workloads[0].tasks[0]
    low = min(token_ranges(w)[0][0] for w in workloads)
    high = max(token_ranges(w)[0][1] for w in workloads)
    for workload in workloads:
        adapters = tuple((t.task_id, t.peft) for t in workload.tasks)
        for layout in layouts:
            for stage in range(layout.pp):
                context = StageContext(model=workload.model, layout=layout, stage=stage, adapters=adapters)
                for task in workload.tasks:
                    # The task of the passages meets as many tokens as they have, all others those of their own batches.
                    most = high if task == passing else task.global_batch_samples * token_ranges(workload)[1][1]
                    found.update(dict.fromkeys(_task_cases(workload, context, task, most)))
    kinds = {(1, 1)} | {(int(x.is_first(s)), int(x.is_last(s))) for x in layouts for s in range(x.pp)}
    found.update(dict.fromkeys(_passage_cases(workloads[0].model, passing, sorted(kinds), octaves(low, high))))
    return tuple(sorted(_filled(found), key=_order))


def _filled(cases: Iterable[Case]) -> set[Case]:
    """The cases, with every combination of the rows and lengths of one attention group."""
    found = set(cases)
    grids: dict[tuple[str, str, tuple[int, ...]], list[tuple[int, ...]]] = {}
    for case in found:
        if case.family == "attention":
            grids.setdefault((case.dtype, case.direction, case.shape), []).append(case.size)
    for (dtype, direction, shape), sizes in grids.items():
        for rows, length in product(*({size[axis] for size in sizes} for axis in (0, 1))):
            found.add(Case(family="attention", dtype=dtype, size=(rows, length), shape=shape, direction=direction))  # type: ignore[arg-type]
    return found


def _order(case: Case) -> tuple[str, tuple[int, ...], tuple[int, ...], str]:
    """Passages from the largest to the smallest: in an iteration too a batch finds the memory that one as large has left."""
    size = tuple(-n for n in case.size) if case.family == PASSAGE else case.size
    return case.family, case.shape, size, case.direction


def _task_cases(workload: Workload, context: StageContext, task: Task, most_of_task: int) -> Iterable[Case]:
    (fewest, most), (shortest, longest), rows = token_ranges(workload)
    batch = one_task_batch(task, 1, task.billed_len_tokens)
    for _, forward, backward in stage_ops(context, batch):
        for op in (*forward, *backward):
            if op.family == "attention":
                for length in octaves(shortest, longest):
                    yield from (_case(op, (r, length)) for r in octaves(1, rows))
            elif op.family == ADAPTER_SUM:
                continue  # priced as the all-reduce that it is
            elif op.family in ADAPTERS:
                yield from (_case(op, (n,)) for n in octaves(_shortest(workload, task), most_of_task))
            elif op.family not in OVERHEADS:
                yield from (_case(op, (n,)) for n in octaves(fewest, most))
    parameters, tensors = adapter_sizes(context, task.task_id)
    layers = tuple(context.layout.layers_of(context.stage))
    yield Case(family="adamw", dtype="fp32", size=(parameters,), shape=(tensors,), task=task.task_id, layers=layers)


def _case(op: Op, size: tuple[int, ...]) -> Case:
    """Forward and backward of an operator are one case; weights-only backward is a case of its own."""
    direction: Literal["forward", "weights"] = "weights" if op.direction == "weights" else "forward"
    return Case(family=op.family, dtype=op.dtype, size=size, shape=op.shape, direction=direction)


def _passage_cases(
    model: ModelSpec, task: Task, kinds: Iterable[tuple[int, int]], sizes: Sequence[int]
) -> Iterable[Case]:
    for kind, tokens in product(kinds, sizes):
        yield Case(family=PASSAGE, dtype=model.dtype, size=(tokens,), shape=kind, task=task.task_id)
    for family in ("launch", EMPTY, EMPTY_LORA):
        yield Case(family=family, dtype="host", size=(1,), shape=())
    yield Case(family="instruction", dtype="host", size=(1,), shape=(), task=task.task_id)


def message_sizes(workloads: Sequence[Workload]) -> tuple[int, ...]:
    """Bytes of the point-to-point messages to measure."""
    ranges = [token_ranges(w)[0] for w in workloads]
    width_bytes = workloads[0].model.hidden * workloads[0].model.element_bytes
    return tuple(n * width_bytes for n in octaves(min(r[0] for r in ranges), max(r[1] for r in ranges)))
