"""GPU suite: Transformer Engine's layer spec against Megatron's local one, each in a process of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from muxtune.executor.joined import open_group
from muxtune.executor.layer_spec import layer_spec_here
from muxtune.executor.messages import Inspect
from muxtune.experiments.gpu_context import MIXED, Context, suite_workload
from muxtune.experiments.gpu_head_to_head import ALONE, passes, suite_plan
from muxtune.spec.errors import NoAnswerError
from muxtune.spec.program import Bound


def transformer_engine(context: Context) -> dict[str, Any]:
    """Losses and times of one task under both specs, on two layers of the backbone.

    Raises:
        NoAnswerError: Transformer Engine does not work here.
    """
    spec = layer_spec_here()
    if spec.kind != "te":
        raise NoAnswerError(spec.reason)
    model = replace(context.scale.head_model, layers=2)
    plan = suite_plan(context, suite_workload(model, 1, MIXED, context.scale.samples), ALONE)
    bounds = passes(context, plan)
    found = {kind: run_with(kind, bounds, "cuda") for kind in ("te", "local")}
    pairs = zip(*(x["losses"] for x in found.values()), strict=True)
    return {**found, "largest_relative_difference": max(abs(a - b) / abs(b) for a, b in pairs)}


def run_with(kind: str, bounds: list[Bound], device: Literal["cpu", "cuda"]) -> dict[str, Any]:
    """Passes over the Programs of a plan of one task in a new process that takes this layer spec."""
    with open_group(1, device, layer_spec=kind) as group:
        group.load("plan", bounds[0])
        walls_ns = [group.run("plan")[0].wall_ns for _ in bounds]
        reports = group.ask(Inspect(name="plan"))[0].reports
    (report,) = reports.values()
    return {"wall_ns": walls_ns[1:], "losses": list(report.losses)}
