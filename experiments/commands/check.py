"""check: can this plan be executed? Peaks of memory if so, every problem if not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import read_plan
from muxtune.experiments.console import render, table
from muxtune.spec.bind import bind
from muxtune.spec.check import check
from muxtune.spec.memory import rank_peaks
from muxtune.spec.units import format_bytes


def run(plan: Path, *, seed: int = 0) -> dict[str, Any]:
    """`ok`, the problems, and (if there are none) the peak of every rank, for the samples drawn with `seed`.

    Raises:
        InputError: the file is no plan.
    """
    found = read_plan(plan)
    problems = check(found, seed)
    peaks: dict[str, int] = {}
    if not problems:
        bound = bind(found, seed=seed, steps=math.lcm(*(i.steps for i in found.instances)))
        peaks = {str(p.rank): p.peak_bytes for p in rank_peaks(bound)}
    return {
        "ok": not problems,
        "problems": list(problems),
        "peak_bytes": peaks,
        "memory_bytes": found.cluster.device.memory_bytes,
        "device": found.cluster.device.name,
        "plan_digest": found.decision_digest(),
    }


def show(body: dict[str, Any]) -> str:
    """`ok` and the peaks, or one problem a line."""
    if not body["ok"]:
        return render(*body["problems"])
    limit = body["memory_bytes"]
    rows = [[rank, format_bytes(peak), f"{100 * peak / limit:.1f} %"] for rank, peak in body["peak_bytes"].items()]
    return render("ok", table(["rank", "peak memory", f"of {body['device']}'s {format_bytes(limit)}"], rows))
