"""profile: measure the executor's operators for some workloads, round by round, and fit a cost model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import COSTS, Progress, output_folder, silent
from muxtune.experiments.console import render, table
from muxtune.profiler.fit import fit
from muxtune.profiler.run import Profiling
from muxtune.profiler.store import Store
from muxtune.sim.traces.cluster import read_cluster
from muxtune.sim.traces.workload import read_workload
from muxtune.spec.errors import InputError
from muxtune.spec.files import write_noun
from muxtune.spec.layout import even_layout


def run(
    workloads: Sequence[Path],
    out: Path,
    *,
    cluster: str = "cpu",
    pipelines: Sequence[int] = (1,),
    rounds: int = 20,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure until `rounds` rounds are in `out`, resuming what is there, and write `out`/costs.json.

    Raises:
        InputError: wrong file or device, or `out` holds a profile of something else.
    """
    device = read_cluster(cluster).device
    if not device.is_cpu:
        raise InputError(f"--cluster {cluster}: the profiler measures this machine's CPU: give --cluster cpu")
    tasks = [read_workload(path) for path in workloads]
    layouts = [even_layout(tasks[0].model, pp=pp) for pp in pipelines]
    folder = output_folder(out)
    started_s = time.monotonic()
    with Profiling(tasks, layouts, folder) as profiling:
        profiling.rounds(rounds, lambda done, until: progress("profile", done, until))
    fitted = fit(folder, [task for workload in tasks for task in workload.tasks])
    write_noun(fitted, folder / COSTS)
    return {
        "device": fitted.device,
        "rows": len(Store(folder).rows()),
        "families": {f.family: {"points": f.points, "held_out_mape": f.held_out_mape} for f in fitted.families},
        "reference_ns": fitted.reference_ns,
        "seconds": time.monotonic() - started_s,
        "out": str(folder),
    }


def parse_pipelines(text: str) -> tuple[int, ...]:
    """`1,2` as pipeline depths.

    Raises:
        InputError: not whole numbers, at least 1.
    """
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(piece.isdecimal() and int(piece) >= 1 for piece in pieces):
        raise InputError(f"--pp {text}: give whole numbers, at least 1, separated by commas, such as 1,2")
    return tuple(dict.fromkeys(int(piece) for piece in pieces))


def show(body: dict[str, Any]) -> str:
    """Operator families with their held-out errors."""
    rows = [
        [name, str(f["points"]), "-" if f["held_out_mape"] is None else f"{100 * f['held_out_mape']:.1f} %"]
        for name, f in body["families"].items()
    ]
    return render(
        f"{body['device']}: {body['rows']:,} measurements in {body['out']}, {body['seconds']:.0f} s",
        table(["operator family", "points", "held-out error"], rows),
        f"use it: --cost {body['out']}",
    )
