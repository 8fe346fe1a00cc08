"""Which operators to measure: groups and size ranges come from the catalogue for a workload and its layouts, never by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

from muxtune.spec.align import LEAST_CHUNK_TOKENS, Batch, Row, pack_length
from muxtune.spec.catalogue import StageContext, Subgraph, adapter_sizes, replicated_parameters, stage_ops
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.model import ModelSpec
from muxtune.spec.noun import noun
from muxtune.spec.ops import ADAPTER_SUM, ADAPTERS, CHUNK_ATTENTION, COLLECTIVES, OVERHEADS, Op
from muxtune.spec.task import Task, Workload

#: A whole stage run through the executor's own nodes; `shape` says whether it is the first and the last one. What blocks
#: and stage cost beyond their operators become `attention_overhead`, `mlp_overhead` and `stage_overhead`.
PASSAGE = "passage"
#: What timing itself costs: an autograd graph of one trivial operator, and a grouped adapter call without groups. An operator
#: inside a stage does not pay it again, so fitting takes it off; what a node pays once is part of an overhead.
EMPTY = "empty"
EMPTY_LORA = "empty_lora"
#: Gradients are summed as fp32.
GRADIENT_BYTES = 4
#: Where the vocabulary is cut over tp ranks, their loss meets in it: it is measured by all of them.
SHARED_LOSS = "cross_entropy"


@noun
class Case:
    """One operator at one size; `task` names the adapter's owner where the family needs one, `tp` whose shard it is."""

    family: str
    dtype: str
    size: tuple[int, ...]
    shape: tuple[int, ...]
    direction: Literal["forward", "weights"] = "forward"
    task: str = ""
    layers: tuple[int, ...] = ()
    tp: int = 1

    @property
    def ranks(self) -> int:
        """How many ranks run it together: those of a collective, or of a loss over shards of the vocabulary."""
        return self.shape[0] if self.family in COLLECTIVES else self.tp if self.family == SHARED_LOSS else 1


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

    The most tokens are all tasks' global batches in one unit, padded to the longest billed length, or to whole chunks where
    that can be cut.
    """
    longest = max(t.billed_len_tokens for t in workload.tasks)
    longest = pack_length(longest, LEAST_CHUNK_TOKENS) if longest > LEAST_CHUNK_TOKENS else longest
    rows = sum(t.global_batch_samples for t in workload.tasks)
    shortest = min(_shortest(workload, t) for t in workload.tasks)
    return (shortest, rows * longest), (shortest, longest), rows


def chunk_sizes(workload: Workload) -> tuple[tuple[int, int], ...]:
    """(past, queries) to measure: all that chunks of powers of two can make of the billed lengths, on an octave grid."""
    lengths = {t.billed_len_tokens for t in workload.tasks}
    chunks = [c for c in octaves(LEAST_CHUNK_TOKENS, max(lengths)) if c < max(lengths)]
    pieces = [(past, min(c, n - past)) for c in chunks for n in lengths for past in range(c, n, c)]
    if not pieces:
        return ()
    pasts, queries = zip(*pieces, strict=True)
    return tuple(product(octaves(min(pasts), max(pasts)), octaves(min(queries), max(queries))))


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
    cut = max(x.tp if x.sequence_parallel else 1 for x in layouts)
    high = max(token_ranges(w)[0][1] for w in workloads)
    for workload in workloads:
        adapters = tuple((t.task_id, t.peft) for t in workload.tasks)
        for layout in layouts:
            for stage in range(layout.pp):
                context = StageContext(model=workload.model, layout=layout, stage=stage, adapters=adapters)
                for task in workload.tasks:
                    # The task of the passages meets as many tokens as they have, all others those of their own batches.
                    most = high if task == passing else task.global_batch_samples * token_ranges(workload)[1][1]
                    found.update(dict.fromkeys(_task_cases(workload, context, task, (max(1, low // cut), most))))
    kinds = {(1, 1)} | {(int(x.is_first(s)), int(x.is_last(s))) for x in layouts for s in range(x.pp)}
    found.update(dict.fromkeys(_passage_cases(workloads[0].model, passing, sorted(kinds), octaves(low, high))))
    return tuple(sorted(_filled(found), key=_order))


def _filled(cases: Iterable[Case]) -> set[Case]:
    """The cases, with every combination of the sizes of one attention group."""
    found = set(cases)
    grids: dict[tuple[str, str, tuple[int, ...]], list[tuple[int, ...]]] = {}
    for case in found:
        if case.family in ("attention", CHUNK_ATTENTION):
            grids.setdefault((case.family, case.dtype, case.shape), []).append(case.size)
    for (family, dtype, shape), sizes in grids.items():
        for size in product(*(set(axis) for axis in zip(*sizes, strict=True))):
            found.add(Case(family=family, dtype=dtype, size=size, shape=shape))
    return found


def _order(case: Case) -> tuple[str, tuple[int, ...], tuple[int, ...], str]:
    """Passages from the largest to the smallest: in an iteration too a batch finds the memory that one as large has left."""
    size = tuple(-n for n in case.size) if case.family == PASSAGE else case.size
    return case.family, case.shape, size, case.direction


def _task_cases(
    workload: Workload, context: StageContext, task: Task, tokens_of_task: tuple[int, int]
) -> Iterable[Case]:
    (_, most), (shortest, longest), rows = token_ranges(workload)
    fewest, most_of_task = tokens_of_task
    tp = context.layout.tp
    batch = one_task_batch(task, 1, task.billed_len_tokens)
    for _, forward, backward in stage_ops(context, batch):
        for op in (*forward, *backward):
            if op.family == "attention":
                for length in octaves(shortest, longest):
                    yield from (_case(op, (r, length)) for r in octaves(1, rows))
                for past, queries in chunk_sizes(workload):
                    chunk = replace(op, family=CHUNK_ATTENTION)
                    yield from (_case(chunk, (r, past, queries)) for r in octaves(1, rows))
            elif op.family == ADAPTER_SUM or (op.family == SHARED_LOSS and tp > 1):
                continue  # an all-reduce, and what ranks run together: of `shared_cases`
            elif op.family in ADAPTERS:
                yield from (_case(op, (n,)) for n in octaves(_shortest(workload, task), most_of_task))
            elif op.family not in OVERHEADS:
                yield from (_case(op, (n,)) for n in octaves(fewest, most))
    parameters, tensors = adapter_sizes(context, task.task_id)
    layers = tuple(context.layout.layers_of(context.stage))
    yield Case(
        family="adamw", dtype="fp32", size=(parameters,), shape=(tensors,), task=task.task_id, layers=layers, tp=tp
    )


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


def shared_cases(workloads: Sequence[Workload], layouts: Sequence[Layout]) -> tuple[Case, ...]:
    """What ranks run together: collectives of a stage and of gradients by size and ranks, and the loss over shards."""
    found: set[Case] = set()
    model = workloads[0].model
    for layout in layouts:
        for family in ("reduce_scatter", "all_gather") if layout.sequence_parallel else ("all_reduce",):
            sizes = message_sizes(workloads) if layout.tp > 1 else ()
            found.update(_collective(family, n, layout.tp) for n in sizes)
        if layout.tp > 1:
            ranges = [token_ranges(w)[0] for w in workloads]
            for tokens in octaves(min(r[0] for r in ranges), max(r[1] for r in ranges)):
                shape = (model.vocab // layout.tp,)
                case = Case(family=SHARED_LOSS, dtype=model.dtype, size=(tokens,), shape=shape, tp=layout.tp)
                found.add(case)
        for ranks, gradients in _gradient_bytes(workloads, layout):
            found.update(_collective("all_reduce", n, ranks) for n in octaves(min(gradients), max(gradients)))
    return tuple(sorted(found, key=lambda c: (c.ranks, c.family, c.size)))


def _collective(family: str, size_bytes: int, ranks: int) -> Case:
    return Case(family=family, dtype="bytes", size=(size_bytes,), shape=(ranks,))


def _gradient_bytes(workloads: Sequence[Workload], layout: Layout) -> Iterable[tuple[int, set[int]]]:
    """(ranks, bytes that they sum after a task's backward): over replicas all gradients, over tp those held whole."""
    whole: set[int] = set()
    copies: set[int] = set()
    for workload, stage in product(workloads, range(layout.pp)):
        adapters = tuple((t.task_id, t.peft) for t in workload.tasks)
        context = StageContext(model=workload.model, layout=layout, stage=stage, adapters=adapters)
        for task, _ in adapters:
            whole.add(GRADIENT_BYTES * adapter_sizes(context, task)[0])
            copies.add(GRADIENT_BYTES * replicated_parameters(context, task))
    for ranks, sizes in ((layout.dp, whole), (layout.tp, copies - {0})):
        if ranks > 1 and sizes:
            yield ranks, sizes
