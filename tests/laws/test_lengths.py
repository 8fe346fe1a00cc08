"""Laws of every reader of token lengths, and of every embedded table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muxtune.sim.traces.lengths import READERS, read_lengths
from muxtune.spec.errors import InputError
from muxtune.spec.lengths import MAX_SAMPLES, MAX_TOKENS, LengthDistribution, embedded_lengths

SUFFIXES = sorted(READERS)
PAIRS = [(5, 1), (0, 7), (9, 0), (300, 20)]


def write(
    path: Path, pairs: list[tuple[object, object]], columns: tuple[str, str] = ("prompt_tokens", "response_tokens")
) -> None:
    rows = [dict(zip(columns, pair, strict=True)) for pair in pairs]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("\n".join([",".join(columns), *(f"{a},{b}" for a, b in pairs)]) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_counts_are_read_as_they_stand(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"lengths{suffix}"
    write(path, PAIRS)
    found = read_lengths(path)
    assert list(zip(found.prompt_tokens, found.response_tokens, strict=True)) == PAIRS
    assert (found.name, found.samples, found.tokenizer) == ("lengths", 4, "unstated")
    assert read_lengths(path) == found
    assert found.covered_length() == 512


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_tokenizer_has_its_own_columns(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"lengths{suffix}"
    write(path, PAIRS, ("prompt_tokens_mine", "response_tokens_mine"))
    assert read_lengths(path, "mine").tokenizer == "mine"
    with pytest.raises(InputError, match="column prompt_tokens is missing; name its tokenizer, one of mine"):
        read_lengths(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("bad", [(-1, 5), (0, 0), (MAX_TOKENS + 1, 1), (10**17, 1)])
def test_a_bad_row_is_named(suffix: str, bad: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / f"lengths{suffix}"
    write(path, [*PAIRS, bad])
    place = {".csv": "line 6", ".jsonl": "line 5", ".parquet": "row 4"}[suffix]
    with pytest.raises(InputError, match=f"lengths{suffix}: {place}: .*prompt_tokens"):
        read_lengths(path)


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s != ".parquet"])
@pytest.mark.parametrize("digits", [30, 5000])
def test_a_number_of_many_digits_is_one_sentence(suffix: str, digits: int, tmp_path: Path) -> None:
    path = tmp_path / f"lengths{suffix}"
    row = "9" * digits
    text = (
        f"prompt_tokens,response_tokens\n{row},1\n"
        if suffix == ".csv"
        else f'{{"prompt_tokens": {row}, "response_tokens": 1}}\n'
    )
    path.write_text(text)
    with pytest.raises(InputError, match=rf"lengths{suffix}: line \d") as caught:
        read_lengths(path)
    assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_a_directory_and_an_empty_file_are_named(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / f"empty{suffix}").write_bytes(b"")
    for stem, message in (
        ("none", "file not found"),
        ("folder", "is a directory: give"),
        ("empty", f"empty{suffix}: "),
    ):
        with pytest.raises(InputError, match=message):
            read_lengths(tmp_path / f"{stem}{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 2000), junk=st.binary(max_size=8))
def test_no_damage_gives_a_traceback(suffix: str, cut: int, junk: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"lengths{suffix}"
    write(path, PAIRS)
    whole = path.read_bytes()
    place = cut % len(whole)
    path.write_bytes(whole[:place] + junk + whole[place + len(junk) :][: cut % 97])
    refused = ""
    try:
        read_lengths(path)
    except InputError as error:
        refused = str(error)
    assert refused == "" or str(path) in refused


@pytest.mark.parametrize("name", sorted(embedded_lengths()))
def test_embedded_tables(name: str) -> None:
    """Lengths rise with the sample's id, and the billed length is the smallest power of two that covers 99.5 % of them."""
    table = embedded_lengths()[name]
    prompt, response = table.lengths(np.arange(table.samples))
    total = prompt + response
    assert (np.diff(total) >= 0).all()
    assert (total.min(), total.max()) >= (1, 1)
    assert table.tokenizer in ("gpt2", "llama2")
    for share in (0.5, 0.9, 0.995, 1.0):
        needed = int(np.quantile(total, share, method="inverted_cdf"))
        assert table.covered_length(share) == 1 << (needed - 1).bit_length()


@given(st.lists(st.integers(1, 5000), min_size=101, max_size=101), st.integers(1, 3000), st.floats(0.01, 1.0))
def test_a_table_covers_like_its_samples(table: list[int], samples: int, share: float) -> None:
    found = LengthDistribution(name="x", tokenizer="t", samples=samples, quantiles_tokens=tuple(sorted(table)))
    total = np.add(*found.lengths(np.arange(samples)))
    needed = int(np.quantile(total, share, method="inverted_cdf"))
    assert found.covered_length(share) == 1 << max(0, needed - 1).bit_length()


def test_a_table_of_a_huge_data_set_costs_nothing() -> None:
    """A quantile table states its size; nothing is held for it."""
    ramp = LengthDistribution(name="x", tokenizer="t", samples=10**12, quantiles_tokens=tuple(range(1, 102)))
    assert ramp.covered_length() == 128
    assert ramp.covered_length(0.5) == 64
    ids = ramp.probed()
    assert (len(ids), ids[0], ids[-1]) == (10**6, 0, 10**12 - 10**6)
    for samples in (0, MAX_SAMPLES + 1):
        with pytest.raises(ValueError, match="samples"):
            LengthDistribution(name="x", tokenizer="t", samples=samples, quantiles_tokens=tuple(range(1, 102)))
