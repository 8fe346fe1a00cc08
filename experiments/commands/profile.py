"""profile: measure the executor's operators for some workloads, round by round, and fit a cost model."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import COSTS, Progress, output_folder, silent
from muxtune.experiments.console import render, table
from muxtune.profiler.fit import fit
from muxtune.profiler.noise import settled
from muxtune.profiler.run import Budget, Profiling
from muxtune.profiler.store import Store
from muxtune.sim.cost.table import FittedTable
from muxtune.sim.traces.cluster import read_cluster
from muxtune.sim.traces.workload import read_workload
from muxtune.spec.errors import InputError
from muxtune.spec.files import read_noun, write_noun, write_text
from muxtune.spec.layout import even_layout

REPORT = "report.html"


def run(
    workloads: Sequence[Path],
    out: Path,
    *,
    cluster: str = "cpu",
    pipelines: Sequence[int] = (1,),
    tensors: Sequence[int] = (1,),
    replicas: Sequence[int] = (1,),
    rounds: int = 20,
    budget_s: float | None = None,
    precision: float | None = None,
    report: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure until `rounds` rounds are in `out`, resuming what is there, and write `out`/costs.json.

    Layouts are all combinations of `tensors` (tp), `pipelines` (pp) and `replicas` (dp).

    It ends before that when `budget_s` seconds have passed (one round is always measured) or when the 95 % interval of every
    median is within `precision` of it. `report` adds `out`/report.html.

    Raises:
        InputError: wrong file or device, or `out` holds a profile of something else.
    """
    device = read_cluster(cluster).device
    if not device.is_cpu:
        raise InputError(f"--cluster {cluster}: the profiler measures this machine's CPU: give --cluster cpu")
    tasks = [read_workload(path) for path in workloads]
    degrees = product(tensors, pipelines, replicas)
    layouts = [even_layout(tasks[0].model, tp=tp, pp=pp, dp=dp) for tp, pp, dp in degrees]
    folder = output_folder(out)
    started_s = time.monotonic()
    budget = Budget(None if budget_s is None else started_s + budget_s, precision)
    with Profiling(tasks, layouts, folder) as profiling:
        ended = profiling.rounds(rounds, lambda done, until: progress("profile", done, until), budget)
    Store(folder).pack()
    fitted = fit(folder, [task for workload in tasks for task in workload.tasks])
    write_noun(fitted, folder / COSTS)
    if report:
        write_profile_report(folder)
    return {**_body(folder, fitted), "ended": ended, "seconds": time.monotonic() - started_s, "out": str(folder)}


def write_profile_report(folder: Path) -> Path:
    """`folder`/report.html of a fitted profile: measured points, curves and what they miss, a picture a family.

    Raises:
        InputError: the folder holds no fitted profile.
    """
    from muxtune.experiments.plots.profile import page

    path = folder / COSTS
    if not path.is_file():
        raise InputError(f"{folder}: holds no {COSTS}: make one with `muxtune profile --workload FILE --out {folder}`")
    write_text(folder / REPORT, page(read_noun(FittedTable, path), folder.name))
    return folder / REPORT


def _body(folder: Path, fitted: FittedTable) -> dict[str, Any]:
    rows, cases = Store(folder).rows(), Store(folder).meta().cases
    noise = settled(rows)
    worst = [
        {"case": _case_name(cases, case), "direction": direction, "half_width": width}
        for case, direction, width in noise.worst
    ]
    return {
        "device": fitted.device,
        "rows": len(rows),
        "rounds": int(rows["round"].nunique()),
        "families": {f.family: {"points": f.points, "held_out_mape": f.held_out_mape} for f in fitted.families},
        "reference_ns": fitted.reference_ns,
        "noise": {"points": noise.points, "settled": noise.settled, "precision": noise.precision, "worst": worst},
        "steal_percent": float(rows["steal_percent"].mean()),
    }


def _case_name(cases: Sequence[Any], index: int) -> str:
    """`linear 64`; messages and meetings stand behind the cases."""
    return f"{cases[index].family} {'x'.join(map(str, cases[index].size))}" if index < len(cases) else "message"


def parse_budget(text: str) -> float | None:
    """`90s`, `5m`, `1h` in seconds; None for an empty text.

    Raises:
        InputError: something else.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if found is None or float(found[1]) == 0:
        raise InputError(f"--budget {text}: give a time such as 90s, 5m or 1h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def parse_degrees(text: str, option: str) -> tuple[int, ...]:
    """`1,2` as pipeline depths, or degrees of tensor or data parallelism.

    Raises:
        InputError: not whole numbers, at least 1.
    """
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(piece.isdecimal() and int(piece) >= 1 for piece in pieces):
        raise InputError(f"{option} {text}: give whole numbers, at least 1, separated by commas, such as 1,2")
    return tuple(dict.fromkeys(int(piece) for piece in pieces))


def show(body: dict[str, Any]) -> str:
    """Operator families with their held-out errors."""
    rows = [
        [name, str(f["points"]), "-" if f["held_out_mape"] is None else f"{100 * f['held_out_mape']:.1f} %"]
        for name, f in body["families"].items()
    ]
    noise = body["noise"]
    loose = ", ".join(f"{w['case']} {w['direction']}" for w in noise["worst"])
    known = f"{noise['settled']} of {noise['points']} medians are known to {noise['precision']:.0%}"
    return render(
        f"{body['device']}: {body['rows']:,} measurements in {body['out']}, {body['seconds']:.0f} s, {body['ended']}",
        table(["operator family", "points", "held-out error"], rows),
        known + (f"; least sure: {loose}" if loose else ""),
        f"use it: --cost {body['out']}",
    )
