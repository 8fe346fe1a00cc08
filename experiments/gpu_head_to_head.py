"""GPU suite: every policy against real transformers + peft, Megatron one task at a time and batch-all, on one backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from muxtune.experiments.gpu_context import MICROBATCHES, MIXED, UNIFORM, Context, suite_workload
from muxtune.experiments.laws import with_options
from muxtune.policies.base import SystemState, make_policy, policies
from muxtune.profiler.kept import layer_kept
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import make_evaluate
from muxtune.spec.align import count_tokens
from muxtune.spec.bind import bind
from muxtune.spec.errors import MuxtuneError
from muxtune.spec.layout import even_layout
from muxtune.spec.plan import Plan
from muxtune.spec.program import Bound
from muxtune.spec.task import Workload

#: One backbone a task, one after the other; Solo holds one copy and runs the instances in turn.
ALONE = "hf-peft:residency=swapped"
BASELINES = {"Megatron one at a time": ALONE, "batch-all": "sl-peft"}
VARIANTS = ("muxtune:charge=exact", "muxtune:alignment=varlen", "muxtune:alignment=chunk")
#: These enumerate; beyond a handful of tasks they would plan longer than the suite lasts.
ENUMERATING = ("exhaustive", "ilp")
REAL = "hf-peft (transformers + peft)"
#: Of a sweep over numbers of tasks.
FEW = ("muxtune", "muxtune:alignment=varlen", "temporal", "lorafusion")

Row = dict[str, Any]


def ways(context: Context) -> dict[str, str]:
    """Name → policy of everything that is run on Megatron, the baselines first."""
    chosen = context.scale.policies or (*(p for p in policies() if p not in ENUMERATING), *VARIANTS)
    rest = (p for p in chosen if p not in ("hf-peft", *BASELINES.values()))
    return BASELINES | {p: p for p in rest}


def head_to_head(context: Context) -> dict[str, Any]:
    """The targets' case: mixed data sets, 4 samples a task and micro-batch."""
    scale = context.scale
    workload = suite_workload(scale.head_model, scale.tasks, MIXED, scale.samples)
    return {"rows": compare(context, workload, ways(context))}


def large_batch(context: Context) -> dict[str, Any]:
    """The same with larger micro-batches."""
    scale = context.scale
    workload = suite_workload(scale.head_model, scale.tasks, MIXED, scale.large_samples)
    few = BASELINES | {p: p for p in FEW[:2]}
    return {"rows": compare(context, workload, few)}


def sweep(context: Context) -> dict[str, Any]:
    """1–32 tasks, uniform and mixed."""
    scale, rows = context.scale, list[Row]()
    few = BASELINES | {p: p for p in (scale.policies or FEW) if p not in ("hf-peft", "sl-peft")}
    for count in scale.sweep_tasks:
        for datasets in (UNIFORM, MIXED):
            workload = suite_workload(scale.head_model, count, datasets, scale.samples)
            rows += compare(context, workload, few)
            context.current["rows"] = rows
            context.save()
    return {"rows": rows}


def memory(context: Context) -> dict[str, Any]:
    """Peaks of one task alone, and of many fused in one pass and interleaved."""
    scale = context.scale
    one = suite_workload(scale.head_model, 1, MIXED, scale.samples)
    many = suite_workload(scale.head_model, scale.many_tasks, MIXED, scale.samples)
    real = _safely(REAL, one, lambda: _real(context, one))
    alone = _safely("one task", one, lambda: _policy(context, one, ALONE))
    fused = _safely("fused in one pass", many, lambda: _policy(context, many, "sl-peft"))
    interleaved = _safely("interleaved", many, lambda: _policy(context, many, "temporal"))
    kept = _kept(context, one)
    return {"tasks": scale.many_tasks, "rows": [real, alone, fused, interleaved], "kept_by_a_layer": kept}


def _kept(context: Context, workload: Workload) -> dict[str, Any]:
    """Activation bytes a token and layer, measured and predicted."""
    (task,), solo = workload.tasks, context.solo()
    solo.register(workload)
    found = layer_kept(solo.stage, task, context.scale.samples, task.billed_len_tokens)
    return {
        "measured_bytes_per_token": found.measured_bytes / found.tokens,
        "predicted_bytes_per_token": found.predicted_bytes / found.tokens,
        "error": found.error,
        "pieces": dict(found.pieces),
    }


def compare(context: Context, workload: Workload, chosen: dict[str, str]) -> list[Row]:
    """A row for the real baseline and for every way; results so far are saved after each."""
    rows = [_safely(REAL, workload, lambda: _real(context, workload))]
    for name, policy in chosen.items():
        if context.left_s <= 0:
            rows.append({"way": name, "workload": workload.name, "reason": "the budget ended"})
            continue
        rows.append(_safely(name, workload, lambda policy=policy: _policy(context, workload, policy)))  # type: ignore[misc]
        context.current["rows"] = rows
        context.save()
    return rows


def _safely(way: str, workload: Workload, call: Callable[[], Row]) -> Row:
    """A row, or why there is none: a way that does not fit must not cost the others."""
    row: Row = {"way": way, "workload": workload.name, "reason": ""}
    try:
        return row | call()
    except (MuxtuneError, RuntimeError) as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return row | {"reason": f"{type(error).__name__}: {error}"}


def suite_plan(context: Context, workload: Workload, policy: str) -> Plan:
    """What a policy decides for one device, on data-sheet costs."""
    cost = Roofline()
    state = SystemState(
        workload=workload,
        cluster=context.cluster,
        layout=even_layout(workload.model),
        microbatches=MICROBATCHES,
        evaluate=make_evaluate(cost, 0, 1),
    )
    name = policy.split(":", 1)[0]
    return make_policy(with_options(policy, policies()[name].quick), cost).plan(state)


def passes(context: Context, plan: Plan) -> list[Bound]:
    """The Programs of a warm-up and of every counted pass, each with fresh samples."""
    steps = max(i.steps for i in plan.instances)
    return [bind(plan, seed=0, steps=steps, first_step=i * steps) for i in range(context.scale.rounds + 1)]


def _policy(context: Context, workload: Workload, policy: str) -> Row:
    plan = suite_plan(context, workload, policy)
    bounds = passes(context, plan)
    found = context.solo().run(bounds)
    steps = bounds[0].program.steps
    return _figures(workload, bounds[1], found.median_ns // steps, found.peak_bytes) | {
        "plan_digest": plan.decision_digest(),
        "first_losses": {task: losses[0] for task, losses in found.losses.items()},
    }


def _real(context: Context, workload: Workload) -> Row:
    """transformers + peft, one task after the other; the peak is that of one task."""
    bounds = passes(context, suite_plan(context, workload, ALONE))
    found = context.baseline().run(bounds)
    return _figures(workload, bounds[1], found.iteration_ns, found.peak_bytes) | {
        "first_losses": {task: losses[0] for task, losses in found.losses.items()}
    }


def _figures(workload: Workload, bound: Bound, iteration_ns: int, peak_bytes: int) -> Row:
    billed_len = [(t.task_id, t.billed_len_tokens) for t in workload.tasks]
    counts = count_tokens((b for w in bound.program.units for b in w.batches), billed_len)
    raw, billed, processed = (n / bound.program.steps for n in counts)
    return {
        "iteration_ns": iteration_ns,
        "raw_tokens_per_s": raw * 1e9 / iteration_ns,
        "billed_tokens_per_s": billed * 1e9 / iteration_ns,
        "processed_tokens_per_s": processed * 1e9 / iteration_ns,
        "peak_bytes": peak_bytes,
    }
