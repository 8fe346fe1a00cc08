"""Texts as tokens: JSONL and parquet, bytes or a tokenizer file; the lengths that are planned with are those of the ids."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from muxtune.sim.traces.lengths import read_lengths
from muxtune.sim.traces.texts import read_token_ids
from muxtune.sim.traces.workload import read_workload
from muxtune.spec.errors import InputError

tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'muxtune[hf]'")

ROWS = [{"prompt": "two and two", "response": "four"}, {"prompt": "", "response": "two"}]
SHARED = next((p / "shared/data" for p in Path(__file__).resolve().parents if (p / "shared/data/text").is_dir()), None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vocabulary = {"[UNK]": 0, "two": 1, "and": 2, "four": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "words.json"))
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    pd.DataFrame(ROWS).to_parquet(tmp_path / "d.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_ids_of_a_tokenizer_and_of_bytes(folder: Path, name: str) -> None:
    found = [(p.tolist(), r.tolist()) for p, r in read_token_ids(folder / name, folder / "words.json")]
    assert found == [([1, 2, 1], [3]), ([], [1])]
    assert [r.tolist() for _, r in read_token_ids(folder / name, None)] == [list(b"four"), list(b"two")]


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_lengths_are_those_of_the_ids(folder: Path, name: str) -> None:
    found = read_lengths(folder / name, "words.json")
    assert (found.tokenizer, found.prompt_tokens, found.response_tokens) == ("words.json", (3, 0), (1, 1))


def test_a_workload_names_text_and_tokenizer(folder: Path) -> None:
    task = {"task_id": "t", "peft": {"kind": "lora"}, "dataset": "d.jsonl@words.json", "global_batch_samples": 2}
    (folder / "w.json").write_text(json.dumps({"model": "tiny-test", "tasks": [task]}))
    (lengths,) = read_workload(folder / "w.json").datasets
    assert (lengths.name, lengths.tokenizer, lengths.prompt_tokens) == ("d.jsonl@words.json", "words.json", (3, 0))


def test_wrong_files(folder: Path) -> None:
    (folder / "no.json").write_text("{}")
    with pytest.raises(InputError, match=r"no\.json: is no tokenizer file"):
        read_token_ids(folder / "d.jsonl", folder / "no.json")
    (folder / "bad.jsonl").write_text('{"prompt": "a", "response": 3}')
    with pytest.raises(InputError, match=r"bad\.jsonl: line 1: response = 3 is no text: give every line both texts"):
        read_token_ids(folder / "bad.jsonl", None)
    (folder / "empty.jsonl").write_text('{"prompt": "", "response": ""}')
    with pytest.raises(InputError, match=r"line 1: prompt and response are both empty"):
        read_token_ids(folder / "empty.jsonl", None)


@pytest.mark.skipif(SHARED is None, reason="needs shared/data beside the checkout")
@pytest.mark.parametrize("name", ["boolq", "openbookqa"])
def test_gpt2_tokens_of_real_texts_are_the_recorded_ones(name: str, tmp_path: Path) -> None:
    """The recorded lengths were counted by others; sample k of the texts is row `source_idx` of them."""
    assert SHARED is not None
    vocab, merges = str(SHARED / "tokenizer/vocab.json"), str(SHARED / "tokenizer/merges.txt")
    made = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocab, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(tmp_path / "gpt2.json"))
    path = SHARED / "text" / f"{name}.jsonl"
    found = read_token_ids(path, tmp_path / "gpt2.json")
    places = [json.loads(line)["source_idx"] for line in path.read_text().splitlines()]
    recorded = pd.read_parquet(SHARED / "lengths" / f"{name}.parquet")
    by_place = recorded.set_index("source_idx") if "source_idx" in recorded else recorded
    expected = by_place.loc[places]
    assert [len(p) for p, _ in found] == expected["prompt_tokens"].tolist()
    assert [len(r) for _, r in found] == expected["response_tokens"].tolist()
