"""Alignment: the rows that an hTask computes in one unit, padded, in chunks of packs or flat, and the three token counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from muxtune.spec.noun import noun

Alignment = Literal["pad", "varlen", "chunk"]
ALIGNMENTS: tuple[Alignment, ...] = ("pad", "varlen", "chunk")

#: The paper's chunks are not cut smaller than this (MuxTune §3.5, §5.3).
LEAST_CHUNK_TOKENS = 64


@noun
class Row:
    """One sample in a batch: tokens after truncation, and `length_tokens` as computed (padding included).

    In a chunk a row is the part of the sample that lies there: `past_tokens` of its sequence lie in earlier chunks, and the
    last `padding_tokens` of `length_tokens` belong to no sequence: they fill up the chunk and take part in no attention.
    """

    task: str
    slot: int
    sample: int
    prompt_tokens: int
    response_tokens: int
    length_tokens: int
    past_tokens: int = 0
    padding_tokens: int = 0

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
        """(rows, length) of each run of neighbouring rows of equal length: one attention call each, where none has a past."""
        return tuple((rows, length) for rows, length, _ in self.attention_runs())

    def attention_runs(self) -> tuple[tuple[int, int, int], ...]:
        """(rows, KV length, query length) of each run of neighbouring rows alike in both: one attention call each."""
        runs: list[tuple[int, int, int]] = []
        for row in self.rows:
            queries = row.length_tokens - row.padding_tokens
            shape = (row.past_tokens + queries, queries)
            if runs and runs[-1][1:] == shape:
                runs[-1] = (runs[-1][0] + 1, *shape)
            else:
                runs.append((1, *shape))
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


def chunk_rule(billed_len_tokens: Iterable[int]) -> int:
    """The paper's chunk size: the greatest power of two that divides every billed length, at least 64 (§3.5)."""
    common = math.gcd(*billed_len_tokens)
    return max(LEAST_CHUNK_TOKENS, common & -common)


@noun
class Piece:
    """The part of one sequence (an index) that lies in one chunk of its pack; `padding_tokens` fill the chunk behind it."""

    sequence: int
    past_tokens: int
    tokens: int
    padding_tokens: int = 0


def pack_length(longest_billed_tokens: int, chunk_tokens: int) -> int:
    """Room of a pack: the longest billed length of the hTask, rounded up to whole chunks."""
    return -(-longest_billed_tokens // chunk_tokens) * chunk_tokens


def first_fit_decreasing(sizes: Sequence[int], room: int) -> tuple[tuple[int, ...], ...]:
    """Pack items (indices), largest first, each into the first pack that has room; ties keep their order.

    Raises:
        ValueError: an item is larger than a pack.
    """
    packs: list[list[int]] = []
    left: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if sizes[item] > room:
            raise ValueError(f"a sequence of {sizes[item]} tokens is longer than a pack of {room}")
        found = next((p for p, free in enumerate(left) if sizes[item] <= free), len(packs))
        if found == len(packs):
            packs.append([])
            left.append(room)
        packs[found].append(item)
        left[found] -= sizes[item]
    return tuple(tuple(p) for p in packs)


def cut_packs(
    lengths: Sequence[int], longest_billed_tokens: int, chunk_tokens: int
) -> tuple[tuple[tuple[Piece, ...], ...], ...]:
    """Pack sequences of one task and cut the packs: for each chunk j, for each pack that reaches it, its pieces.

    A chunk always computes `chunk_tokens`. Where a pack has several chunks, a sequence starts on a chunk's first token, so
    that one shorter than a chunk is padded (Table 2 of the paper, chunk 128 over lengths of 64). Where it has one (the chunk
    covers the longest billed length) sequences lie one right after the other: plain packing.
    """
    room = pack_length(longest_billed_tokens, chunk_tokens)
    grain = chunk_tokens if room > chunk_tokens else 1
    spans = [-(-n // grain) * grain for n in lengths]
    chunks: list[list[tuple[Piece, ...]]] = []
    for pack in first_fit_decreasing(spans, room):
        for j, pieces in enumerate(_cut_pack([(i, lengths[i], spans[i]) for i in pack], chunk_tokens)):
            if j == len(chunks):
                chunks.append([])
            chunks[j].append(pieces)
    return tuple(tuple(packs) for packs in chunks)


def _cut_pack(sequences: Sequence[tuple[int, int, int]], chunk_tokens: int) -> tuple[tuple[Piece, ...], ...]:
    """The pieces in each chunk of one pack of (sequence, tokens, tokens with padding)."""
    chunks: list[list[Piece]] = []
    start = 0
    for sequence, tokens, span in sequences:
        done = 0
        while done < tokens:
            j, at = divmod(start + done, chunk_tokens)
            part = min(tokens - done, chunk_tokens - at)
            chunks += [[] for _ in range(j + 1 - len(chunks))]
            chunks[j].append(Piece(sequence=sequence, past_tokens=done, tokens=part))
            done += part
        start += span
    return tuple((*pieces[:-1], _filled(pieces, chunk_tokens)) for pieces in chunks)


def _filled(pieces: Sequence[Piece], chunk_tokens: int) -> Piece:
    """The last piece of a chunk, with the padding behind it."""
    last = pieces[-1]
    return replace(last, padding_tokens=chunk_tokens - sum(p.tokens for p in pieces))


def count_tokens(batches: Iterable[Batch], billed_len_tokens: Sequence[tuple[str, int]]) -> tuple[int, int, int]:
    """(raw, billed, processed) tokens of some batches; `billed_len_tokens` pairs each task with its padded length l.

    A sample that lies in several chunks is billed with the first.
    """
    billed_len = dict(billed_len_tokens)
    raw = billed = processed = 0
    for batch in batches:
        raw += batch.raw_tokens
        billed += sum(billed_len[r.task] for r in batch.rows if not r.past_tokens)
        processed += batch.tokens
    return raw, billed, processed
