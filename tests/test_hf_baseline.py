"""The baseline on real transformers and peft: the same backbone, the same samples, and the same losses as the executor's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from muxtune.executor.hf_baseline import HfBaseline, require_baseline
from muxtune.executor.solo import DrawnOnDevice, Solo
from muxtune.experiments.commands import baseline
from muxtune.policies.base import SystemState, make_policy
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.bind import bind
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.errors import NoAnswerError, UnknownKeyError
from muxtune.spec.files import write_noun
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.program import Bound
from muxtune.spec.task import Task, Workload

MODEL = replace(model_preset("tiny-test"), rope_base=500)


@pytest.fixture(autouse=True)
def _as_in_a_worker() -> Iterator[None]:
    before = torch.is_grad_enabled(), torch.get_num_threads()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    yield
    torch.set_grad_enabled(before[0])
    torch.set_num_threads(before[1])


def _bounds(targets: tuple[str, ...], steps: int = 3) -> list[Bound]:
    tasks = tuple(
        Task(
            task_id=name,
            peft=LoRA(rank=rank, targets=targets),
            dataset="sst2",
            billed_len_tokens=length,
            global_batch_samples=3,
            learning_rate=1e-2,
        )
        for name, rank, length in (("a", 4, 32), ("b", 2, 16))
    )
    workload = Workload(name="w", model=MODEL, datasets=(embedded_length("sst2"),), tasks=tasks)
    state = SystemState(workload=workload, cluster=parse_cluster("cpu"), layout=even_layout(MODEL), microbatches=2)
    plan = make_policy("hf-peft", Roofline()).plan(state)
    return [bind(plan, seed=0, first_step=i) for i in range(steps)]


@pytest.mark.parametrize(("targets", "equal"), [(("proj", "fc2"), 3), (("qkv", "proj", "fc1", "fc2"), 1)])
def test_losses_are_the_executors(targets: tuple[str, ...], equal: int) -> None:
    """At every step where each adapter is one module there; at the first one, B being zero, for fused BaseOps too."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    bounds, solo = _bounds(targets), Solo(MODEL, torch.device("cpu"))
    ours, theirs = solo.run(bounds), HfBaseline(solo).run(bounds)
    assert ours.losses.keys() == theirs.losses.keys() == {"a", "b"}
    for task, losses in ours.losses.items():
        assert theirs.losses[task][:equal] == pytest.approx(losses[:equal], rel=1e-4)
        assert len(set(losses)) == len(losses) == len(theirs.losses[task])
    assert theirs.iteration_ns > 0
    assert len(ours.iterations_ns) == len(bounds) - 1
    assert ours.peak_bytes > 0
    assert theirs.peak_bytes > 0


def test_what_cannot_run_is_said() -> None:
    with pytest.raises(NoAnswerError, match="gpt2 is not LLaMA-shaped"):
        require_baseline(model_preset("gpt2"))


def test_a_backbone_drawn_on_its_device() -> None:
    model = replace(
        model_preset("gpt2"), layers=1, hidden=48, heads=4, kv_heads=4, head_dim=12, ffn_hidden=64, vocab=96
    )
    solo = Solo(model, torch.device("cpu"), DrawnOnDevice(model, torch.device("cpu")))
    weights = dict(solo.stage.gpt.named_parameters())
    assert float(weights["decoder.layers.0.mlp.linear_fc1.weight"].std()) == pytest.approx(0.02, rel=0.1)
    assert bool((weights["decoder.final_layernorm.weight"] == 1).all())
    assert not any(w.requires_grad for w in weights.values())


def test_the_command_runs_a_plans_tasks_on_it(tmp_path: Path) -> None:
    """The plan's samples: first losses are those of the plan run alone, to what a fused qkv leaves equal."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    (bound, *_) = _bounds(("qkv", "fc2"), steps=1)
    write_noun(bound.plan, tmp_path / "plan.json")
    body = baseline.run(tmp_path / "plan.json", "hf-peft", device="cpu", iterations=2, seed=0)
    ours = Solo(MODEL, torch.device("cpu")).run([bound], warm_up=0)
    assert {t: x[0] for t, x in body["losses"].items()} == pytest.approx(
        {t: x[0] for t, x in ours.losses.items()}, 1e-4
    )
    assert body["billed_tokens_per_s"] == pytest.approx(3 * (32 + 16) * 1e9 / body["iteration_ns"])
    assert "one task at a time" in baseline.text(body)
    with pytest.raises(UnknownKeyError, match="hf-peft"):
        baseline.run(tmp_path / "plan.json", "x", device="cpu", iterations=1, seed=0)
