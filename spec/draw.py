"""Draw: the seeded choice of samples, (task, step) → sample ids."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from muxtune.spec.align import Alignment, Piece, Row, aligned_length, cut_packs, truncate
from muxtune.spec.noun import noun
from muxtune.spec.task import Task, Workload


@noun
class Sample:
    """One drawn sample: its id in the data set and its lengths before truncation."""

    sample: int
    prompt_tokens: int
    response_tokens: int


@noun
class TaskDraw:
    """The samples of one task's optimizer step; sample slot i of a Plan is entry i."""

    task: str
    step: int
    samples: tuple[Sample, ...]


@noun
class Draw:
    """Everything that chance decides about a Program."""

    seed: int
    steps: int
    entries: tuple[TaskDraw, ...]

    def of(self, task: str, step: int) -> tuple[Sample, ...]:
        """The samples of (task, step); KeyError if they were not drawn."""
        for entry in self.entries:
            if entry.task == task and entry.step == step:
                return entry.samples
        raise KeyError((task, step))


def draw_samples(workload: Workload, seed: int, steps: int = 1, first_step: int = 0) -> Draw:
    """Draw `steps` global batches for every task.

    Each (seed, task, step) has its own random stream, so a task draws the same samples whoever its neighbours are.
    """
    entries = [
        _draw_task(workload, task, seed, step)
        for step in range(first_step, first_step + steps)
        for task in workload.tasks
    ]
    return Draw(seed=seed, steps=steps, entries=tuple(entries))


def draw_onward(workload: Workload, seed: int, steps: int, done: Mapping[str, int]) -> Draw:
    """The next `steps` global batches of every task, numbered from 0; `done` says how many each has had so far.

    A task that joined late draws what it would have drawn alone from the start.
    """
    entries = [
        replace(_draw_task(workload, task, seed, done.get(task.task_id, 0) + step), step=step)
        for step in range(steps)
        for task in workload.tasks
    ]
    return Draw(seed=seed, steps=steps, entries=tuple(entries))


def _draw_task(workload: Workload, task: Task, seed: int, step: int) -> TaskDraw:
    key = (zlib.crc32(task.task_id.encode()), step)
    rng = np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=key))
    lengths = workload.lengths(task)
    ids = rng.integers(0, lengths.samples, task.global_batch_samples)
    prompt, response = lengths.lengths(ids)
    samples = tuple(
        Sample(sample=int(i), prompt_tokens=int(p), response_tokens=int(r))
        for i, p, r in zip(ids, prompt, response, strict=True)
    )
    return TaskDraw(task=task.task_id, step=step, samples=samples)


def align_sample(task: Task, slot: int, sample: Sample, alignment: Alignment, longest_billed_tokens: int) -> Row:
    """Truncate a sample to its task's billed length and give it its computed length."""
    prompt, response = truncate(sample.prompt_tokens, sample.response_tokens, task.billed_len_tokens)
    length = aligned_length(alignment, prompt + response, longest_billed_tokens)
    return Row(
        task=task.task_id,
        slot=slot,
        sample=sample.sample,
        prompt_tokens=prompt,
        response_tokens=response,
        length_tokens=length,
    )


def align_chunks(
    task: Task, slots: Sequence[int], samples: Sequence[Sample], chunk_tokens: int, longest_billed_tokens: int
) -> tuple[tuple[Row, ...], ...]:
    """Pack the samples of one task in one micro-batch at their billed length and cut the packs: the rows of each chunk.

    A sample's own tokens come first, the padding to its billed length after them.
    """
    packed = cut_packs([task.billed_len_tokens] * len(slots), longest_billed_tokens, chunk_tokens)
    whole = [align_sample(task, slot, sample, "varlen", 0) for slot, sample in zip(slots, samples, strict=True)]
    return tuple(tuple(_part(whole[p.sequence], p) for pieces in chunk for p in pieces) for chunk in packed)


def _part(row: Row, piece: Piece) -> Row:
    """The part of a sample that lies in one chunk."""
    end = piece.past_tokens + piece.tokens
    prompt, raw = (min(n, end) - min(n, piece.past_tokens) for n in (row.prompt_tokens, row.raw_tokens))
    return replace(
        row,
        prompt_tokens=prompt,
        response_tokens=raw - prompt,
        length_tokens=piece.tokens + piece.padding_tokens,
        past_tokens=piece.past_tokens,
        padding_tokens=piece.padding_tokens,
    )
