"""`muxtune validate --replay`: an accelerated trace executed, every job's completion time beside its prediction."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import Progress, output_folder, silent
from muxtune.experiments.commands.trace import Given, open_given
from muxtune.experiments.console import json_text, render, table
from muxtune.experiments.replay_study import Compared, ReplayStudy, ReplayStudyConfig
from muxtune.profiler.provenance import birth, steal_since, stolen_ticks
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.errors import InputError
from muxtune.spec.files import write_text
from muxtune.spec.model import model_preset
from muxtune.spec.noun import plain

#: Poisson arrivals that load one instance about as fast as it works; small batches of short texts.
TRACE = "paper:days=60,rate_per_minute=0.005"
MAPPING = (("datasets", "sst2,openbookqa"), ("batches", "1,2"), ("ranks", "4,8"))
RESULT = "replay-validation.json"
TARGET = 0.15


def run(
    out: Path,
    *,
    trace: str = TRACE,
    jobs: int = 20,
    policy: str = "muxtune",
    model: str = "tiny-llama",
    tasks_per_instance: int = 4,
    seconds: float = 30.0,
    rounds: int = 20,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Execute the first `jobs` jobs of a trace on this CPU, on a `model` of any preset, and compare; files go to `out`.

    Raises:
        InputError: wrong trace or option. ExecutionError: a worker failed.
    """
    if rounds < 2:
        raise InputError(
            f"--rounds {rounds}: half of the operators are measured before the run, half after: at least 2"
        )
    opened, _ = open_given(Given(source=trace, mapping=MAPPING, seed=seed, first=jobs))
    folder = output_folder(out)
    # Half a profile of another hour would be taken for this one's.
    shutil.rmtree(folder / "profile", ignore_errors=True)
    stolen = stolen_ticks()
    config = ReplayStudyConfig(
        trace=opened,
        model=model_preset(model),
        cluster=parse_cluster("cpu"),
        policy=policy,
        most=tasks_per_instance,
        seconds=seconds,
        profile_rounds=rounds,
        seed=seed,
    )
    found = ReplayStudy(config, folder, progress).run()
    body = body_of(found, policy) | {"provenance": plain(birth("cpu", steal_percent=steal_since(stolen)))}
    write_text(folder / RESULT, json_text(body))
    return body


def body_of(found: Compared, policy: str) -> dict[str, Any]:
    """Rows a job, errors, the costs that were measured, and where the time went."""
    rows = [
        {
            "job_id": life.job_id,
            "arrival_s": life.arrival_s,
            "steps": life.steps,
            "predicted_s": row["end_s"] - row["arrival_s"],
            "measured_s": life.end_s - life.arrival_s,
            "error": (row["end_s"] - row["arrival_s"]) / (life.end_s - life.arrival_s) - 1,
            "unscaled_s": raw["end_s"] - raw["arrival_s"],
        }
        for life, row, raw in zip(found.lived.lives, found.predicted, found.unscaled, strict=True)
    ]
    lived = found.lived
    reports = [c.report for c in lived.changes if c.report is not None]
    predicted_s, measured_s = max(r["end_s"] for r in found.predicted), max(x.end_s for x in lived.lives)
    return {
        "trace": found.trace.about.name,
        "statements": list(found.trace.about.statements()),
        "policy": policy,
        "cluster_policy": "fcfs",
        "rows": rows,
        "mape_jct": statistics.fmean(abs(r["error"]) for r in rows),
        "mape_jct_unscaled": statistics.fmean(abs(r["unscaled_s"] / r["measured_s"] - 1) for r in rows),
        "mean_jct": _pair(*(statistics.fmean(r[k] for r in rows) for k in ("predicted_s", "measured_s"))),
        "makespan": _pair(predicted_s, measured_s),
        "target": TARGET,
        "speed": found.speed,
        "costs": plain(found.costs),
        "replans": {
            "count": len(reports),
            "joined": sum(len(r.joined) for r in reports),
            "left": sum(len(r.left) for r in reports),
            **{
                f"{k}_s": statistics.fmean(getattr(r, f"{k}_seconds") for r in reports) if reports else None
                for k in PARTS
            },
        },
        "time": {
            "iterations_s": sum(p.span_s for p in lived.passes),
            "between_s": sum(p.between_s for p in lived.passes),
            "waited_for_core_s": lived.waited_s,
            "changes_s": sum(c.seconds for c in lived.changes),
            "predicted": found.shares,
        },
        "iterations": len(lived.passes),
        "extrapolated_fraction": found.extrapolated_fraction,
    }


#: Parts of a re-plan (executor.session.ReplanReport).
PARTS = ("plan", "check", "save", "apply")


def _pair(predicted_s: float, measured_s: float) -> dict[str, float]:
    return {"predicted_s": predicted_s, "measured_s": measured_s, "error": predicted_s / measured_s - 1}


def show(body: dict[str, Any]) -> str:
    """A line a job, then the errors, and what was measured of changes."""
    rows = [
        [r["job_id"], f"{r['arrival_s']:.2f} s", str(r["steps"])]
        + [f"{r[k]:.2f} s" for k in ("predicted_s", "measured_s")]
        + [f"{r['error']:+.1%}"]
        for r in body["rows"]
    ]
    costs, makespan, mean, replans = body["costs"], body["makespan"], body["mean_jct"], body["replans"]
    time = body["time"]
    met = "met" if max(body["mape_jct"], abs(makespan["error"])) <= body["target"] else "MISSED"
    return render(
        table(["job", "arrival", "steps", "JCT predicted", "JCT measured", "error"], rows),
        f"JCT: mean absolute error {body['mape_jct']:.1%}, of the mean {mean['error']:+.1%}; makespan "
        f"{makespan['error']:+.1%} ({makespan['predicted_s']:.1f} s predicted, {makespan['measured_s']:.1f} s measured); "
        f"target {body['target']:.0%}: {met}",
        f"during the run the reference GEMM took {body['speed']:.2f} times its median of the profile, and predicted "
        f"iterations are as much longer; without that the mean absolute error is {body['mape_jct_unscaled']:.1%}",
        f"the run waited {time['waited_for_core_s']:.1f} s for a core in {time['iterations_s']:.1f} s of iterations",
        f"measured: a change {costs['replan_s']:.3f} s + {costs['join_s']:.3f} s a task that comes + "
        f"{costs['leave_s']:.3f} s one that goes, a start {costs['start_s']:.2f} s, between iterations "
        f"{costs['between_s']:.4f} s + {costs['between_task_s']:.4f} s a task; {replans['count']} re-plans, "
        f"{body['iterations']} iterations",
    )
