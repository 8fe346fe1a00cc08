"""Length distributions: the embedded tables, quantiles and samples, billed lengths."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.lengths import (
    QUANTILES,
    LengthDistribution,
    embedded_length,
    embedded_lengths,
    lengths_from_pairs,
)

FLAT = LengthDistribution(name="flat", tokenizer="x", samples=100, quantiles_tokens=(10,) * 101, response_share=0.25)


@pytest.mark.parametrize(
    ("name", "billed"), [("sst2", 64), ("openbookqa", 128), ("rte", 256), ("gsm8k", 512), ("alpaca_gpt4", 1024)]
)
def test_billed_lengths(name: str, billed: int) -> None:
    """The paper pads SST2 to 64, OpenBookQA to 128, RTE to 256."""
    assert embedded_length(name).covered_length() == billed


def test_covered_length_covers() -> None:
    for table in embedded_lengths().values():
        prompt, response = table.lengths(np.arange(table.samples))
        covered = table.covered_length()
        assert covered & (covered - 1) == 0
        assert np.mean(prompt + response <= covered) >= 0.995
        assert np.mean(prompt + response <= covered // 2) < 0.995


def test_covered_length_by_hand() -> None:
    pairs = [(1, 3)] * 199 + [(60, 5)]
    assert lengths_from_pairs("x", "t", pairs, "file").covered_length() == 4
    assert lengths_from_pairs("x", "t", pairs, "file").covered_length(share=1.0) == 128
    assert lengths_from_pairs("x", "t", [(0, 1)], "file").covered_length() == 1


def test_every_row_of_the_file_is_found() -> None:
    with QUANTILES.open(encoding="utf-8", newline="") as file:
        rows = [(r["dataset"], r["tokenizer"]) for r in csv.DictReader(file)]
    for dataset, tokenizer in rows:
        assert embedded_length(f"{dataset}@{tokenizer}").tokenizer == tokenizer
        wanted = "gpt2" if (dataset, "gpt2") in rows else tokenizer
        assert embedded_length(dataset).tokenizer == wanted


def test_unknown_data_set_lists_the_known() -> None:
    with pytest.raises(UnknownKeyError, match=r"unknown dataset 'sst9': known are alpaca_gpt4, .*sst2"):
        embedded_length("sst9")


def test_response_share_is_rounded_and_at_least_one() -> None:
    prompt, response = FLAT.lengths(np.arange(100))
    assert (prompt + response == 10).all()
    assert (response == 2).all()  # round(2.5) to even
    tiny = replace(FLAT, quantiles_tokens=(1,) * 101, response_share=0.0)
    assert [int(x[0]) for x in tiny.lengths(np.arange(1))] == [0, 1]


def test_quantiles_are_interpolated_in_the_middle_of_a_sample() -> None:
    ramp = replace(FLAT, samples=100, quantiles_tokens=tuple(range(10, 1011, 10)), response_share=1.0)
    prompt, response = ramp.lengths(np.array([0, 50, 99]))
    assert prompt.tolist() == [0, 0, 0]
    assert response.tolist() == [15, 515, 1005]


@given(st.lists(st.integers(1, 500), min_size=101, max_size=101), st.integers(1, 300), st.floats(0, 1))
def test_lengths_stay_inside_the_table(table: list[int], samples: int, share: float) -> None:
    found = LengthDistribution(
        name="x", tokenizer="t", samples=samples, quantiles_tokens=tuple(sorted(table)), response_share=share
    )
    prompt, response = found.lengths(np.arange(samples))
    total = prompt + response
    assert (np.diff(total) >= 0).all()
    assert min(table) <= total.min() <= total.max() <= max(table)
    assert (response >= 1).all()
    assert (prompt >= 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantiles_tokens": (*range(10, 110), 5)}, "decreases from p99=109 to p100=5"),
        ({"quantiles_tokens": (1, 2, 3)}, "has 3 entries; p0..p100 are 101"),
        ({"quantiles_tokens": (0, *range(1, 101))}, "lengths and samples must be at least 1"),
        ({"samples": 0}, "lengths and samples must be at least 1"),
        ({"response_share": 1.5}, r"response_share in \[0, 1\]"),
        ({"quantiles_tokens": ()}, "give either quantiles_tokens or prompt_tokens"),
        ({"prompt_tokens": (1,)}, "give either quantiles_tokens or prompt_tokens"),
    ],
)
def test_wrong_tables(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FLAT, **change)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "f.csv: holds no sample"),
        ([(1, 1), (-1, 3)], "f.csv: x: sample 1 has -1 prompt and 3 response tokens"),
        ([(0, 0)], "f.csv: x: sample 0 has 0 prompt and 0 response tokens; needs at least 1"),
    ],
)
def test_wrong_samples_name_the_file(pairs: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lengths_from_pairs("x", "t", pairs, "f.csv")


def test_sample_columns_have_one_length() -> None:
    with pytest.raises(ValueError, match="prompt_tokens, response_tokens and samples must have one length"):
        LengthDistribution(name="x", tokenizer="t", samples=2, prompt_tokens=(1, 2), response_tokens=(1,))
