"""check: can this plan be executed? Peaks of memory if so, every problem if not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import read_plan
from muxtune.experiments.commands.memory import memory_rows, memory_table
from muxtune.experiments.console import render
from muxtune.spec.bind import bind
from muxtune.spec.check import check
from muxtune.spec.units import format_bytes


def run(plan: Path, *, seed: int = 0) -> dict[str, Any]:
    """`ok`, the problems, and (if there are none) the peak of every rank by kind, for the samples drawn with `seed`.

    Raises:
        InputError: the file is no plan.
    """
    found = read_plan(plan)
    problems = check(found, seed)
    memory: list[dict[str, Any]] = []
    if not problems:
        bound = bind(found, seed=seed, steps=math.lcm(*(i.steps for i in found.instances)))
        memory = memory_rows(bound)
    return {
        "ok": not problems,
        "problems": list(problems),
        "peak_bytes": {str(row["rank"]): row["peak_bytes"] for row in memory},
        "memory": memory,
        "memory_bytes": found.cluster.device.memory_bytes,
        "device": found.cluster.device.name,
        "plan_digest": found.decision_digest(),
    }


def show(body: dict[str, Any]) -> str:
    """`ok` and the peaks, or one problem a line."""
    if not body["ok"]:
        return render(*body["problems"])
    limit = f"of {body['device']}'s {format_bytes(body['memory_bytes'])}"
    return render("ok", memory_table(body["memory"], body["memory_bytes"]), limit)
