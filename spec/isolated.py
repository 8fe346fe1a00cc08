"""Adapters as subgraphs of their own (MuxTune §3.4.2), such that those of several hTasks can be launched as one.

The blocks of a layer are cut before and after the adapters of each BaseOp. These read what the BaseOp reads and run before
it; the sum of both outputs belongs to the BaseOp's subgraph. So no adapter shares a subgraph with a collective, and none
has to wait for more than the inputs of its own BaseOp (§3.4.3: LoRA operators fuse, the additions before an all-reduce do not).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby

from muxtune.spec.align import Batch
from muxtune.spec.catalogue import Piece, StageContext, Subgraph, Way, stage_ops, stage_subgraphs, subgraph_ops
from muxtune.spec.layout import Layout
from muxtune.spec.ops import ADAPTERS, Op
from muxtune.spec.plan import Launch

#: BaseOps of the pieces that have any, in forward order.
BASE_OPS = {"attention": ("qkv", "proj"), "mlp": ("fc1", "fc2")}

#: For each piece its forward operators, and those of its backward in the order in which they run.
PieceOps = Mapping[Piece, tuple[tuple[Op, ...], tuple[Op, ...]]]


def launched_subgraphs(layout: Layout, stage: int, way: Way, isolated: bool) -> tuple[Subgraph, ...]:
    """The subgraphs that a launch list of a bucket numbers: `isolated` where it fuses adapters across its hTasks."""
    return isolated_subgraphs(layout, stage, way) if isolated else stage_subgraphs(layout, stage, way)


@lru_cache(maxsize=1024)
def launched_names(layout: Layout, stage: int, way: Way, isolated: bool) -> tuple[str, ...]:
    """Their names for people."""
    return tuple(s.name for s in launched_subgraphs(layout, stage, way, isolated))


@lru_cache(maxsize=1024)
def isolated_subgraphs(layout: Layout, stage: int, way: Way) -> tuple[Subgraph, ...]:
    """`stage_subgraphs` with the adapters of each BaseOp apart, in serial order."""
    found: list[Subgraph] = []
    for whole in stage_subgraphs(layout, stage, way):
        if whole.collective is not None:
            found.append(replace(whole, index=len(found)))
            continue
        parts = [(piece, section) for piece in whole.pieces for section in _sections(piece, way)]
        for adapters, run in groupby(parts, key=lambda part: part if part[1] % 2 else None):
            pieces, sections = zip(*run, strict=True)
            target = "" if adapters is None else BASE_OPS[adapters[0].name][adapters[1] // 2]
            found.append(Subgraph(index=len(found), pieces=pieces, sections=sections, adapters=target))
    return tuple(found)


def _sections(piece: Piece, way: Way) -> Sequence[int]:
    """Parts of a piece in the order in which they run; the odd ones are the adapters of a BaseOp."""
    count = 2 * len(BASE_OPS.get(piece.name, ()))
    if not count:
        return (0,)
    return range(1, count + 1) if way == "forward" or piece.again else range(count - 1, -1, -1)


def _section_of(forward: Sequence[Op], way: Way, base_ops: int) -> Iterator[int]:
    """The part in which each of a piece's forward operators, or its counterpart in a backward, runs."""
    seen = 0
    for op in forward:
        if base_ops and op.family in ADAPTERS:
            yield 2 * seen - 1
        elif base_ops and op.family == "linear":
            yield 2 * seen + 2 if way == "forward" else 2 * seen
            seen += 1
        else:
            # What follows the last BaseOp begins a backward: it runs with that BaseOp, not in a launch of its own.
            yield 2 * seen if way == "forward" else min(2 * seen, max(0, 2 * base_ops - 2))


def gather(subgraphs: Sequence[Subgraph], ops: PieceOps, way: Way) -> Iterator[tuple[Op, ...]]:
    """The operators of each isolated subgraph; none for a collective."""
    parts: dict[tuple[Piece, int], list[Op]] = {}
    for piece in {p: None for s in subgraphs if s.collective is None for p in s.pieces}:
        forward, backward = ops[replace(piece, again=False)]
        mine: Way = "forward" if piece.again else way
        sections = list(_section_of(forward, mine, len(BASE_OPS.get(piece.name, ()))))
        # A backward runs the counterparts of the last forward operators: above the first adapter nothing flows back.
        run = forward if mine == "forward" else backward
        tags = sections if mine == "forward" else sections[len(sections) - len(run) :][::-1]
        for op, section in zip(run, tags, strict=True):
            parts.setdefault((piece, section), []).append(op)
    for s in subgraphs:
        own = zip(s.pieces, s.sections, strict=True) if s.collective is None else ()
        yield tuple(op for place in own for op in parts.get(place, ()))


def isolated_ops(context: StageContext, batch: Batch, way: Way) -> tuple[tuple[Op, ...], ...]:
    """`subgraph_ops` for `isolated_subgraphs`: the same operators, cut otherwise."""
    layout, stage = context.layout, context.stage
    whole = zip(stage_subgraphs(layout, stage, way), subgraph_ops(context, batch, way), strict=True)
    messages = iter([ops for s, ops in whole if s.collective is not None])
    subgraphs = isolated_subgraphs(layout, stage, way)
    by_piece = {piece: (forward, backward) for piece, forward, backward in stage_ops(context, batch)}
    rows = zip(subgraphs, gather(subgraphs, by_piece, way), strict=True)
    return tuple(ops if s.collective is None else next(messages) for s, ops in rows)


def launched_together(launches: Sequence[Launch], subgraphs: Sequence[Subgraph]) -> Iterator[tuple[Launch, ...]]:
    """Neighbouring launches of the same BaseOp's adapters are one; every other launch is alone."""
    for alone, run in groupby(enumerate(launches), key=lambda x: -1 if subgraphs[x[1].subgraph].adapters else x[0]):
        if alone >= 0:
            yield tuple(launch for _, launch in run)
        else:
            for _, same in groupby((launch for _, launch in run), key=lambda x: x.subgraph):
                yield tuple(same)
