"""Convergence: multiplexed and solo training on real texts have one curve; a frozen random backbone learns skills by LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from muxtune.executor.group import WorkerGroup
from muxtune.executor.messages import Feed
from muxtune.executor.session import Session
from muxtune.experiments.commands import export
from muxtune.experiments.commands.feed import read_feed
from muxtune.spec.plan import Plan
from tests.learning import (
    SHARED,
    TEXTS,
    add_rows,
    decoded_share,
    plan_of,
    reverse_rows,
    save_backbone,
    save_texts,
    save_words,
    skill_task,
    split,
    text_tasks,
    write_rows,
)

pytest.importorskip("transformers", reason="needs transformers: pip install 'muxtune[hf]'")
pytest.importorskip("peft", reason="needs peft: pip install 'muxtune[hf]'")
pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'muxtune[hf]'")
pytestmark = pytest.mark.dist

TEXT_STEPS, SKILL_STEPS = 200, 240


@pytest.fixture
def fed(workers: WorkerGroup) -> Iterator[WorkerGroup]:
    """Workers that forget their texts and weights afterwards."""
    yield workers
    workers.ask(Feed())


def trained(workers: WorkerGroup, folder: Path, plan: Plan, steps: int) -> Session:
    """A session on the backbone and texts of a folder, after so many steps."""
    workers.ask(read_feed(folder / "model", folder, [plan.workload]))
    session = Session(workers, plan, 0, folder / "state")
    for _ in range(steps):
        session.iterate()
    return session


def curve(session: Session, task: str) -> np.ndarray:
    return np.array([r.loss for r in session.curves()[task]])


@pytest.mark.skipif(SHARED is None, reason="needs shared/data with text/ and tokenizer/ in a folder above this file")
def test_curves_of_four_tasks_on_real_texts_are_those_of_each_alone(fed: WorkerGroup, tmp_path: Path) -> None:
    """All four packed into one hTask over two pipeline stages, against each alone on one rank and padded.

    The learning rate is one at which rounding does not grow; docs/training.md says where it does.
    """
    assert SHARED is not None
    save_backbone(tmp_path / "model", vocab=1024, positions=64)
    save_texts(tmp_path, SHARED, rows=300)
    tasks = text_tasks(TEXT_STEPS, length=64)
    together = trained(fed, tmp_path, plan_of(tmp_path, tasks, "varlen", pp=2), TEXT_STEPS)
    for name, task in zip(TEXTS, tasks, strict=True):
        alone = curve(trained(fed, tmp_path, plan_of(tmp_path, [task]), TEXT_STEPS), name)
        assert len(alone) == TEXT_STEPS
        assert curve(together, name) == pytest.approx(alone, abs=1e-4)
        assert alone[-20:].mean() < alone[:20].mean() - 0.2, name


def test_a_frozen_random_backbone_learns_to_reverse_and_to_add(fed: WorkerGroup, tmp_path: Path) -> None:
    """Greedy decoding by transformers and peft: 200 sequences that were never trained on, and the whole table of sums."""
    save_words(tmp_path / "words.json")
    save_backbone(tmp_path / "model")
    seen, unseen = split(reverse_rows(3), held_out=200)
    sums = add_rows(1)
    write_rows(tmp_path / "reverse.jsonl", seen)
    write_rows(tmp_path / "add.jsonl", sums)
    tasks = [skill_task(name, SKILL_STEPS, 16, 6e-3, rank=32) for name in ("add", "reverse")]
    trained(fed, tmp_path, plan_of(tmp_path, tasks, "varlen"), SKILL_STEPS).save()
    for name, rows in (("reverse", unseen), ("add", sums)):
        export.run(tmp_path / "state", name, tmp_path / name)
        assert decoded_share(tmp_path / "model", tmp_path / name, tmp_path / "words.json", rows) > 0.95, name
