"""compare: every policy plans the same workload on the same devices; one row each, best first."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import Progress, output_folder, silent
from muxtune.experiments.commands.plan import timed_plan
from muxtune.experiments.commands.problem import Options, problem_text, read_problem
from muxtune.experiments.commands.rows import (
    UNCALIBRATED,
    Alone,
    feasible_row,
    figures_table,
    infeasible_row,
    time_table,
)
from muxtune.experiments.console import json_text, render
from muxtune.policies.base import Policy, SystemState, make_policy, policies
from muxtune.spec.errors import InputError, MuxtuneError
from muxtune.spec.files import write_noun, write_text
from muxtune.spec.plan import Plan


def split_policies(text: str) -> tuple[str, ...]:
    """Split `a,b:k=v,k=v,c`: a piece with `=` and no `:` before it is one more option of the policy before it."""
    found: list[str] = []
    for piece in text.split(","):
        key, equals, _ = piece.partition("=")
        if equals and ":" not in key:
            if not found or ":" not in found[-1]:
                raise InputError(f"--policies {text}: option {piece!r} follows no policy: write NAME:key=value,…")
            found[-1] += f",{piece}"
        elif piece.strip():
            found.append(piece.strip())
    return tuple(found)


def run(
    workload: Path,
    cluster: str,
    references: Sequence[str] = (),
    options: Options | None = None,
    *,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """One row a policy (all of them by default); `out` gets compare.json and the plans.

    Raises:
        InputError: wrong file, name or option. A policy without an answer is a row, not an error.
    """
    folder = output_folder(out) if out else None
    problem = read_problem(workload, cluster, options or Options())
    made = {name: make_policy(name, problem.cost) for name in references or policies()}
    alone = problem.alone()
    rows: list[dict[str, Any]] = []
    for index, (name, policy) in enumerate(made.items(), start=1):
        row, plan = _row(name, policy, problem.state(), alone)
        rows.append(row)
        if folder and plan:
            write_noun(plan, folder / f"plan-{index}-{re.sub('[^A-Za-z0-9]+', '-', name).strip('-')}.json")
        progress("plan", index, len(made))
    rows.sort(key=lambda r: (not r["feasible"], r["iteration_ns"] or 0, r["policy"]))
    body = {**problem.body(), **_best(rows), "rows": rows}
    if folder:
        write_text(folder / "compare.json", json_text(body))
    return body


def _row(name: str, policy: Policy, state: SystemState, alone: Alone) -> tuple[dict[str, Any], Plan | None]:
    """A policy's row; whatever it raises is its reason, so that one broken policy does not stop the others."""
    try:
        plan = timed_plan(policy, state)
        assert plan.predicted is not None
        return feasible_row(name, plan, plan.predicted, alone.per_task(plan, plan.predicted)), plan
    except MuxtuneError as error:
        return infeasible_row(name, str(error)), None
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"failed with {type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"
        return infeasible_row(name, reason), None


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fastest policy, and those that the cost model's error cannot tell from it."""
    feasible = [r for r in rows if r["feasible"]]
    if not feasible:
        return {"best": None, "unresolved": []}
    best = feasible[0]

    def close(row: dict[str, Any]) -> bool:
        difference = row["iteration_ns"] / best["iteration_ns"] - 1
        return bool(difference <= max(row["relative_error"], best["relative_error"]))

    return {"best": best["policy"], "unresolved": [r["policy"] for r in feasible[1:] if close(r)]}


def show(body: dict[str, Any]) -> str:
    """Feasible policies by iteration time, the others with their reasons."""
    feasible = [r for r in body["rows"] if r["feasible"]]
    parts: list[Any] = [problem_text(body)]
    if feasible:
        parts += [figures_table(feasible, body["best"]), "* fastest", time_table(feasible)]
    if body["unresolved"]:
        parts.append(f"within the cost model's error of {body['best']}: {', '.join(body['unresolved'])}")
    parts += [f"{r['policy']}: no plan: {r['reason']}" for r in body["rows"] if not r["feasible"]]
    return render(*parts, *([] if body["cost_model"]["calibrated"] else [UNCALIBRATED]))
