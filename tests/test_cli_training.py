"""`muxtune execute` as a trainer: tasks that come and go, checkpoints, metrics, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muxtune.experiments.main import main

WORKLOAD = """
model: tiny-test
tasks:
  - {task_id: a, dataset: sst2, global_batch_samples: 4, peft: {kind: lora, rank: 8}}
  - {task_id: b, dataset: openbookqa, global_batch_samples: 4, peft: {kind: lora, rank: 16}}
  - {task_id: c, dataset: rte, global_batch_samples: 2, peft: {kind: lora, rank: 8}}
"""
LATE = (
    "model: tiny-test\ntasks: [{task_id: late, peft: {kind: lora}, dataset: sst2, global_batch_samples: 1, steps: 2}]"
)


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    """A folder with a plan for one rank."""
    monkeypatch.chdir(tmp_path)
    Path("work.yaml").write_text(WORKLOAD)
    Path("late.yaml").write_text(LATE)
    assert main(["plan", "--workload", "work.yaml", "--cluster", "1xcpu", "--policy", "muxtune"]) == 0
    capsys.readouterr()
    return tmp_path


def refused(capsys, *words):
    said = capsys.readouterr()
    assert said.out == ""
    line = said.err.splitlines()[-1]
    assert line.startswith("muxtune: error: ")
    for word in words:
        assert word in line


@pytest.mark.dist
def test_training_changes_its_tasks_saves_and_goes_on(folder, capsys):
    changes = ("--join", "1:late.yaml", "--leave", "2:b", "--replan", "muxtune", "--deterministic")
    saving = ("--checkpoint", "state", "--every", "2", "--out", "run")
    assert main(["execute", "plan.json", "--iterations", "4", "--json", *changes, *saving]) == 0
    said = capsys.readouterr()
    body = json.loads(said.out)
    assert "iteration 4/4" in said.err
    assert "before iteration 1: late joined" in said.err
    assert {t: len(x) for t, x in body["losses"].items()} == {"a": 4, "b": 2, "c": 4, "late": 2}
    assert [(x["iteration"], x["joined"], x["left"]) for x in body["replans"]] == [
        (1, ["late"], []),
        (2, [], ["b"]),
        (3, [], ["late"]),
    ]
    assert all(x["plan_seconds"] > 0 and x["apply_seconds"] > 0 for x in body["replans"])
    assert sorted(p.name for p in Path("state").iterdir()) == [
        *(f"iteration-{n:08d}" for n in (2, 4)),
        "lock",
        "tasks",
    ]
    assert sorted(p.name for p in Path("state/tasks").iterdir()) == ["b", "late"]
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [x["kind"] for x in lines].count("step") == 12
    assert {x["kind"] for x in lines} == {"step", "replan", "checkpoint"}
    assert main(["execute", "plan.json", *saving]) == 2
    refused(capsys, "state: holds iteration-00000004", "--resume")
    assert main(["execute", "plan.json", "--seed", "1", "--resume", *saving]) == 2
    refused(capsys, "seed 0", "seed 1")


@pytest.mark.dist
def test_a_task_of_one_run_goes_on_in_another(folder, capsys):
    Path("longer.yaml").write_text(LATE.replace("steps: 2", "steps: 4"))
    plan_late = ("plan", "--workload", "longer.yaml", "--cluster", "1xcpu", "--policy", "muxtune", "--out", "late.json")
    assert main(plan_late) == 0
    capsys.readouterr()
    saving = ("--checkpoint", "state", "--every", "3")
    assert main(["execute", "late.json", "--iterations", "4", "--json", *saving]) == 0
    uninterrupted = json.loads(capsys.readouterr().out)["losses"]["late"]
    joining = ("--join-from", "1:late=state/iteration-00000003", "--replan", "muxtune")
    assert main(["execute", "plan.json", "--iterations", "3", "--json", *joining]) == 0
    body = json.loads(capsys.readouterr().out)
    assert [(x["iteration"], x["joined"], x["continued"], x["left"]) for x in body["replans"]] == [
        (1, ["late"], ["late"], []),
        (2, [], [], ["late"]),
    ]
    assert body["losses"]["late"][:3] == uninterrupted[:3]
    assert body["losses"]["late"] == pytest.approx(uninterrupted, abs=1e-5)
    assert main(["execute", "plan.json", "--seed", "1", *joining]) == 2
    refused(capsys, "state/iteration-00000003", "run with --seed 0")
    assert main(["execute", "plan.json", "--join-from", "1:late=state", "--replan", "muxtune"]) == 2
    refused(capsys, "state/iteration-00000004", "taken all its 4 steps")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--join", "1:late.yaml"), ["--join 1:late.yaml", "--replan"]),
        (("--join-from", "1:a=state"), ["--join-from 1:a=state", "--replan"]),
        (("--join-from", "1:a", "--replan", "muxtune"), ["--join-from 1:a", "N:TASK=DIR"]),
        (("--join-from", "1:a=gone", "--replan", "muxtune"), ["gone: holds no checkpoint"]),
        (("--leave", "b"), ["--leave 'b'", "N:TASK"]),
        (("--leave", "9:b"), ["--leave 9:b", "iterations 0 to 4"]),
        (("--leave", "1:x"), ["--leave 1:x", "known are a, b, c"]),
        (("--resume",), ["--resume", "--checkpoint DIR"]),
        (("--trace", "/dev/null"), ["--trace", "/dev/null", "no regular file"]),
        (("--layer-spec", "fast"), ["--layer-spec 'fast'", "auto, te, local"]),
    ],
)
def test_execute_refuses_options_before_it_starts_anything(folder, capsys, options, words):
    assert main(["execute", "plan.json", *options]) == 2
    refused(capsys, *words)
