"""`make convergence`: how far multiplexed curves lie from solo ones on real texts, rate by rate; skills on unseen rows."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muxtune.executor.group import WorkerGroup
from muxtune.executor.messages import Call
from muxtune.executor.session import NAME, Session
from muxtune.experiments.commands import execute, export
from muxtune.experiments.commands.feed import read_feed
from muxtune.spec.files import write_noun
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

STEPS, LENGTH, ROWS = 300, 128, 1000
RATES = (1e-3, 2e-3, 5e-3)
#: Skill: all its rows, optimizer steps, samples a step, learning rate.
SKILLS = {"reverse": (reverse_rows(4), 600, 32, 4e-3), "add": (add_rows(2), 3000, 32, 4e-3)}
HELD_OUT = 500
Curve = NDArray[np.float64]


def nudge(worker: Any, name: str) -> None:
    """Move every adapter of a loaded plan by two units in the last place: what rounding does, and nothing else."""
    for state in worker.loaded[name].tasks.values():
        for parameter in state.parameters:
            parameter.mul_(1 + 2**-22)


def alone(group: WorkerGroup, folder: Path, plan: Plan, nudged: bool) -> Curve:
    """The curve of a plan's one task."""
    group.ask(read_feed(folder / "model", folder, [plan.workload]))
    session = Session(group, plan, 0)
    if nudged:
        group.ask(Call(function="tests.bench_convergence:nudge", arguments=(NAME,)))
    for _ in range(STEPS):
        session.iterate()
    (curve,) = session.curves().values()
    return np.array([r.loss for r in curve])


def apart(one: Curve, other: Curve) -> str:
    """Largest distance, and the first step at which it passes 1e-4."""
    distance = np.abs(one - other)
    beyond = np.flatnonzero(distance > 1e-4)
    return f"{distance.max():.1e} (1e-4 " + (f"passed at step {beyond[0]})" if len(beyond) else "never passed)")


def text_lines(folder: Path, shared: Path) -> Iterator[str]:
    """Four tasks in one hTask by `execute --data` against each alone, padded; beside it two solo runs a nudge apart."""
    save_backbone(folder / "model", vocab=1024, positions=LENGTH)
    save_texts(folder, shared, ROWS)
    training = execute.TrainOptions(backbone=folder / "model", data=folder)
    for rate in RATES:
        tasks = text_tasks(STEPS, LENGTH, rate)
        write_noun(plan_of(folder, tasks, "varlen"), folder / "plan.json")
        body = execute.run(folder / "plan.json", iterations=STEPS, training=training)
        with WorkerGroup(1) as group:
            for name, task in zip(TEXTS, tasks, strict=True):
                plan = plan_of(folder, [task])
                solo, nudged = (alone(group, folder, plan, x) for x in (False, True))
                yield (
                    f"rate {rate}, {name}, {STEPS} steps: loss {solo[:20].mean():.3f} to {solo[-20:].mean():.3f}; multiplexed "
                    f"and solo apart by {apart(np.array(body['losses'][name]), solo)}, solo and nudged solo by "
                    f"{apart(nudged, solo)}"
                )


def skill_lines(folder: Path) -> Iterator[str]:
    """Greedy decoding of prompts that were never trained on."""
    save_words(folder / "words.json")
    save_backbone(folder / "model")
    for name, (rows, steps, samples, rate) in SKILLS.items():
        seen, unseen = split(rows, HELD_OUT)
        write_rows(folder / f"{name}.jsonl", seen)
        plan = plan_of(folder, [skill_task(name, steps, samples, rate, rank=64)], "varlen")
        write_noun(plan, folder / "plan.json")
        training = execute.TrainOptions(
            backbone=folder / "model", data=folder, checkpoint=folder / name, every=steps, keep=1
        )
        execute.run(folder / "plan.json", iterations=steps, training=training)
        export.run(folder / name, name, folder / f"{name}-adapter")
        share = decoded_share(folder / "model", folder / f"{name}-adapter", folder / "words.json", unseen)
        yield (
            f"{name}, {len(seen)} rows seen, {steps} steps of {samples}: {100 * share:.1f} % of the response tokens of "
            f"{HELD_OUT} unseen rows decoded"
        )


def main() -> None:
    """Print every line as it is known."""
    for make in (
        skill_lines,
        lambda folder: text_lines(folder, SHARED) if SHARED else iter(["no shared/data: no texts"]),
    ):
        with tempfile.TemporaryDirectory() as folder:
            for line in make(Path(folder)):
                sys.stdout.write(line + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
