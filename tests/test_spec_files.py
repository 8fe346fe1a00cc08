"""Files: YAML and JSON traps, one sentence an error, nouns that survive their file."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from muxtune.spec.cluster import Cluster, parse_cluster
from muxtune.spec.errors import InputError
from muxtune.spec.files import json_schema, read_data, read_noun, validate, write_noun, write_text
from muxtune.spec.noun import canonical_bytes, digest
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Plan
from muxtune.spec.task import Task, Workload

TASK = """task_id: a
peft: {kind: lora, rank: 8}
dataset: sst2
billed_len_tokens: 64
global_batch_samples: 4
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a text to a file with the given suffix and says where."""

    def to_file(text: str | bytes, suffix: str = ".yaml") -> Path:
        path = tmp_path / f"task{suffix}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return to_file


def complaint(noun: Any, path: Path) -> str:
    """The error of reading a noun, without the file name that it must start with."""
    with pytest.raises(InputError) as caught:
        read_noun(noun, path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


def test_a_task(write: Any) -> None:
    task = read_noun(Task, write(TASK))
    assert task == Task(task_id="a", peft=LoRA(rank=8), dataset="sst2", billed_len_tokens=64, global_batch_samples=4)


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("steps: 010", "steps", 10),  # YAML 1.1: 8
        ("steps: 08", "steps", 8),  # YAML 1.1: a text
        ("steps: +7", "steps", 7),
        ("learning_rate: 1e-3", "learning_rate", 1e-3),  # YAML 1.1: a text
        ("learning_rate: 1e9", "learning_rate", 1e9),  # YAML 1.1: a text
        ("learning_rate: 1", "learning_rate", 1.0),
        ("tenant: no", "tenant", "no"),  # YAML 1.1: False
        ("tenant: 12:30", "tenant", "12:30"),  # YAML 1.1: 750
        ("tenant: 2026-01-01", "tenant", "2026-01-01"),  # YAML 1.1: a date
        ("deadline_ns:", "deadline_ns", None),
        ("deadline_ns: ~", "deadline_ns", None),
        ("steps: &x 7\narrival_ns: *x", "arrival_ns", 7),
    ],
)
def test_values_that_yaml_1_1_would_change(line: str, field: str, value: Any, write: Any) -> None:
    found = getattr(read_noun(Task, write(f"{TASK}{line}\n")), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("steps: 1e9", "steps = 1000000000.0: Input should be a valid integer"),
        ("steps: 4.0", "steps = 4.0: Input should be a valid integer"),
        ('steps: "4"', 'steps = "4": Input should be a valid integer'),
        ("steps: true", "steps = true: Input should be a valid integer"),
        ("steps: 12:30", 'steps = "12:30": Input should be a valid integer'),
        ("steps: 0x10", 'steps = "0x10": Input should be a valid integer'),
        ("tenant: 5", "tenant = 5: Input should be a valid string"),
        ("learning_rate: .nan", 'learning_rate = ".nan": Input should be a valid number'),
        ("learning_rate: NaN", 'learning_rate = "NaN": Input should be a valid number'),
        ("learning_rate: 0", "top level: learning_rate=0.0: must be above 0"),
        ("steps: -5", "top level: steps=-5: must be at least 1"),
        ("rnak: 5", "rnak = 5: unknown key: remove it or correct its spelling"),
        ("<<: {steps: 5}", '<< = {"steps": 5}: unknown key: remove it or correct its spelling'),
        ("steps: 5\nsteps: 6", "line 7: key 'steps' occurs twice: remove one"),
        ("? [a]\n: b", "line 6: key ['a'] is no text: write a plain key"),
        ("steps: [", "line 7: malformed YAML: expected the node content, but found '<stream end>'"),
        ("--- more", "line 6: malformed YAML: but found another document"),
        ("steps: !!int x", "holds a value that cannot be read: invalid literal for int() with base 10: 'x'"),
        ("!!python/name:os.system : 1", "malformed YAML: could not determine a constructor for the tag"),
    ],
)
def test_wrong_lines(line: str, message: str, write: Any) -> None:
    assert message in complaint(Task, write(f"{TASK}{line}\n"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("samples: 4", "samples: -4", "top level: global_batch_samples=-4: must be at least 1"),
        ("rank: 8", "rnak: 8", "peft.rnak = 8: unknown key: remove it or correct its spelling"),
        ("rank: 8", "rank: 0", "rank=0: must be at least 1"),
        (
            "rank: 8",
            "targets: [qkv, up]",
            "targets=['qkv', 'up']: name each of ['qkv', 'proj', 'fc1', 'fc2'] at most once",
        ),
        ("kind: lora", "kind: lorra", 'peft.kind = "lorra": unknown: known are '),
        ("kind: lora, ", "", "peft.kind: is missing: add it, one of "),
        ("dataset: sst2\n", "", "dataset: is missing: add it"),
        ("dataset: sst2\nbilled_len_tokens: 64\n", "", "dataset: is missing: add it (and 1 more)"),
    ],
)
def test_wrong_tasks(old: str, new: str, message: str, write: Any) -> None:
    assert old in TASK
    assert message in complaint(Task, write(TASK.replace(old, new)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"steps": NaN}', "holds a value that JSON does not have"),
        ('{"task_id": "a", "task_id": "b"}', "key 'task_id' occurs twice: remove one"),
        ('{"task_id": 1,}', "line 1: malformed JSON"),
        ("", "line 1: malformed JSON: Expecting value"),
        ("[]", "top level = []: Input should be an object"),
        ("[" * 100_000, "holds a value that cannot be read: maximum recursion depth exceeded"),
        ("9" * 5000, "holds a value that cannot be read: Exceeds the limit"),
    ],
)
def test_wrong_json(text: str, message: str, write: Any) -> None:
    assert message in complaint(Task, write(text, ".json"))


def test_files_that_are_not_there_or_not_text(write: Any, tmp_path: Path) -> None:
    assert complaint(Task, tmp_path / "absent.yaml") == "file not found"
    assert "cannot be read as UTF-8 text" in complaint(Task, write(b"\xff\xfe\x00"))
    assert complaint(Task, tmp_path) == "is a directory: give the name of a file"
    assert complaint(Task, write("")) == "top level = null: Input should be an object"


def test_yaml_and_json_mean_the_same(write: Any) -> None:
    data = read_data(write(TASK))
    assert read_noun(Task, write(json.dumps(data), ".json")) == read_noun(Task, write(TASK))


def test_infinity_is_refused_wherever_it_stands(write: Any) -> None:
    with pytest.raises(InputError, match="place: learning_rate = inf: holds a value that JSON does not have"):
        validate(Task, {"learning_rate": float("inf")}, "place")
    with pytest.raises(InputError, match=r"place: tasks\.1\.peft\.alpha = nan: holds"):
        validate(Workload, {"tasks": [{"steps": 1}, {"peft": {"alpha": float("nan")}}]}, "place")


def test_nouns_survive_their_files(tiny_workload: Any, tiny_state: Any, hand_plan: Any, tmp_path: Path) -> None:
    plan = hand_plan(tiny_state(pp=2), [["t0", "t1"], ["t2"], ["t3"]])
    for noun, value in ((Workload, tiny_workload(3)), (Cluster, parse_cluster("8x2xA40-ib")), (Plan, plan)):
        path = tmp_path / "noun.json"
        write_noun(value, path)
        again = read_noun(noun, path)
        assert again == value
        assert canonical_bytes(again) == canonical_bytes(value)
        assert digest(again) == digest(value)


def test_a_plan_of_another_version_is_refused(tiny_state: Any, hand_plan: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_noun(hand_plan(tiny_state(), [["t0", "t1", "t2", "t3"]]), path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 2', 1))
    assert complaint(Plan, path).endswith("version=2: this muxtune reads version 1")


def test_a_deep_error_names_its_path(tiny_state: Any, hand_plan: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_noun(hand_plan(tiny_state(), [["t0", "t1", "t2", "t3"]]), path)
    data = json.loads(path.read_text())
    data["instances"][0]["buckets"][0]["units"][1]["parts"][0]["slots"][0] = "x"
    path.write_text(json.dumps(data))
    assert complaint(Plan, path) == (
        'instances.0.buckets.0.units.1.parts.0.slots.0 = "x": Input should be a valid integer'
    )


def test_a_killed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file.json"
    write_text(path, "old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    (tmp_path / "link").symlink_to(kept)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, reason in (("link", "symbolic link"), ("pipe", "no regular file"), ("folder", "a directory")):
        with pytest.raises(InputError, match=reason):
            write_text(tmp_path / name, "new")
    with pytest.raises(InputError, match="/dev/null: is no regular file"):
        write_text(Path("/dev/null"), "new")
    assert kept.read_text() == "kept"
    assert (tmp_path / "link").is_symlink()


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"file\.json: cannot be written: No space left on device: make room"):
        write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
    assert path.read_text() == "old"


def test_schema_names_every_field() -> None:
    schema = json_schema(Plan)
    assert set(schema["properties"]) == set(Plan.__dataclass_fields__)
    assert schema["additionalProperties"] is False


def test_the_task_rules_of_a_workload(tiny_workload: Any) -> None:
    workload = tiny_workload(2)
    first, second = workload.tasks
    for tasks, message in (
        ((), "a workload has at least one task"),
        ((first, first), "task_id 't0' occurs 2 times"),
        ((replace(second, dataset="gsm8k"),), "dataset 'gsm8k' stands 0 times in datasets"),
        ((replace(first, billed_len_tokens=1024),), "billed_len_tokens=1024 exceeds the 512 positions of tiny-llama"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(workload, tasks=tasks)
