"""LengthDistribution: token lengths of a fine-tuning data set, as samples or as an embedded table of quantiles."""

from __future__ import annotations

import csv
import math
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.noun import noun
from muxtune.spec.units import check_range

QUANTILES = Path(__file__).parent / "data" / "length_quantiles.csv"

#: Longest sample, and largest data set (a quantile table states its size, its samples are not stored).
MAX_TOKENS, MAX_SAMPLES = 2**31 - 1, 10**15
#: Of a larger data set so many evenly spaced samples stand for all.
PROBED_SAMPLES = 1_000_000
#: A billed length covers this share of the samples unless a task says otherwise (DESIGN §3).
BILLED_COVERAGE = 0.995


@noun
class LengthDistribution:
    """Lengths in tokens of the text alone.

    Either `quantiles_tokens` (101 totals for p0..p100, with `response_share` of each total being the response and
    `samples` the size of the source) or `prompt_tokens` and `response_tokens`, one entry a sample.
    """

    name: str
    tokenizer: str
    samples: int
    quantiles_tokens: tuple[int, ...] = ()
    response_share: float = 0.0
    prompt_tokens: tuple[int, ...] = ()
    response_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.quantiles_tokens) == bool(self.prompt_tokens):
            raise ValueError(f"{self.name}: give either quantiles_tokens or prompt_tokens and response_tokens")
        if self.quantiles_tokens:
            self._check_quantiles()
        else:
            self._check_samples()

    def _check_quantiles(self) -> None:
        table = self.quantiles_tokens
        if len(table) != 101:
            raise ValueError(f"{self.name}: quantiles_tokens has {len(table)} entries; p0..p100 are 101")
        for i in range(100):
            if table[i + 1] < table[i]:
                raise ValueError(
                    f"{self.name}: quantiles_tokens decreases from p{i}={table[i]} to p{i + 1}={table[i + 1]}"
                )
        if table[0] < 1 or self.samples < 1 or not 0.0 <= self.response_share <= 1.0:
            raise ValueError(f"{self.name}: lengths and samples must be at least 1, response_share in [0, 1]")
        check_range(f"{self.name}: p100", table[-1], 1, MAX_TOKENS)
        check_range(f"{self.name}: samples", self.samples, 1, MAX_SAMPLES)

    def _check_samples(self) -> None:
        if not len(self.prompt_tokens) == len(self.response_tokens) == self.samples:
            raise ValueError(f"{self.name}: prompt_tokens, response_tokens and samples must have one length")
        for i, (prompt, response) in enumerate(zip(self.prompt_tokens, self.response_tokens, strict=True)):
            if prompt < 0 or response < 0 or prompt + response < 1:
                raise ValueError(
                    f"{self.name}: sample {i} has {prompt} prompt and {response} response tokens; needs at least 1"
                )
            check_range(f"{self.name}: tokens of sample {i}", prompt + response, 1, MAX_TOKENS)

    def lengths(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(prompt, response) tokens of the given sample ids, each in [0, samples)."""
        if self.prompt_tokens:
            return np.asarray(self.prompt_tokens)[sample_ids], np.asarray(self.response_tokens)[sample_ids]
        position = (np.asarray(sample_ids, dtype=np.float64) + 0.5) / self.samples * 100.0
        total = np.rint(np.interp(position, np.arange(101), self.quantiles_tokens)).astype(np.int64)
        response = np.clip(np.rint(self.response_share * total), 1, total).astype(np.int64)
        return total - response, response

    def probed(self) -> NDArray[np.int64]:
        """Every sample id; of a data set of more than PROBED_SAMPLES that many, evenly spaced."""
        if self.samples <= PROBED_SAMPLES:
            return np.arange(self.samples)
        return np.arange(PROBED_SAMPLES) * (self.samples // PROBED_SAMPLES)

    def covered_length(self, share: float = BILLED_COVERAGE) -> int:
        """The smallest power of two that covers this share of the samples."""
        if self.quantiles_tokens:  # ordered by id: the last sample that must be covered decides
            last = math.ceil(self.samples * share - 1)
            prompt, response = self.lengths(np.array([min(max(0, last), self.samples - 1)]))
            needed = int(prompt[0] + response[0])
        else:
            prompt, response = self.lengths(np.arange(self.samples))
            needed = int(np.quantile(prompt + response, share, method="inverted_cdf"))
        return 1 << max(0, needed - 1).bit_length()


@cache
def embedded_lengths() -> dict[str, LengthDistribution]:
    """Every embedded table: `NAME` is counted by GPT-2's tokenizer (else by Llama-2's), `NAME@TOKENIZER` by that one."""
    found: dict[str, LengthDistribution] = {}
    with QUANTILES.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            table = LengthDistribution(
                name=row["dataset"],
                tokenizer=row["tokenizer"],
                samples=int(row["samples"]),
                response_share=float(row["response_share"]),
                quantiles_tokens=tuple(int(row[f"p{i}"]) for i in range(101)),
            )
            found[f"{table.name}@{table.tokenizer}"] = table
            if table.tokenizer == "gpt2" or table.name not in found:
                found[table.name] = table
    return found


def embedded_length(name: str) -> LengthDistribution:
    """One embedded table.

    Raises:
        UnknownKeyError: no table has this name.
    """
    tables = embedded_lengths()
    if name not in tables:
        raise UnknownKeyError("dataset", name, [k for k in tables if "@" not in k])
    return tables[name]


def lengths_from_pairs(name: str, tokenizer: str, pairs: list[tuple[int, int]], place: str) -> LengthDistribution:
    """A distribution of explicit (prompt, response) pairs.

    Raises:
        InputError: no pair, or a pair below zero; `place` names the file.
    """
    if not pairs:
        raise InputError(f"{place}: holds no sample")
    try:
        return LengthDistribution(
            name=name,
            tokenizer=tokenizer,
            samples=len(pairs),
            prompt_tokens=tuple(p for p, _ in pairs),
            response_tokens=tuple(r for _, r in pairs),
        )
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error
