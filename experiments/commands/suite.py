"""suite: policies over a folder of cases: iteration time relative to the best, reasons, geometric means, inversions.

A case that is done is kept in `OUT/cases`, and reused as long as its file, the question and the source are the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import combinations
from pathlib import Path
from typing import Any

from muxtune.experiments.cases import SUITE, case_files, read_case
from muxtune.experiments.commands.compare import answer
from muxtune.experiments.commands.inputs import Progress, output_folder, silent
from muxtune.experiments.commands.means import geometric_means, means_table
from muxtune.experiments.commands.problem import Options
from muxtune.experiments.commands.rows import UNCALIBRATED
from muxtune.experiments.console import json_text, render, table
from muxtune.policies.base import make_policy
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.files import write_text

#: All pad, but for `lorafusion`, which packs, and the last. Baselines that do not fit with a backbone for each task have a
#: second row in which one backbone at a time is there, its swap not timed. The budget of `search` is in evaluations, so that
#: its plans do not depend on the machine.
POLICIES = (
    *("hf-peft", "hf-peft:residency=swapped", "nemo", "nemo:residency=swapped", "sl-peft", "temporal", "lorafusion"),
    *("greedy", "muxtune", "muxtune:charge=exact", "ilp", "search:alignment=pad,evaluations=60"),
    "muxtune:charge=exact,alignment=varlen",
)
#: Solvers whose value is the surrogate W + Σ 2C·max_s L^s of the plan.
SURROGATE = ("contiguous-dp", "no-fusion", "greedy-merge", "listing", "random", "set-partitioning")
ROOT = Path(__file__).parents[2]
FLOORS = ("spec", "sim", "policies")
Case = dict[str, Any]


def run(
    folder: Path | None = None,
    references: Sequence[str] = (),
    options: Options | None = None,
    *,
    jobs: int = 1,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Every policy on every case; each case is one piece of work of a process, the largest files first.

    `out` gets cases/, suite.json and suite.md, and a run that was killed goes on from there.

    Raises:
        InputError: a wrong file, name or option. A policy without an answer is a row, not an error.
    """
    asked = options or Options()
    files = case_files(folder or SUITE)
    names = list(dict.fromkeys(references or POLICIES))
    for name in names:
        make_policy(name, Roofline())
    for path in files:
        read_case(path, asked)
    kept = output_folder(out) / "cases" if out else None
    found = _kept(files, names, asked, kept)
    progress("cases", len(found), len(files))
    for path, case in _run([f for f in files if f not in found], names, asked, jobs):
        found[path] = case
        if kept:
            write_text(kept / f"{path.stem}.json", json_text({"key": _key(path, names, asked), "case": case}))
        progress("cases", len(found), len(files))
    cases = [found[path] for path in files]
    body = {
        "policies": names,
        "cases": cases,
        "geometric_means": geometric_means(cases, names),
        "inversions": inversions(cases),
    }
    if out:
        write_text(out / "suite.json", json_text(body))
        write_text(out / "suite.md", markdown(body))
    return body


def _kept(files: Sequence[Path], names: Sequence[str], options: Options, folder: Path | None) -> dict[Path, Case]:
    """Cases of an earlier run that asked the same of the same source."""
    found: dict[Path, Case] = {}
    for path in files if folder else ():
        assert folder is not None
        before = folder / f"{path.stem}.json"
        if before.is_file():
            body = json.loads(before.read_text(encoding="utf-8"))
            if body["key"] == _key(path, names, options):
                found[path] = body["case"]
    return found


def _key(path: Path, names: Sequence[str], options: Options) -> str:
    """What decides a case's rows: its file, the policies, the options, and the source of the floors that plan."""
    digest = hashlib.sha256(repr((tuple(names), options)).encode())
    for each in (path, *(p for floor in FLOORS for p in sorted((ROOT / floor).rglob("*.py")))):
        digest.update(each.read_bytes())
    return digest.hexdigest()


def _run(files: Sequence[Path], names: Sequence[str], options: Options, jobs: int) -> Iterator[tuple[Path, Case]]:
    """Cases as they are done."""
    if jobs == 1:
        yield from ((path, _case(path, names, options)) for path in files)
        return
    # Spawned, not forked: a bar's thread may hold a lock while this process is copied.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        ordered = sorted(files, key=lambda p: (-p.stat().st_size, p.name))
        work = {pool.submit(_case, path, names, options): path for path in ordered}
        for done in as_completed(work):
            yield work[done], done.result()


