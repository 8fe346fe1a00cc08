"""GPU suite: how much operators slow each other on two streams, as a co-run grid for the cost model `interference`."""

from __future__ import annotations

from itertools import product
from typing import Any

from muxtune.experiments.gpu_context import MICROBATCHES, RANK, Context
from muxtune.profiler.corun import Corun, measure_slowdown
from muxtune.sim.cost.interference import CoRun, CoRunGrid
from muxtune.spec.files import write_noun
from muxtune.spec.plan import Provenance

GRID = "interference.json"
#: What runs beside what: a BaseOp's GEMM and grouped LoRA, and GEMMs of two hTasks. A collective needs a second GPU.
PAIRS = (("linear", "lora"), ("lora", "linear"), ("linear", "linear"))


def co_run(context: Context) -> dict[str, Any]:
    """Every pair at every combination of sizes; the grid so far is written after each pair."""
    sizes = tuple(context.scale.tokens >> shift for shift in (4, 2, 0))
    bench = Corun(context.scale.head_model, context.device, min(RANK, context.scale.head_model.head_dim), MICROBATCHES)
    points: list[CoRun] = []
    for family, beside in PAIRS:
        for size, load in product(sizes, sizes):
            slowdown, spread = measure_slowdown(
                bench.operator(family, size), bench.operator(beside, load), context.device
            )
            points.append(CoRun(family=family, beside=beside, size=size, load=load, slowdown=slowdown, spread=spread))
        environment = f"{context.device_name}, {context.scale.head_model.name}"
        grid = CoRunGrid(
            device=context.cluster.device.name, points=tuple(points), provenance=Provenance(environment=environment)
        )
        write_noun(grid, context.out / GRID)
    return {
        "file": GRID,
        "points": len(points),
        "largest": max(p.slowdown for p in points),
        "left out": "GEMM beside a collective: needs two GPUs",
    }
