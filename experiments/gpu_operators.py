"""GPU suite: operator tables of backbones at tensor-parallel shard shapes, one costs file a backbone."""

from __future__ import annotations

from typing import Any

from muxtune.experiments.gpu_context import MIXED, Context, suite_workload
from muxtune.profiler.here import measure_here
from muxtune.spec.files import write_noun
from muxtune.spec.layout import even_layout
from muxtune.spec.model import ModelSpec


def operators(context: Context) -> dict[str, Any]:
    """A table for each backbone while the budget lasts; families with their held-out errors."""
    found: dict[str, Any] = {}
    for model in context.scale.operator_models:
        if context.left_s <= 0:
            found[model.name] = {"reason": "the budget ended"}
            continue
        found[model.name] = _table(context, model)
        context.current.update(found)
        context.save()
    return found


def _table(context: Context, model: ModelSpec) -> dict[str, Any]:
    workload = suite_workload(model, len(MIXED), MIXED, context.scale.samples)
    degrees = [tp for tp in context.scale.tensor_degrees if model.kv_heads % tp == 0 and model.vocab % tp == 0]
    layouts = [even_layout(model, tp=tp) for tp in degrees]
    device = context.cluster.device.name
    rounds = context.scale.operator_rounds
    fitted = measure_here(workload, layouts, context.device, device, context.deadline_s, rounds)
    path = context.out / f"costs-{model.name}.json"
    write_noun(fitted, path)
    return {
        "file": path.name,
        "tp": degrees,
        "curves": len(fitted.curves),
        "reference_ns": fitted.reference_ns,
        "families": {f.family: {"points": f.points, "held_out_mape": f.held_out_mape} for f in fitted.families},
    }
