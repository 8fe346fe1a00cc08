"""Texts as token ids: (prompt, response) pairs of a JSONL or parquet file, by a Hugging Face tokenizer file or as bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from muxtune.spec.errors import InputError

#: Without a tokenizer a text is its UTF-8 bytes, ids 0 to 255, and the result says so.
BYTES = "bytes"
TEXTS = ("prompt", "response")

Ids = NDArray[np.int32]
#: A sample: ids of the prompt and of the response.
Pair = tuple[Ids, Ids]


def read_token_ids(path: Path, tokenizer: Path | None) -> list[Pair]:
    """Every sample of a file, in file order; no token is added before, between or after the two texts.

    Raises:
        InputError: a row that is no pair of texts, a file that is no tokenizer, or the `tokenizers` library is missing.
    """
    if path.suffix == ".parquet":
        return encode(path, parquet_texts(path), tokenizer)
    return encode(path, json_lines(path), tokenizer)


def encode(path: Path, rows: Iterable[tuple[str, Mapping[str, Any]]], tokenizer: Path | None) -> list[Pair]:
    """Token ids of (place, row) pairs; see `read_token_ids`."""
    texts = [_texts(path, place, row) for place, row in rows]
    if tokenizer is None:
        return [(_bytes(prompt), _bytes(response)) for prompt, response in texts]
    found = _load(tokenizer)
    sides = [found.encode_batch([pair[i] for pair in texts], add_special_tokens=False) for i in (0, 1)]
    return [(np.array(p.ids, dtype=np.int32), np.array(r.ids, dtype=np.int32)) for p, r in zip(*sides, strict=True)]


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line that is not blank."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number} is not JSON: {error.msg}: write one object a line") from error
        except (ValueError, RecursionError) as error:  # more digits than Python reads, thousands of brackets
            raise InputError(f"{path}: line {number} cannot be read: {error}: write counts of tokens") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number} is not a JSON object: write one object a line")
        yield f"line {number}", row


def parquet_texts(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of the text columns."""
    table = pyarrow.parquet.read_table(path, columns=list(TEXTS))
    for index, pair in enumerate(zip(*(table[name].to_pylist() for name in TEXTS), strict=True)):
        yield f"row {index}", dict(zip(TEXTS, pair, strict=True))


def _texts(path: Path, place: str, row: Mapping[str, Any]) -> tuple[str, str]:
    for name in TEXTS:
        if not isinstance(row.get(name), str):
            raise InputError(f"{path}: {place}: {name} = {row.get(name)!r} is no text: give every line both texts")
    prompt, response = row["prompt"], row["response"]
    if not prompt and not response:
        raise InputError(f"{path}: {place}: prompt and response are both empty: a sample has at least one token")
    return prompt, response


def _bytes(text: str) -> Ids:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)


def _load(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415  # optional: only texts need it
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: needs the tokenizers library: pip install 'muxtune[hf]'") from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: is no tokenizer file (tokenizer.json of Hugging Face): {error}") from error
