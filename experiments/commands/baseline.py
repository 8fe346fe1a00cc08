"""execute --baseline: the plan's tasks on real transformers + peft, one after the other, beside the plan's own figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from muxtune.executor.hf_baseline import HfBaseline, require_baseline
from muxtune.executor.solo import Solo, drawn_weights
from muxtune.experiments.commands.inputs import read_plan
from muxtune.policies.base import SystemState, make_policy
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.align import count_tokens
from muxtune.spec.bind import bind
from muxtune.spec.errors import UnknownKeyError
from muxtune.spec.layout import even_layout
from muxtune.spec.units import format_bytes, format_ns

BASELINES = ("hf-peft",)


def run(plan: Path, name: str, *, device: Literal["cpu", "cuda"], iterations: int, seed: int) -> dict[str, Any]:
    """Every task's own backbone and micro-batches, as policy hf-peft plans them; the samples are those of the plan.

    Raises:
        UnknownKeyError: no such baseline. NoAnswerError: transformers or peft is absent, or another kind of backbone.
        InputError: a task whose method is not LoRA.
    """
    if name not in BASELINES:
        raise UnknownKeyError("baseline", name, BASELINES)
    found = read_plan(plan)
    model = found.workload.model
    require_baseline(model)
    state = SystemState(
        workload=found.workload,
        cluster=found.cluster,
        layout=even_layout(model),
        microbatches=max(i.microbatches for i in found.instances),
    )
    alone = make_policy("hf-peft:residency=swapped", Roofline()).plan(state)
    bounds = [bind(alone, seed=seed, first_step=i) for i in range(iterations)]
    before = torch.is_grad_enabled(), torch.get_num_threads()
    torch.set_grad_enabled(False)
    if device == "cpu":
        torch.set_num_threads(1)  # as worker processes do
    try:
        place = torch.device(device)
        solo = Solo(model, place, drawn_weights(model, place), seed)
        result = HfBaseline(solo).run(bounds, warm_up=int(iterations > 1))
    finally:
        torch.set_grad_enabled(before[0])
        torch.set_num_threads(before[1])
    billed_len = [(t.task_id, t.billed_len_tokens) for t in found.workload.tasks]
    _, billed, _ = count_tokens((b for w in bounds[0].program.units for b in w.batches), billed_len)
    return {
        "baseline": name,
        "iteration_ns": result.iteration_ns,
        "billed_tokens_per_s": billed * 1e9 / result.iteration_ns,
        "peak_bytes": result.peak_bytes,
        "losses": {task: list(losses) for task, losses in result.losses.items()},
    }


def text(body: dict[str, Any]) -> str:
    """One line beside the plan's own."""
    return (
        f"{body['baseline']} (transformers + peft, one task at a time): iteration {format_ns(body['iteration_ns'])}, "
        f"{body['billed_tokens_per_s']:,.0f} billed tokens/s, peak {format_bytes(body['peak_bytes'])} a task"
    )
