"""Tensors of a unit's batch: token ids, positions, labels, and where each task's response tokens are."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muxtune.spec.align import Batch, Row
from muxtune.spec.program import Program


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTensors:
    """One hTask's input on a flat token axis: ids, positions and labels (tokens,), and per task the predicted positions.

    `segments` and `runs` are the batch's, kept because every layer asks for them.
    """

    batch: Batch
    segments: tuple[tuple[str, int, int], ...]
    runs: tuple[tuple[int, int], ...]
    ids: Tensor
    positions: Tensor
    labels: Tensor
    targets: tuple[tuple[str, Tensor], ...]


def sample_tokens(row: Row, vocab: int) -> NDArray[np.int64]:
    """Token ids of a sample, a function of task, sample id and place only: data without text is seeded noise.

    Each token repeats its predecessor with probability one half, so that there is something to learn.
    """
    rng = np.random.default_rng((zlib.crc32(row.task.encode()), row.sample))
    fresh = rng.integers(0, vocab, row.raw_tokens)
    keep = rng.random(row.raw_tokens) < 0.5
    keep[:1] = True
    tokens: NDArray[np.int64] = fresh[np.maximum.accumulate(np.where(keep, np.arange(row.raw_tokens), 0))]
    return tokens


def predicted_positions(row: Row) -> range:
    """Places in a row whose next token is a response token; the first token of a row is never predicted."""
    first = max(row.prompt_tokens, 1)
    return range(first - 1, row.raw_tokens - 1)


def response_counts(program: Program) -> dict[tuple[str, int], int]:
    """Predicted response tokens of each (task, step): the denominator of the task's loss (DESIGN §4)."""
    counts: dict[tuple[str, int], int] = {}
    for work in program.units:
        for batch in work.batches:
            for row in batch.rows:
                at = (row.task, work.key.step)
                counts[at] = counts.get(at, 0) + len(predicted_positions(row))
    return counts


def batch_tensors(batch: Batch, vocab: int, device: torch.device) -> BatchTensors:
    """Build a batch; padding has id 0 and is never predicted."""
    ids = np.zeros(batch.tokens, dtype=np.int64)
    labels = np.zeros(batch.tokens, dtype=np.int64)
    positions = np.zeros(batch.tokens, dtype=np.int64)
    targets: dict[str, list[int]] = {}
    start = 0
    for row in batch.rows:
        tokens = sample_tokens(row, vocab)
        ids[start : start + len(tokens)] = tokens
        labels[start : start + len(tokens) - 1] = tokens[1:]
        positions[start : start + row.length_tokens] = np.arange(row.length_tokens)
        targets.setdefault(row.task, []).extend(start + p for p in predicted_positions(row))
        start += row.length_tokens
    move = {"device": device}
    return BatchTensors(
        batch=batch,
        segments=batch.segments(),
        runs=batch.runs(),
        ids=torch.as_tensor(ids, **move),
        positions=torch.as_tensor(positions, **move),
        labels=torch.as_tensor(labels, **move),
        targets=tuple((task, torch.as_tensor(places, dtype=torch.long, **move)) for task, places in targets.items()),
    )
