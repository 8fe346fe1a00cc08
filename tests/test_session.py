"""Sessions on real workers: tasks join and leave without a trace, bad steps are left out, checkpoints give every bit back."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muxtune.executor.checkpoint import (
    Manifest,
    TaskSteps,
    checkpoints,
    find_task,
    iteration_folder,
    newest_checkpoint,
    prune_checkpoints,
    write_checkpoint,
)
from muxtune.executor.group import WorkerGroup
from muxtune.executor.messages import Inspect, Inspection, Poison
from muxtune.executor.reports import StepReport
from muxtune.executor.saved_tasks import require_goes_on
from muxtune.executor.session import NAME, Session
from muxtune.executor.tensor_files import write_tensors
from muxtune.policies.base import SystemState
from muxtune.policies.build import make_instance
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.errors import InputError
from muxtune.spec.files import write_noun
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Plan
from muxtune.spec.schedule import Schedule, learning_rate
from muxtune.spec.task import Task, Workload

pytestmark = pytest.mark.dist

Place = tuple[WorkerGroup, Layout]
Curves = Mapping[str, list[StepReport]]


def make_task(task_id: str, **changes: Any) -> Task:
    base: dict[str, Any] = {"dataset": "sst2", "billed_len_tokens": 16, "learning_rate": 1e-2, "peft": LoRA(rank=4)}
    return Task(**{"task_id": task_id, "global_batch_samples": 2, **base, **changes})


A = make_task("a", schedule=Schedule(kind="cosine", warmup_steps=2, final_share=0.1), steps=8)
B = make_task("b", global_batch_samples=3, optimizer="sgd", weight_decay=0.01)
C = make_task("c", peft=LoRA(rank=2, targets=("qkv", "fc2")), billed_len_tokens=24, loss_scale=256.0)


def make_plan(layout: Layout, *groups: tuple[Task, ...], model: str = "tiny-test") -> Plan:
    """One hTask and one bucket a group."""
    tasks = tuple(sorted((t for g in groups for t in g), key=lambda t: t.task_id))
    workload = Workload(name="w", model=model_preset(model), datasets=(embedded_length("sst2"),), tasks=tasks)
    cluster = parse_cluster("4xcpu")
    state = SystemState(workload=workload, cluster=cluster, layout=layout, microbatches=2)
    names = [[t.task_id for t in g] for g in groups]
    instance = make_instance(state, "i", names, [[i] for i in range(len(groups))])
    return Plan(workload=workload, cluster=cluster, instances=(instance,))


LAYOUTS = {"1 rank": {}, "pp=2": {"pp": 2}, "tp=2": {"tp": 2}, "dp=2": {"dp": 2}}


@pytest.fixture(params=LAYOUTS)
def place(request: pytest.FixtureRequest, workers: WorkerGroup) -> Place:
    return workers, even_layout(model_preset("tiny-test"), **LAYOUTS[request.param])


def look(workers: WorkerGroup) -> list[Inspection]:
    """What the ranks hold; those without a part of the plan are left out."""
    return [i for i in workers.ask(Inspect(name=NAME, state=True, backbone=True)) if i.reports]


def assert_same(one: list[Inspection], other: list[Inspection], tasks: str) -> None:
    """Backbones, parameters and optimizer states of these tasks agree in every bit."""
    for here, there in zip(one, other, strict=True):
        assert here.backbones == there.backbones
        for task in tasks:
            for mine, theirs in ((here.state, there.state), (here.optimizer, there.optimizer)):
                assert mine[task].keys() == theirs[task].keys()
                assert mine[task]
                for name, tensor in mine[task].items():
                    assert np.array_equal(tensor, theirs[task][name]), (task, name)


def run(session: Session, iterations: int) -> Session:
    for _ in range(iterations):
        session.iterate()
    return session


def losses(curves: Curves) -> dict[str, list[float | None]]:
    return {task: [r.loss for r in reports] for task, reports in curves.items()}


def test_tasks_join_and_leave_without_a_trace(place: Place) -> None:
    workers, layout = place
    session = run(Session(workers, make_plan(layout, (A,), (B,)), seed=3), 2)
    before = look(workers)
    joined = session.register_tasks(make_plan(layout, (A,), (B,), (C,)))
    assert (joined.iteration, joined.joined, joined.left) == (2, ("c",), ())
    assert_same(before, look(workers), "ab")
    run(session, 2)
    before = look(workers)
    assert session.remove_task("b").left == ("b",)
    assert_same(before, look(workers), "ac")
    run(session, 2)
    mixed, after = losses(session.curves()), look(workers)
    # Every hTask holds one task: what the others did cannot have touched a single bit of it.
    for task, steps in ((A, 6), (B, 4), (C, 4)):
        alone = run(Session(workers, make_plan(layout, (task,)), seed=3), steps)
        assert losses(alone.curves())[task.task_id] == mixed[task.task_id]
        if task is not B:
            assert_same(after, look(workers), task.task_id)


def test_a_saved_task_goes_on_inside_another_run_as_if_it_had_never_stopped(place: Place, tmp_path: Path) -> None:
    """`a` (schedule, AdamW) and `c` (loss scale) are saved by runs of their own and meet `b` in a third."""
    workers, layout = place
    whole = run(Session(workers, make_plan(layout, (A, B)), seed=3), 5)
    wanted, state = losses(whole.curves())["a"], look(workers)
    first = run(Session(workers, make_plan(layout, (A,), (C,)), seed=3, checkpoint=tmp_path / "one"), 2)
    first.save()
    first.remove_task("c")
    saved = {t: find_task(tmp_path / "one", t) for t in "ac"}
    assert [saved[t].folder.name for t in "ac"] == ["iteration-00000002", "c"]
    third = run(Session(workers, make_plan(layout, (B,)), seed=3, checkpoint=tmp_path / "third"), 2)
    report = third.register_tasks(make_plan(layout, (A, B), (C,)), saved=saved)
    assert (report.joined, report.continued) == (("a", "c"), ("a", "c"))
    run(third, 1).save()
    run(third, 2)
    found = losses(third.curves())
    assert found["a"] == pytest.approx(wanted, abs=1e-6)
    for here, there in zip(look(workers), state, strict=True):
        for name, tensor in there.state["a"].items():
            assert here.state["a"][name] == pytest.approx(tensor, abs=1e-6)
    # In an hTask of its own no bit differs, and the run that took it in resumes like any other.
    assert found["c"] == losses(run(Session(workers, make_plan(layout, (C,)), seed=3), 5).curves())["c"]
    newest = newest_checkpoint(tmp_path / "third")
    assert newest is not None
    assert losses(run(Session.resume(workers, newest, tmp_path / "third"), 2).curves()) == found


def test_a_saved_task_that_cannot_go_on_is_refused(place: Place, tmp_path: Path) -> None:
    workers, layout = place
    short = replace(A, steps=3)
    run(Session(workers, make_plan(layout, (short,), (C,)), seed=3, checkpoint=tmp_path), 3).save()
    saved = {t: find_task(tmp_path, t) for t in "ac"}
    model = make_plan(even_layout(model_preset("tiny-gpt2")), (C,), model="tiny-gpt2")
    other = make_plan(even_layout(model_preset("tiny-test"), tp=1 if layout.tp > 1 else 2), (C,))
    for task, plan, seed, reason in (
        ("a", make_plan(layout, (short,)), 3, "taken all its 3 steps"),
        ("c", make_plan(layout, (C,)), 4, "trained with seed 3: run with --seed 3"),
        ("c", model, 3, "trained on tiny-test, this run trains tiny-gpt2"),
        ("c", other, 3, f"saved with tp={layout.tp}, this run has tp={3 - layout.tp}"),
    ):
        with pytest.raises(InputError, match=reason):
            require_goes_on({task: saved[task]}, plan, seed)
    changed = make_plan(layout, (B,), (replace(C, learning_rate=1.0),))
    session = Session(workers, make_plan(layout, (B,)), seed=3)
    with pytest.raises(InputError, match="task c differs from the one that was saved"):
        session.register_tasks(changed, saved={"c": saved["c"]})
    with pytest.raises(InputError, match="has no task 'x': it has a, c"):
        find_task(tmp_path, "x")


def test_a_task_of_another_backbone_copy_stays_when_the_first_copy_goes(place: Place) -> None:
    workers, layout = place
    whole = make_plan(layout, (A,), (B,))
    alone = [make_plan(layout, (t,)).instances[0] for t in (A, B)]
    plan = replace(whole, instances=tuple(replace(i, name=n) for i, n in zip(alone, "xy", strict=True)))
    session = run(Session(workers, plan, seed=3), 2)
    before = look(workers)
    assert [len(here.backbones) for here in before] == [2] * len(before)
    session.remove_task("a")
    after = look(workers)
    assert [here.backbones for here in after] == [here.backbones[1:] for here in before]
    assert all(np.array_equal(x, after[0].state["b"][n]) for n, x in before[0].state["b"].items())
    session.register_tasks(make_plan(layout, (B,), (C,)))
    run(session, 1)
    assert losses(session.curves())["b"] == losses(run(Session(workers, plan, seed=3), 3).curves())["b"]


def test_what_a_session_cannot_go_on_with_is_refused(place: Place) -> None:
    workers, layout = place
    session = run(Session(workers, make_plan(layout, (A,), (B,)), seed=3), 1)
    before = look(workers)
    other = even_layout(model_preset("tiny-gpt2"))
    for plan, reason in (
        (make_plan(layout, (replace(A, learning_rate=1.0), B)), "task a differs"),
        (make_plan(other, (A,), model="tiny-gpt2"), "is for tiny-gpt2"),
    ):
        with pytest.raises(InputError, match=reason):
            session.replan(plan)
    with pytest.raises(InputError, match="no task that is not here"):
        session.register_tasks(make_plan(layout, (A, B)))
    session.remove_task("b")
    with pytest.raises(InputError, match="task b has already left"):
        session.register_tasks(make_plan(layout, (A,), (B,)))
    assert_same(before, look(workers), "a")


def test_rates_follow_the_schedule_and_a_finished_task_stands_still(place: Place) -> None:
    workers, layout = place
    short = replace(A, steps=3)
    session = run(Session(workers, make_plan(layout, (short, B)), seed=3), 3)
    assert session.finished() == ("a",)
    found = [r.learning_rate for r in session.curves()["a"]]
    assert found == [learning_rate(A.schedule, 1e-2, s, 3) for s in range(3)]
    before = look(workers)
    run(session, 1)  # still in the plan: it is computed, and takes no step
    assert_same(before, look(workers), "a")
    assert [len(session.curves()[t]) for t in "ab"] == [3, 4]


def test_a_loss_scale_changes_no_bit(place: Place) -> None:
    workers, layout = place
    found = []
    for scale in (1.0, 1024.0):
        session = run(Session(workers, make_plan(layout, (replace(C, loss_scale=scale), A)), seed=3), 3)
        found.append((losses(session.curves()), look(workers)))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1], "ac")


def test_a_bad_step_is_named_and_the_scale_moves(place: Place) -> None:
    workers, layout = place
    scaled = replace(B, loss_scale=4.0, loss_scale_growth_steps=2)
    session = run(Session(workers, make_plan(layout, (A,), (scaled,)), seed=3), 3)
    before = look(workers)
    workers.ask(Poison(name=NAME, task="b"))
    run(session, 2)
    reports = session.curves()["b"]
    assert [r.skipped for r in reports] == [False, False, False, True, True]
    assert [r.loss_scale for r in reports] == [4.0, 4.0, 8.0, 8.0, 4.0]
    assert not any(r.skipped for r in session.curves()["a"])
    assert [here.backbones for here in before] == [here.backbones for here in look(workers)]
    clean = run(Session(workers, make_plan(layout, (A,), (scaled,)), seed=3), 5)
    assert losses(clean.curves())["a"] == [r.loss for r in session.curves()["a"]]


def test_a_resumed_session_is_the_uninterrupted_one(place: Place, tmp_path: Path) -> None:
    workers, layout = place
    plan = make_plan(layout, (A, B), (C,))
    session = run(Session(workers, plan, seed=3, checkpoint=tmp_path), 2)
    session.remove_task("c")
    run(session, 1)
    session.save()
    run(session, 2)
    wanted, state = losses(session.curves()), look(workers)
    saved = newest_checkpoint(tmp_path)
    assert saved is not None
    resumed = Session.resume(workers, saved, tmp_path)
    assert resumed.iteration == 3
    run(resumed, 2)
    assert losses(resumed.curves()) == wanted
    assert_same(state, look(workers), "ab")


def test_a_broken_checkpoint_is_refused_and_the_last_good_one_named(place: Place, tmp_path: Path) -> None:
    workers, layout = place
    session = Session(workers, make_plan(layout, (A,)), seed=3, checkpoint=tmp_path)
    for _ in range(4):
        run(session, 1).save(keep=3)
    newest, good, _ = folders = checkpoints(tmp_path)
    assert [f.name for f in folders] == [f"iteration-{n:08d}" for n in (4, 3, 2)]
    tensors, manifest = newest / "a.rank0.safetensors", newest / "manifest.json"
    whole = {path: path.read_bytes() for path in (tensors, manifest)}
    flipped = bytearray(whole[tensors])
    flipped[-1] ^= 1
    for path, content, reason in (
        (tensors, whole[tensors][:-7], "it is not whole"),
        (tensors, bytes(flipped), "it was altered"),
        (manifest, whole[manifest][:-9], "malformed JSON"),
        (manifest, whole[manifest].replace(b'"iteration": 4', b'"iteration": 5'), "it was altered"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{reason}.*last good one is {good}: remove {newest}"):
            newest_checkpoint(tmp_path)
        path.write_bytes(whole[path])
    tensors.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        newest_checkpoint(tmp_path)


def test_a_write_that_dies_at_any_call_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    """Every rename and every fsync of a save is once the last thing that happens."""
    plan = make_plan(even_layout(model_preset("tiny-test")), (A,))

    def save(iteration: int, size: int) -> None:
        def manifest(part: Path) -> Manifest:
            record = write_tensors(part, "a", {"x": torch.ones(size)}, 0)
            done = (TaskSteps(task="a", steps=iteration),)
            return Manifest(run_digest="", seed=0, iteration=iteration, plan=plan, done=done, files=(record,))

        write_checkpoint(iteration_folder(tmp_path, iteration), manifest)

    calls = {name: getattr(os, name) for name in ("replace", "fsync")}
    count = 0

    def dying(name: str, *arguments: Any) -> Any:
        nonlocal count
        count -= 1
        if count < 0:
            raise KeyboardInterrupt
        return calls[name](*arguments)

    save(1, 1)
    deaths = 0
    for again in (False, True):  # a new checkpoint, and one that replaces another of the same iteration
        for last in range(20):
            count = last
            with monkeypatch.context() as patch:
                for name in calls:
                    patch.setattr(os, name, lambda *x, n=name: dying(n, *x))
                try:
                    save(2, 3 + again)
                    break
                except KeyboardInterrupt:
                    deaths += 1
            found = newest_checkpoint(tmp_path)
            assert found is not None
            assert (tmp_path / "iteration-00000001" / "manifest.json").exists()
    assert deaths >= 8
    prune_checkpoints(tmp_path, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration-00000001", "iteration-00000002"]


TRAIN = """
import sys
from muxtune.experiments.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_kill_nine_and_resume_give_the_uninterrupted_curve(place: Place, tmp_path: Path) -> None:
    """A real process is killed at a random moment while it trains and saves; then it may resume and finish."""
    workers, layout = place
    if layout.tp > 1 or layout.dp > 1:
        pytest.skip("killed on 1 rank and pp=2 only: processes take long to start")
    plan = make_plan(layout, (A, B), (C,))
    write_noun(plan, tmp_path / "plan.json")
    root = tmp_path / "state"
    command = [sys.executable, "-c", TRAIN, "execute", str(tmp_path / "plan.json"), "--iterations", "40", "--seed", "3"]
    command += ["--checkpoint", str(root), "--every", "1", "--resume", "--json", "--out", str(tmp_path / "run")]
    chance = random.Random(layout.pp)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted = chance.randrange(3, 20)
    while len(checkpoints(root)) == 0 or int(checkpoints(root)[0].name[-8:]) < wanted:
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(chance.random() * 0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = newest_checkpoint(root)
    assert saved is not None
    assert wanted <= saved.manifest.iteration < 40
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    body = json.loads(finished.stdout)
    assert body["resumed_at"] == saved.manifest.iteration
    alone = Session(workers, plan, seed=3)
    for _ in range(40):
        if gone := alone.finished():
            alone.leave(gone)
        alone.iterate()
    assert body["losses"] == losses(alone.curves())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = {(x["task"], x["step"]): x["loss"] for x in lines if x["kind"] == "step"}
    assert len(steps) == sum(x["kind"] == "step" for x in lines)
    assert {(t, i): v for t, row in body["losses"].items() for i, v in enumerate(row)} == steps
