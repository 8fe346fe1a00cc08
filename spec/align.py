"""Alignment: the rows that an hTask computes in one unit, padded (`pad`) or flat (`varlen`), and the three token counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from muxtune.spec.noun import noun

Alignment = Literal["pad", "varlen"]
ALIGNMENTS: tuple[Alignment, ...] = ("pad", "varlen")


@noun
class Row:
    """One sample in a batch: tokens after truncation, and `length_tokens` as computed (padding included)."""

    task: str
    slot: int
    sample: int
    prompt_tokens: int
    response_tokens: int
    length_tokens: int

    @property
    def raw_tokens(self) -> int:
        """Tokens without any padding."""
        return self.prompt_tokens + self.response_tokens


@noun
class Batch:
    """What one hTask computes in one unit: rows laid one after the other on a flat token axis, tasks contiguous."""

    htask: int
    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        """Processed tokens: everything that is computed."""
        return sum(r.length_tokens for r in self.rows)

    @property
    def raw_tokens(self) -> int:
        """Tokens without padding."""
        return sum(r.raw_tokens for r in self.rows)

    def segments(self) -> tuple[tuple[str, int, int], ...]:
        """(task, first token, end token) of each task's contiguous part of the token axis."""
        parts: list[tuple[str, int, int]] = []
        end = 0
        for row in self.rows:
            start, end = end, end + row.length_tokens
            if parts and parts[-1][0] == row.task:
                parts[-1] = (row.task, parts[-1][1], end)
            else:
                parts.append((row.task, start, end))
        return tuple(parts)

    def runs(self) -> tuple[tuple[int, int], ...]:
        """(rows, length) of each run of neighbouring rows of equal length: one attention call each."""
        runs: list[tuple[int, int]] = []
        for row in self.rows:
            if runs and runs[-1][1] == row.length_tokens:
                runs[-1] = (runs[-1][0] + 1, row.length_tokens)
            else:
                runs.append((1, row.length_tokens))
        return tuple(runs)


def truncate(prompt_tokens: int, response_tokens: int, billed_len_tokens: int) -> tuple[int, int]:
    """Cut to the billed length: the prompt loses its left end, the response is kept (DESIGN §4)."""
    response = min(response_tokens, billed_len_tokens)
    return min(prompt_tokens, billed_len_tokens - response), response


def aligned_length(alignment: Alignment, raw_tokens: int, longest_billed_tokens: int) -> int:
    """Computed length of one sample: the hTask's longest billed length (`pad`) or its own (`varlen`)."""
    return longest_billed_tokens if alignment == "pad" else raw_tokens


def spread_slots(samples: int, microbatches: int) -> tuple[tuple[int, ...], ...]:
    """Spread sample slots 0..samples-1 evenly over C micro-batches; a remainder sits in the first ones."""
    base, extra = divmod(samples, microbatches)
    sizes = [base + (c < extra) for c in range(microbatches)]
    starts = [sum(sizes[:c]) for c in range(microbatches)]
    return tuple(tuple(range(s, s + n)) for s, n in zip(starts, sizes, strict=True))


def count_tokens(batches: Iterable[Batch], billed_len_tokens: Sequence[tuple[str, int]]) -> tuple[int, int, int]:
    """(raw, billed, processed) tokens of some batches; `billed_len_tokens` pairs each task with its padded length l."""
    billed_len = dict(billed_len_tokens)
    raw = billed = processed = 0
    for batch in batches:
        raw += batch.raw_tokens
        billed += sum(billed_len[r.task] for r in batch.rows)
        processed += batch.tokens
    return raw, billed, processed
