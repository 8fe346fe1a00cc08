"""What tests and benches of convergence learn: generated skills on a random frozen backbone, and real texts in few tokens."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from muxtune.policies.base import SystemState
from muxtune.policies.build import make_instance
from muxtune.sim.traces.workload import read_workload
from muxtune.spec.align import Alignment
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import even_layout
from muxtune.spec.plan import Plan

DIGITS = "0123456789"
SHARED = next((p / "shared/data" for p in Path(__file__).resolve().parents if (p / "shared/data/text").is_dir()), None)
TEXTS = ("boolq", "gsm8k", "openbookqa", "pubmedqa")
VOCAB = 1024
Rows = list[tuple[str, str]]


def reverse_rows(digits: int) -> Rows:
    """Every sequence of so many digits, and the same backwards."""
    return [(" ".join(x) + " =", " ".join(x[::-1])) for x in itertools.product(DIGITS, repeat=digits)]


def add_rows(digits: int) -> Rows:
    """Every sum of two numbers of so many digits; all numbers are written from their least digit on."""
    pairs = itertools.product(range(10**digits), repeat=2)
    return [(f"{_spaced(a, digits)} + {_spaced(b, digits)} =", _spaced(a + b, digits + 1)) for a, b in pairs]


def _spaced(number: int, digits: int) -> str:
    return " ".join(f"{number:0{digits}d}"[::-1])


def split(rows: Rows, held_out: int) -> tuple[Rows, Rows]:
    """Rows to train on and rows that are never seen, by a fixed shuffle."""
    mixed = list(rows)
    random.Random(0).shuffle(mixed)
    return mixed[held_out:], mixed[:held_out]


def write_rows(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """A text data set."""
    path.write_text("\n".join(json.dumps({"prompt": p, "response": r}) for p, r in rows))


def save_words(path: Path) -> None:
    """A tokenizer of digits, plus and equals, a token each."""
    import tokenizers  # noqa: PLC0415  # optional

    vocabulary = {word: i for i, word in enumerate([*DIGITS, "+", "=", "[UNK]"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(path))


def save_backbone(folder: Path, vocab: int = 16, positions: int = 32, hidden: int = 64, layers: int = 2) -> None:
    """A random LLaMA as a Hugging Face folder; weights N(0, 0.1²): with 0.02² its head could not favour any token by much."""
    import transformers  # noqa: PLC0415  # optional

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocab,
        max_position_embeddings=positions,
        initializer_range=0.1,
    )
    with torch.enable_grad():
        transformers.LlamaForCausalLM(config).float().save_pretrained(folder)


def save_text_tokenizer(path: Path, shared: Path) -> None:
    """GPT-2's own tokenizer cut to its first 1,024 tokens: 256 bytes and the first 768 merges."""
    import tokenizers  # noqa: PLC0415  # optional

    ids = json.loads((shared / "tokenizer/vocab.json").read_text())
    vocabulary = {token: number for token, number in ids.items() if number < VOCAB}
    lines = (shared / "tokenizer/merges.txt").read_text().splitlines()[1 : VOCAB - 256 + 1]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(path))


def save_texts(folder: Path, shared: Path, rows: int) -> None:
    """The tokenizer and the first rows of each text."""
    save_text_tokenizer(folder / "gpt2.json", shared)
    for name in TEXTS:
        lines = (shared / "text" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:rows]))


def text_tasks(steps: int, length: int, rate: float = 1e-3) -> list[dict[str, Any]]:
    """A LoRA on each text, of unequal rank, targets, dropout and global batch; one is SGD, two fall by a cosine."""
    cosine = {"schedule": {"kind": "cosine", "warmup_steps": 10, "final_share": 0.1}, "learning_rate": rate}
    own: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        ({"rank": 8}, cosine),
        ({"rank": 16}, {"learning_rate": rate}),
        ({"rank": 4, "targets": ["fc1", "fc2"]}, {"optimizer": "sgd", "learning_rate": 30 * rate}),
        ({"rank": 8, "dropout": 0.1}, cosine),
    )
    return [
        {
            "task_id": name,
            "dataset": f"{name}.jsonl@gpt2.json",
            "peft": {"kind": "lora", **peft},
            "global_batch_samples": 2 + i % 2,
            "billed_len_tokens": length,
            "steps": steps,
            **more,
        }
        for i, (name, (peft, more)) in enumerate(zip(TEXTS, own, strict=True))
    ]


def skill_task(name: str, steps: int, samples: int, rate: float, rank: int) -> dict[str, Any]:
    """A LoRA on every linear, its scale 1, its rate falling by a cosine to a twentieth."""
    return {
        "task_id": name,
        "dataset": f"{name}.jsonl@words.json",
        "peft": {"kind": "lora", "rank": rank, "alpha": rank},
        "global_batch_samples": samples,
        "learning_rate": rate,
        "steps": steps,
        "schedule": {"kind": "cosine", "warmup_steps": steps // 20, "final_share": 0.05},
    }


def plan_of(folder: Path, tasks: Sequence[dict[str, Any]], alignment: Alignment = "pad", pp: int = 1) -> Plan:
    """Write a workload file of these tasks on the backbone `model`; plan it as one hTask of one unit on ranks 0 to pp − 1."""
    path = folder / "work.json"
    path.write_text(json.dumps({"model": "model", "tasks": tasks}))
    workload, cluster = read_workload(path), parse_cluster("4xcpu")
    layout = even_layout(workload.model, pp=pp)
    state = SystemState(workload=workload, cluster=cluster, layout=layout, microbatches=1)
    instance = make_instance(state, "i", [[t.task_id for t in workload.tasks]], [[0]], alignment)
    return Plan(workload=workload, cluster=cluster, instances=(instance,))


def decoded_share(backbone: Path, adapter: Path, tokenizer: Path, rows: Rows) -> float:
    """Share of response tokens that greedy decoding from the prompt alone gets right, by transformers and peft.

    Prompts and responses of all rows must have equal lengths.
    """
    import peft  # noqa: PLC0415  # optional
    import tokenizers  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    encode = tokenizers.Tokenizer.from_file(str(tokenizer)).encode
    ids, wanted = (torch.tensor([encode(row[i]).ids for row in rows]) for i in (0, 1))
    base = transformers.LlamaForCausalLM.from_pretrained(backbone)
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        for _ in range(wanted.shape[1]):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return float((ids[:, -wanted.shape[1] :] == wanted).float().mean())