def _case(path: Path, names: Sequence[str], options: Options) -> Case:
    problem = read_case(path, options)
    alone = problem.alone()
    rows = [answer(problem, name, alone)[0] for name in names]
    times = [r["iteration_ns"] for r in rows if r["feasible"]]
    for row in rows:
        row["relative"] = row["iteration_ns"] / min(times) if row["feasible"] else None
    layouts = [c.layout.name for c in problem.choices.kept] if problem.choices else []
    return {"case": path.stem, **problem.body(), "layouts": layouts, "tasks": len(problem.workload.tasks), "rows": rows}


def inversions(cases: Sequence[Case]) -> dict[str, Any]:
    """Pairs of plans that the simulator ranks otherwise than the surrogate, by policies and in all.

    `loss` is how much slower, simulated, the plan is that the surrogate prefers.
    """
    pairs = 0
    found: list[dict[str, Any]] = []
    for case in cases:
        for a, b in combinations([r for r in case["rows"] if _has_surrogate(r)], 2):
            guessed = a["solver"]["value_ns"] - b["solver"]["value_ns"]
            simulated = a["iteration_ns"] - b["iteration_ns"]
            pairs += guessed != 0
            if guessed * simulated < 0:
                low, high = sorted((a["iteration_ns"], b["iteration_ns"]))
                preferred, other = (a, b) if guessed < 0 else (b, a)
                names = {"preferred": preferred["policy"], "other": other["policy"]}
                found.append({"case": case["case"], **names, "loss": high / low - 1})
    return {"pairs": pairs, "inverted": len(found), "found": sorted(found, key=lambda x: (-x["loss"], x["case"]))}


def _has_surrogate(row: dict[str, Any]) -> bool:
    record = row["solver"]
    return bool(record and record["value_ns"] and record["name"].startswith(SURROGATE))


def show(body: dict[str, Any]) -> str:
    """The table policy × case, the reasons, the means and the inversions."""
    head = ["case", *body["policies"]]
    parts: list[Any] = [
        table(head, [_cells(case) for case in body["cases"]]),
        "iteration time over the best; - no plan",
    ]
    parts += _reasons(body["cases"])
    parts += [
        "geometric mean of the speed-ups over all cases",
        means_table(body["geometric_means"], len(body["cases"])),
    ]
    calibrated = body["cases"][0]["cost_model"]["calibrated"]
    return render(*parts, *_inversion_lines(body["inversions"]), *([] if calibrated else [UNCALIBRATED]))


def _cells(case: Case) -> list[str]:
    return [case["case"], *("-" if r["relative"] is None else f"{r['relative']:.2f}" for r in case["rows"])]


def _reasons(cases: Sequence[Case]) -> Iterator[str]:
    for case in cases:
        for row in case["rows"]:
            if not row["feasible"]:
                yield f"{case['case']}: {row['policy']}: no plan: {row['reason']}"


def _inversion_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"the simulator ranks {found['inverted']} of {found['pairs']} pairs of plans otherwise than the surrogate"
    for x in found["found"][:5]:
        yield f"  {x['case']}: {x['preferred']} before {x['other']}, simulated {100 * x['loss']:.1f} % slower"


def markdown(body: dict[str, Any]) -> str:
    """The same tables for a README: means first, then every case."""
    names = body["policies"]
    against = list(body["geometric_means"][0]["against"])
    lines = [*_row(["policy", "feasible", "mean over the best", *(f"vs {b}" for b in against)], head=True)]
    for place, mean in enumerate(body["geometric_means"]):
        times = [c["rows"][place]["relative"] for c in body["cases"]]
        done = [t for t in times if t is not None]
        over = math.exp(math.fsum(map(math.log, done)) / len(done)) if done else None
        cells = [mean["against"][b] for b in against]
        shown = ["-" if c["speedup"] is None else f"{c['speedup']:.2f}x" for c in cells]
        lines += _row([names[place], f"{len(done)}/{len(times)}", "-" if over is None else f"{over:.3f}", *shown])
    lines += ["", *_row(["case", *names], head=True)]
    for case in body["cases"]:
        lines += _row(_cells(case))
    return "\n".join([*lines, "", *_inversion_lines(body["inversions"])]) + "\n"


def _row(cells: Sequence[str], head: bool = False) -> list[str]:
    line = "| " + " | ".join(cells) + " |"
    return [line, "| --- " * len(cells) + "|"] if head else [line]
