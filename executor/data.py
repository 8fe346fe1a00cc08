"""Tensors of a unit's batch: token ids, positions, labels, and where each task's response tokens are."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muxtune.executor.attention import Run, whole_runs
from muxtune.executor.rows import whole_rows
from muxtune.spec.align import Batch, Row
from muxtune.spec.program import Program
from muxtune.spec.task import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTensors:
    """One hTask's input on a flat token axis: ids, positions and labels (tokens,), and per task the predicted positions.

    `segments` and `runs` are the batch's, kept because every layer asks for them; `chunk` is its place in its unit. `counters`
    numbers the tokens of a task's step by sample slot and position, whatever stands beside them in the batch (for dropout).
    """

    batch: Batch
    segments: tuple[tuple[str, int, int], ...]
    runs: tuple[Run, ...]
    chunk: int = 0
    ids: Tensor
    positions: Tensor
    labels: Tensor
    counters: Tensor
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


#: A sample: token ids of its prompt and of its response.
Pair = tuple[NDArray[np.int32], NDArray[np.int32]]
#: Token ids of a row: its prompt's, then its response's.
TokenSource = Callable[[Row], NDArray[np.int64]]


def token_source(workload: Workload, texts: Mapping[str, Sequence[Pair]] = MappingProxyType({})) -> TokenSource:
    """Tokens of the tasks of a workload: from the texts of their data sets, by sample id, or seeded noise where there are none.

    A prompt that is too long loses its left end, a response its right end (DESIGN §4).
    """
    datasets = {task.task_id: task.dataset for task in workload.tasks}

    def tokens(row: Row) -> NDArray[np.int64]:
        samples = texts.get(datasets[row.task])
        if samples is None:
            return sample_tokens(row, workload.model.vocab)
        prompt, response = samples[row.sample]
        kept = prompt[len(prompt) - row.prompt_tokens :], response[: row.response_tokens]
        return np.concatenate(kept).astype(np.int64)

    return tokens


def noise_source(vocab: int) -> TokenSource:
    """Seeded noise for every row."""
    return lambda row: sample_tokens(row, vocab)


def predicted_positions(row: Row) -> range:
    """Places in a row whose next token is a response token; the first token of a row is never predicted."""
    first = max(row.prompt_tokens, 1)
    return range(first - 1, row.raw_tokens - 1)


def response_counts(program: Program) -> dict[tuple[str, int], int]:
    """Predicted response tokens of each (task, step): the denominator of the task's loss (DESIGN §4)."""
    counts: dict[tuple[str, int], int] = {}
    for (step, task, _), row in whole_rows(program.units).items():
        counts[task, step] = counts.get((task, step), 0) + len(predicted_positions(row))
    return counts


def batch_tensors(
    batch: Batch,
    tokens: TokenSource,
    device: torch.device,
    whole: Callable[[Row], Row] = lambda row: row,
    runs: tuple[Run, ...] | None = None,
    chunk: int = 0,
) -> BatchTensors:
    """Build a batch; padding has id 0 and is never predicted.

    Of a chunk, `whole` gives the sample of which a row is a part (its last label lies in the next chunk), `runs` its attention.
    """
    ids = np.zeros(batch.tokens, dtype=np.int64)
    labels = np.zeros(batch.tokens, dtype=np.int64)
    positions = np.zeros(batch.tokens, dtype=np.int64)
    counters = np.zeros(batch.tokens, dtype=np.int64)
    targets: dict[str, list[int]] = {}
    start = 0
    for row in batch.rows:
        sample, past = whole(row), row.past_tokens
        found = tokens(sample)
        here, following = found[past : past + row.raw_tokens], found[past + 1 : past + row.raw_tokens + 1]
        ids[start : start + len(here)] = here
        labels[start : start + len(following)] = following
        own = row.length_tokens - row.padding_tokens
        positions[start : start + own] = np.arange(past, past + own)
        mine = (p - past for p in predicted_positions(sample))
        targets.setdefault(row.task, []).extend(start + p for p in mine if 0 <= p < row.raw_tokens)
        counters[start : start + row.length_tokens] = (row.slot << 32) + past + np.arange(row.length_tokens)
        start += row.length_tokens
    move = {"device": device}
    return BatchTensors(
        batch=batch,
        segments=batch.segments(),
        runs=whole_runs(batch.runs()) if runs is None else runs,
        chunk=chunk,
        ids=torch.as_tensor(ids, **move),
        positions=torch.as_tensor(positions, **move),
        labels=torch.as_tensor(labels, **move),
        counters=torch.as_tensor(counters, **move),
        targets=tuple((task, torch.as_tensor(places, dtype=torch.long, **move)) for task, places in targets.items()),
    )
