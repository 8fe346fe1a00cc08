"""Readers of token lengths: parquet, CSV (samples or a quantile table), JSONL (counts or texts)."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from muxtune.sim.traces.texts import BYTES, TEXTS, encode, json_lines, parquet_texts
from muxtune.spec.errors import InputError
from muxtune.spec.lengths import MAX_SAMPLES, MAX_TOKENS, LengthDistribution, lengths_from_pairs

#: What a result says where neither the file nor the caller names the tokenizer.
UNSTATED = "unstated"

COUNTS = ("prompt_tokens", "response_tokens")
QUANTILES = tuple(f"p{i}" for i in range(101))


def read_lengths(path: Path, tokenizer: str | None = None) -> LengthDistribution:
    """Lengths of a data set file, by its suffix: .parquet, .csv or .jsonl.

    Counts stand in `prompt_tokens` and `response_tokens`; with a `tokenizer` the columns that carry its name
    (`prompt_tokens_llama2`) come first. JSONL and parquet may hold texts, `prompt` and `response`, counted in UTF-8 bytes or,
    where `tokenizer` is the name of a tokenizer.json beside the data, in its tokens.
    A CSV may hold one row of quantiles instead (p0..p100, response_share, samples).

    Raises:
        InputError: the file, the row, the column, the value and the remedy.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a directory: give the path of a file in it")
    if not path.is_file():
        raise InputError(f"{path}: file not found")
    if path.suffix not in READERS:
        raise InputError(
            f"{path}: cannot read {path.suffix or 'a file without suffix'}: give one of {', '.join(READERS)}"
        )
    try:
        return READERS[path.suffix](path, tokenizer)
    except (OSError, UnicodeDecodeError, csv.Error, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error


def _read_parquet(path: Path, tokenizer: str | None) -> LengthDistribution:
    names = pyarrow.parquet.read_schema(path).names
    if set(TEXTS) <= set(names) and not any(n.startswith(COUNTS[0]) for n in names):
        return _from_texts(path, tokenizer, parquet_texts(path))
    columns = _count_columns(path, names, tokenizer)
    table = pyarrow.parquet.read_table(path, columns=list(columns))
    rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
    numbered = ((f"row {i}", dict(zip(columns, row, strict=True))) for i, row in enumerate(rows))
    return _from_counts(path, tokenizer, columns, numbered)


def _read_csv(path: Path, tokenizer: str | None) -> LengthDistribution:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or ())
        numbered = [(f"line {reader.line_num}", row) for row in reader]
    if {"p0", "p100"} <= set(names):
        return _from_quantiles(path, tokenizer, names, numbered)
    columns = _count_columns(path, names, tokenizer)
    return _from_counts(path, tokenizer, columns, numbered)


def _read_jsonl(path: Path, tokenizer: str | None) -> LengthDistribution:
    numbered = list(json_lines(path))
    if not numbered:
        raise InputError(f"{path}: holds no sample")
    names = list(numbered[0][1])
    if set(TEXTS) <= set(names) and not any(n.startswith(COUNTS[0]) for n in names):
        return _from_texts(path, tokenizer, numbered)
    columns = _count_columns(path, names, tokenizer)
    return _from_counts(path, tokenizer, columns, numbered)


def _count_columns(path: Path, names: Iterable[str], tokenizer: str | None) -> tuple[str, str]:
    """The (prompt, response) columns: the tokenizer's own if the file has them, else the plain ones."""
    have = list(names)
    choices = [COUNTS] if tokenizer is None else [(f"{COUNTS[0]}_{tokenizer}", f"{COUNTS[1]}_{tokenizer}"), COUNTS]
    for prompt, response in choices:
        if prompt in have and response in have:
            return prompt, response
    missing = next(n for n in COUNTS if n not in have)
    others = sorted(n.removeprefix(f"{COUNTS[0]}_") for n in have if n.startswith(f"{COUNTS[0]}_"))
    remedy = (
        f"name its tokenizer, one of {', '.join(others)}" if others else f"it has {', '.join(have) or 'none'}: add it"
    )
    raise InputError(f"{path}: column {missing} is missing; {remedy}")


def _from_counts(
    path: Path,
    tokenizer: str | None,
    columns: tuple[str, str],
    numbered: Iterable[tuple[str, Mapping[str, Any]]],
) -> LengthDistribution:
    pairs: list[tuple[int, int]] = []
    for place, row in numbered:
        prompt, response = (_count(f"{path}: {place}", name, row.get(name), 0) for name in columns)
        if prompt + response < 1:
            raise InputError(
                f"{path}: {place}: {columns[0]} and {columns[1]} are both 0: a sample has at least one token"
            )
        pairs.append((prompt, response))
    return lengths_from_pairs(path.stem, tokenizer or UNSTATED, pairs, str(path))


def _from_texts(
    path: Path, tokenizer: str | None, numbered: Iterable[tuple[str, Mapping[str, Any]]]
) -> LengthDistribution:
    """Lengths of texts: in bytes, or in tokens of a tokenizer file beside the data."""
    file = None if tokenizer in (None, BYTES) else path.parent / str(tokenizer)
    if file is not None and not file.is_file():
        raise InputError(
            f"{path}: holds texts: {tokenizer!r} must be a tokenizer file (tokenizer.json), and {file} does not exist"
        )
    pairs = [(len(prompt), len(response)) for prompt, response in encode(path, numbered, file)]
    return lengths_from_pairs(path.stem, tokenizer or BYTES, pairs, str(path))


def _from_quantiles(
    path: Path, tokenizer: str | None, names: list[str], numbered: list[tuple[str, dict[str, Any]]]
) -> LengthDistribution:
    """The one row of a quantile table (the one of the tokenizer, if rows name theirs)."""
    for name in (*QUANTILES, "response_share", "samples"):
        if name not in names:
            raise InputError(
                f"{path}: column {name} is missing: a quantile table has p0..p100, response_share, samples"
            )
    rows = [x for x in numbered if tokenizer is None or x[1].get("tokenizer") in (None, tokenizer)]
    if len(rows) != 1:
        raise InputError(
            f"{path}: holds {len(rows)} quantile rows for tokenizer {tokenizer or 'any'}: keep exactly one"
        )
    place, row = f"{path}: {rows[0][0]}", rows[0][1]
    share = _share(place, row["response_share"])
    table = tuple(_count(place, name, row[name], 1) for name in QUANTILES)
    samples = _count(place, "samples", row["samples"], 1)
    try:
        return LengthDistribution(
            name=path.stem,
            tokenizer=row.get("tokenizer") or tokenizer or UNSTATED,
            samples=samples,
            response_share=share,
            quantiles_tokens=table,
        )
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error


def _count(place: str, column: str, value: object, least: int) -> int:
    """A whole number, at least `least`; CSV gives texts, the others numbers."""
    if value is None or value == "":
        raise InputError(f"{place}: {column} is empty: give a whole number, at least {least}")
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,18}\s*", value):
        value = int(value)
    most = MAX_SAMPLES if column == "samples" else MAX_TOKENS
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        remedy = f"give a whole number, at least {least} and at most {most}"
        raise InputError(f"{place}: {column} = {_short(value)}: {remedy}")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _share(place: str, value: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{place}: response_share = {value!r}: give a number in [0, 1]") from error


#: By suffix: each reads a file, with the tokenizer asked for.
READERS: dict[str, Callable[[Path, str | None], LengthDistribution]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
}
