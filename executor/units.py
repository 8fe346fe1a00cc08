"""Tensors of the units that a rank computes: built once for a Program, whole samples put together for the chunks of a unit."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

import torch

from muxtune.executor.attention import Run, chunk_runs
from muxtune.executor.data import BatchTensors, TokenSource, batch_tensors
from muxtune.executor.rows import whole_rows
from muxtune.spec.align import Batch, Row
from muxtune.spec.program import Bound, UnitKey


def unit_tensors(
    bound: Bound, mine: Set[UnitKey], device: torch.device, tokens: TokenSource
) -> dict[UnitKey, dict[int, BatchTensors]]:
    """(unit, chunk) → hTask → tensors, for the units that this rank computes."""
    works = [w for w in bound.program.units if w.key in mine]
    samples = whole_rows(works)
    runs = _chunk_runs(bound, mine)
    found: dict[UnitKey, dict[int, BatchTensors]] = {}
    for work in works:

        def whole(row: Row, step: int = work.key.step) -> Row:
            return samples[step, row.task, row.slot]

        key = work.key
        found[key] = {
            b.htask: batch_tensors(b, tokens, device, whole, runs.get((key, b.htask)), key.chunk) for b in work.batches
        }
    return found


def _chunk_runs(bound: Bound, mine: Set[UnitKey]) -> dict[tuple[UnitKey, int], tuple[Run, ...]]:
    """The attention of every chunked hTask in every chunk of its units."""
    chunked: dict[tuple[UnitKey, int], list[tuple[UnitKey, Batch]]] = {}
    for work in bound.program.units:
        htasks = bound.plan.instances[work.key.instance].htasks
        for batch in work.batches:
            if work.key in mine and htasks[batch.htask].alignment == "chunk":
                chunked.setdefault((replace(work.key, chunk=0), batch.htask), []).append((work.key, batch))
    found: dict[tuple[UnitKey, int], tuple[Run, ...]] = {}
    for (_, htask), pairs in chunked.items():
        ordered = sorted(pairs, key=lambda pair: pair[0].chunk)
        for (key, _), runs in zip(ordered, chunk_runs([b for _, b in ordered]), strict=True):
            found[key, htask] = runs
    return found
