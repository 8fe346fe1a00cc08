"""compare: every policy plans every workload on every cluster; one row each, best first, and means over the cases."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import Progress, output_folder, silent
from muxtune.experiments.commands.means import geometric_means, means_table
from muxtune.experiments.commands.pareto import mark, pareto_table
from muxtune.experiments.commands.plan import timed_plan, with_alone
from muxtune.experiments.commands.problem import Options, Problem, problem_text, read_problem
from muxtune.experiments.commands.rows import (
    UNCALIBRATED,
    corun_text,
    feasible_row,
    figures_table,
    infeasible_row,
    time_table,
)
from muxtune.experiments.console import json_text, render
from muxtune.policies.alone import Alone
from muxtune.policies.base import make_policy, policies
from muxtune.spec.errors import InputError, MuxtuneError
from muxtune.spec.files import write_noun, write_text
from muxtune.spec.plan import Plan

#: A policy's row and, where it has one, its plan.
Answered = tuple[dict[str, Any], Plan | None]


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
    if text and not found:
        raise InputError(f"--policies {text}: names no policy: write them as a,b,c, or leave the option out for all")
    return tuple(found)


def run(
    workloads: Sequence[Path],
    clusters: Sequence[str],
    references: Sequence[str] = (),
    options: Options | None = None,
    *,
    jobs: int = 1,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """One row a policy (all of them by default) for each workload on each cluster; `out` gets compare.json, plans, a chart.

    Rows stand in the order of the goal, fastest first without one; with `options.pareto` the best trade-offs are marked.
    One case has its keys at the top; several stand in `cases`, with `geometric_means` beside them. `jobs` processes share the
    work; what they find does not depend on how many there are.

    Raises:
        InputError: wrong file, name or option. A policy without an answer is a row, not an error.
    """
    folder = output_folder(out) if out else None
    problems = [read_problem(w, c, options or Options()) for w in workloads for c in clusters]
    names = list(dict.fromkeys(references or policies()))
    for name in names:
        make_policy(name, problems[0].cost)
    answers = _answers(problems, names, jobs)
    cases: list[dict[str, Any]] = []
    for index, problem in enumerate(problems):
        found: list[Answered] = []
        for place, name in enumerate(names, start=1):
            row, plan = next(answers)
            found.append((row, plan))
            if folder and plan:
                home = folder if len(problems) == 1 else output_folder(folder / _case_name(index, problem))
                write_noun(plan, home / f"plan-{place}-{_slug(name)}.json")
            progress("plan", index * len(names) + place, len(problems) * len(names))
        cases.append(_case(problem, found))
    body = cases[0] if len(cases) == 1 else {"cases": cases, "geometric_means": geometric_means(cases, names)}
    if folder:
        _write(folder, body, cases)
    return body


def _case(problem: Problem, found: Sequence[Answered]) -> dict[str, Any]:
    """Rows in the order of the goal, those without a plan last."""

    def place(answered: Answered) -> tuple[Any, ...]:
        row, plan = answered
        if plan is None or plan.predicted is None:
            return (True, (), row["policy"])
        return (False, problem.options.goal.rank(plan.workload, plan.predicted), row["policy"])

    ordered = sorted(found, key=place)
    rows = [row for row, _ in ordered]
    case = {**problem.body(), **_best(rows, problem.options.goal.objective), "rows": rows}
    if problem.options.pareto:
        mark(case, [plan for _, plan in ordered], problem.options.pareto)
    return case


def _write(folder: Path, body: dict[str, Any], cases: Sequence[dict[str, Any]]) -> None:
    from muxtune.experiments.plots.compare import bars
    from muxtune.experiments.plots.pareto import scatter

    write_text(folder / "compare.json", json_text(body))
    write_text(folder / "compare.svg", bars(cases))
    if "pareto" in cases[0]:
        write_text(folder / "pareto.svg", scatter(cases))


def answered(body: dict[str, Any]) -> bool:
    """Whether some policy has a plan in every case."""
    return all(case["best"] is not None for case in body.get("cases", [body]))


def _answers(problems: Sequence[Problem], names: Sequence[str], jobs: int) -> Iterator[Answered]:
    """Problem by problem, policy by policy."""
    if jobs == 1:
        for problem in problems:
            alone = problem.alone()
            yield from (answer(problem, name, alone) for name in names)
        return
    work = [(problem, name) for problem in problems for name in names]
    # Spawned, not forked: a bar's thread may hold a lock while this process is copied.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_answer_of, work)


def _answer_of(work: tuple[Problem, str]) -> Answered:
    problem, name = work
    return answer(problem, name, problem.alone())


def answer(problem: Problem, name: str, alone: Alone) -> Answered:
    """A policy's row; whatever it raises is its reason, so that one broken policy does not stop the others."""
    try:
        plan = with_alone(timed_plan(make_policy(name, problem.cost), problem.state(), problem.choices), alone)
        assert plan.predicted is not None
        return feasible_row(name, plan, plan.predicted, problem.options.objectives), plan
    except MuxtuneError as error:
        return infeasible_row(name, str(error)), None
    except Exception as error:
        # timed_plan names what a policy raises; this is a prediction that fails on what it planned.
        return infeasible_row(name, f"failed with {type(error).__name__}: {error}"), None


def _slug(text: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "-", text).strip("-")


def _case_name(index: int, problem: Problem) -> str:
    return f"{index + 1}-{_slug(problem.workload.name)}-{_slug(problem.cluster.name)}"


def _best(rows: Sequence[dict[str, Any]], objective: str) -> dict[str, Any]:
    """The policy that is best by the objective, and those that the cost model's error cannot tell from it."""
    feasible = [r for r in rows if r["feasible"]]
    if not feasible:
        return {"best": None, "unresolved": []}
    best = feasible[0]

    def close(row: dict[str, Any]) -> bool:
        if objective == "throughput":
            value, least = row["iteration_ns"], best["iteration_ns"]
        else:
            value, least = row["objectives"][objective], best["objectives"][objective]
        return bool(value <= least * (1 + max(row["relative_error"], best["relative_error"])))

    return {"best": best["policy"], "unresolved": [r["policy"] for r in feasible[1:] if close(r)]}


def show(body: dict[str, Any]) -> str:
    """A table a case, then the means."""
    cases = body.get("cases", [body])
    parts: list[Any] = [part for case in cases for part in _case_parts(case)]
    if "cases" in body:
        parts += ["geometric mean of the speed-ups over all cases", means_table(body["geometric_means"], len(cases))]
    return render(*parts, *([] if cases[0]["cost_model"]["calibrated"] else [UNCALIBRATED]))


def _case_parts(case: dict[str, Any]) -> Iterator[Any]:
    """Feasible policies by iteration time, the others with their reasons."""
    feasible = [r for r in case["rows"] if r["feasible"]]
    yield problem_text(case)
    if feasible:
        star = "* fastest" if case["objective"] == "throughput" else f"* best by {case['objective']}"
        yield from (figures_table(feasible, case["best"], [case["objective"]]), star, time_table(feasible))
        if "pareto" in case:
            yield from (pareto_table(case), "+ no other policy is better in one and as good in the other")
        yield from (text for row in feasible for text in corun_text(row))
    if case["unresolved"]:
        yield f"within the cost model's error of {case['best']}: {', '.join(case['unresolved'])}"
    yield from (f"{r['policy']}: no plan: {r['reason']}" for r in case["rows"] if not r["feasible"])
