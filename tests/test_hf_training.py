"""From a Hugging Face folder and texts to an adapter for peft: planned, trained on two ranks, exported, with equal losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from muxtune.executor.data import predicted_positions, token_source
from muxtune.executor.rows import whole_rows
from muxtune.experiments.commands import execute, export
from muxtune.experiments.commands.feed import read_feed
from muxtune.experiments.commands.inputs import read_plan
from muxtune.experiments.commands.plan import run as plan_run
from muxtune.experiments.commands.problem import Options
from muxtune.spec.bind import bind
from muxtune.spec.errors import InputError
from muxtune.spec.plan import Plan

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'muxtune[hf]'")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'muxtune[hf]'")
tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'muxtune[hf]'")

pytestmark = pytest.mark.dist
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "plus", "minus", "is"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a tokenizer, two text data sets, a workload of two tasks, its plan on two ranks."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    with torch.enable_grad():
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            max_position_embeddings=64,
        )
        transformers.LlamaForCausalLM(config).float().save_pretrained(folder / "model")
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "words.json"))
    for name, sign in (("add", "plus"), ("sub", "minus")):
        rows = [{"prompt": f"{a} {sign} {b} is", "response": f"{b} {a}"} for a in WORDS[:4] for b in WORDS[4:8]]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = [
        {
            "task_id": name,
            "peft": {"kind": "lora", "rank": 4, "targets": targets},
            "dataset": f"{name}.jsonl@words.json",
            "global_batch_samples": 4,
            "learning_rate": 0.01,
        }
        for name, targets in (("add", ["qkv", "fc2"]), ("sub", ["proj", "fc1"]))
    ]
    (folder / "w.json").write_text(json.dumps({"model": str(folder / "model"), "tasks": tasks}))
    options = Options(pp=2, microbatches=(2,), cost="roofline")
    plan_run(folder / "w.json", "2xcpu", "muxtune", folder / "plan.json", options)
    return folder


@pytest.fixture(scope="module")
def trained(home: Path) -> dict[str, Any]:
    training = execute.TrainOptions(backbone=home / "model", data=home, checkpoint=home / "state", every=3)
    return execute.run(home / "plan.json", iterations=4, training=training)


def expected_losses(home: Path, model: Any, plan: Plan, step: int) -> dict[str, float]:
    """Losses of a step by transformers: each sample alone, Σ over response tokens / their number in the global batch."""
    program = bind(plan, seed=0, steps=1, first_step=step).program
    tokens = token_source(plan.workload, read_feed(None, home, [plan.workload]).texts)
    sums: dict[str, list[float]] = {}
    for (_, task, _), row in whole_rows(program.units).items():
        ids = torch.as_tensor(tokens(row))
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        places = list(predicted_positions(row))
        loss = F.cross_entropy(logits[places], ids[[p + 1 for p in places]], reduction="sum")
        total = sums.setdefault(task, [0.0, 0.0])
        total[0] += float(loss)
        total[1] += len(places)
    return {task: loss / count for task, (loss, count) in sums.items()}


def test_the_model_of_a_folder_is_planned_for(home: Path) -> None:
    plan = read_plan(home / "plan.json")
    assert (plan.workload.model.layers, plan.workload.model.vocab) == (2, 64)
    assert {d.tokenizer for d in plan.workload.datasets} == {"words.json"}


def test_first_losses_are_those_of_transformers(home: Path, trained: dict[str, Any]) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(home / "model")
    expected = expected_losses(home, model, read_plan(home / "plan.json"), step=0)
    assert {t: losses[0] for t, losses in trained["losses"].items()} == pytest.approx(expected, rel=1e-5)
    assert trained["texts"] == ["add.jsonl@words.json", "sub.jsonl@words.json"]
    assert trained["backbone"] == str(home / "model")
    assert all(losses[-1] < losses[0] for losses in trained["losses"].values())


def test_an_exported_task_goes_on_alike_in_peft(home: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint after three steps: its loss on the fourth step's samples is the one that training saw."""
    plan = read_plan(home / "plan.json")
    newest = sorted(p for p in (home / "state").iterdir() if p.name.startswith("iteration-"))
    after = int(newest[-1].name.removeprefix("iteration-"))
    checkpoint = next(p for p in newest if p.name.endswith("3"))
    assert after >= 3
    for task in ("add", "sub"):
        body = export.run(checkpoint, task, tmp_path / task, backbone=str(home / "model"))
        assert (body["architecture"], body["steps"]) == ("llama", 3)
        base = transformers.LlamaForCausalLM.from_pretrained(home / "model")
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / task)
        assert trained["losses"][task][3] == pytest.approx(expected_losses(home, adapted, plan, 3)[task], rel=1e-5)


class TestRefusals:
    def test_data(self, home: Path, tmp_path: Path) -> None:
        workload = read_plan(home / "plan.json").workload
        with pytest.raises(InputError, match="no such folder"):
            read_feed(None, home / "gone", [workload])
        with pytest.raises(
            InputError, match=r"add\.jsonl does not exist: give the folder that the workload was read in"
        ):
            read_feed(None, tmp_path, [workload])
        for name in ("words.json", "sub.jsonl", "add.jsonl"):
            (tmp_path / name).write_bytes((home / name).read_bytes())
        with (tmp_path / "add.jsonl").open("a") as file:
            file.write('\n{"prompt": "one", "response": "two"}')
        with pytest.raises(InputError, match=r"add\.jsonl: its samples have other lengths than the plan's"):
            read_feed(None, tmp_path, [workload])

    def test_export(self, home: Path, trained: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"has no task 'mul': it has add, sub"):
            export.run(home / "state", "mul", tmp_path)
        with pytest.raises(InputError, match="holds no checkpoint"):
            export.run(tmp_path, "add", tmp_path / "out")
