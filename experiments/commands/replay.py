"""replay: a trace of jobs on a cluster under several co-scheduling and cluster policies and seeds; or the smallest cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import Progress, output_folder, silent
from muxtune.experiments.commands.rows import UNCALIBRATED
from muxtune.experiments.console import json_text, render, table
from muxtune.experiments.replay_cell import Bench, Cell
from muxtune.experiments.replay_means import means
from muxtune.experiments.replay_report import interval_text, write_replay_report
from muxtune.experiments.replay_run import Shelves, run_cell
from muxtune.experiments.replay_size import most_nodes, parse_goal, smallest
from muxtune.experiments.spread import Engine, Interrupt, Keeper, run_cells
from muxtune.sim.cluster.random_faults import FaultRates
from muxtune.spec.errors import InputError
from muxtune.spec.files import write_text
from muxtune.spec.fleet import FleetCosts
from muxtune.spec.units import format_ns


def run(
    base: Cell,
    policies: Sequence[str],
    cluster_policies: Sequence[str],
    seeds: int = 1,
    *,
    size_for: str | None = None,
    engine: Engine = "pool",
    jobs: int = 1,
    resume: bool = False,
    job_rows: bool = False,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Every co-scheduling policy with every cluster policy and seed.

    One replay has its keys at the top; several stand in `rows`, with `means` over seeds. `out` gets replay.json, replay.html
    and every result in `cells`, as soon as it is there.

    Raises:
        InputError: wrong file, name or option. NoAnswerError: no cluster is large enough for `size_for`.
    """
    cells = [
        replace(base, policy=policy, cluster_policy=rule, seed=base.seed + seed)
        for policy in policies
        for rule in cluster_policies
        for seed in range(seeds)
    ]
    if size_for is not None:
        return _sized(cells, size_for, out, progress)
    return run_all(cells, engine=engine, jobs=jobs, resume=resume, job_rows=job_rows, out=out, progress=progress)


def run_all(
    cells: Sequence[Cell],
    *,
    engine: Engine,
    jobs: int,
    resume: bool,
    out: Path | None,
    progress: Progress,
    job_rows: bool = False,
    group: Sequence[str] = ("trace", "cluster", "policy", "cluster_policy"),
) -> dict[str, Any]:
    """Run cells and write what they give; see `run`.

    Raises:
        InputError: a wrong cell.
    """
    for option, given in (("--resume", resume), ("--job-rows", job_rows)):
        if given and out is None:
            raise InputError(f"{option} without --out: name the folder")
    for cell in {replace(c, seed=0): c for c in cells}.values():
        Bench(cell).require()
    folder = output_folder(out) if out else None

    def done(bodies: Sequence[dict[str, Any]]) -> None:
        if folder is not None:
            _write(bodies, folder, len(cells), group)

    bodies = run_cells(
        cells, engine=engine, jobs=jobs, keeper=Keeper(folder, resume, job_rows), progress=progress, done=done
    )
    done(bodies)
    return body_of(bodies, len(cells), group)


def body_of(bodies: Sequence[dict[str, Any]], expected: int, group: Sequence[str]) -> dict[str, Any]:
    """One replay's own body, or rows and means."""
    if expected == 1 and bodies:
        return bodies[0]
    complete = len(bodies) == expected and all(b["complete"] for b in bodies)
    return {"complete": complete, "replays": expected, "rows": list(bodies), "means": means(bodies, group)}


def _write(bodies: Sequence[dict[str, Any]], folder: Path, expected: int, group: Sequence[str]) -> None:
    body = body_of(bodies, expected, group)
    write_text(folder / "replay.json", json_text(body))
    write_replay_report(bodies, means(bodies, group), folder / "replay.html", expected=expected)


def _sized(cells: Sequence[Cell], text: str, out: Path | None, progress: Progress) -> dict[str, Any]:
    """The smallest cluster for each cell."""
    goal = parse_goal(text)
    for cell in cells:
        most_nodes(cell)
    folder = output_folder(out) if out else None
    shelves: Shelves = {}
    found: list[dict[str, Any]] = []
    with Interrupt() as stop:

        def one(cell: Cell) -> dict[str, Any]:
            body = run_cell(cell, stop, shelves=shelves)
            if stop.asked:
                raise KeyboardInterrupt
            progress(f"size for {goal.text}: {cell.clusters[0]}", 1, 1)
            return body

        for cell in cells:
            body, tried = smallest(cell, goal, one)
            found.append({**body, "size_for": goal.text, "smallest_cluster": body["cluster"], "tried": tried})
            if folder is not None:
                _write(found, folder, len(cells), GROUP)
    return found[0] if len(found) == 1 else body_of(found, len(cells), GROUP)


GROUP = ("trace", "cluster", "policy", "cluster_policy")


def parse_pairs(option: str, text: str, kind: type[Any], scale_ns: bool = False) -> tuple[tuple[str, float], ...]:
    """`key=value,…` of the fields of a noun; with `scale_ns` a field X_ns is written X_s=SECONDS.

    Raises:
        InputError: an unknown key, or a value that the noun refuses.
    """
    names = {f.name.replace("_ns", "_s") if scale_ns else f.name: f.name for f in dataclasses.fields(kind)}
    found: dict[str, float] = {}
    for piece in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = piece.partition("=")
        if not equals or key not in names:
            raise InputError(f"{option} {text}: {piece!r}: expected KEY=NUMBER with a key of {', '.join(names)}")
        try:
            number = float(value)
        except ValueError as error:
            raise InputError(f"{option} {text}: {piece!r}: expected a number") from error
        found[names[key]] = number * 1e9 if scale_ns and names[key].endswith("_ns") else number
    try:
        kind(**{k: round(v) for k, v in found.items()} if scale_ns else found)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{option} {text}: {error}") from error
    return tuple(found.items())


def parse_costs(text: str) -> tuple[tuple[str, float], ...]:
    """`replan_s=2,join_s=1,…`."""
    return parse_pairs("--costs", text, FleetCosts, scale_ns=True)


def parse_faults(text: str) -> tuple[tuple[tuple[str, float], ...], str | None]:
    """(rates, failure trace) of `gpu_mtbf_h=500,repair_h=2,…` or a file."""
    if "=" in text:
        return parse_pairs("--faults", text, FaultRates), None
    return (), text or None


def show(body: dict[str, Any]) -> str:
    """A table of the replays, then means over seeds."""
    bodies = body.get("rows", [body])
    if not bodies:
        return render("interrupted before any replay")
    names = (
        "policy",
        "cluster policy",
        "seed",
        "jobs",
        "done",
        "tok/s",
        "JCT mean",
        "p95",
        "queue mean",
        "busy",
        "SLO",
    )
    parts: list[Any] = [f"{bodies[0]['trace']} on {bodies[0]['cluster']}", table(names, [_cells(b) for b in bodies])]
    for found in bodies:
        if "smallest_cluster" in found:
            tried = ", ".join(f"{t['cluster']}: {_value(t)}" for t in found["tried"])
            parts.append(f"smallest for {found['size_for']}: {found['smallest_cluster']} (tried {tried})")
    rows = [r for r in body.get("means", ()) if len(r["seeds"]) > 1]
    if rows:
        heads = ("policy", "cluster policy", "seeds", "tok/s", "mean JCT (h)")
        shown = (("billed_tokens_per_s", 1.0), ("jct_s.mean", 3600.0))
        cells = [
            [r["policy"], r["cluster_policy"], str(len(r["seeds"])), *(interval_text(r[n], unit) for n, unit in shown)]
            for r in rows
        ]
        parts.append(table(heads, cells, title="means over seeds, 95 % confidence"))
    parts += [f"  {text}" for text in dict.fromkeys(s for b in bodies for s in b["statements"])]
    if not all(b["complete"] for b in bodies):
        parts.append("PARTIAL: interrupted; what is shown is valid up to there")
    return render(*parts, *([] if bodies[0]["cost_model"]["calibrated"] else [UNCALIBRATED]))


def _value(tried: dict[str, Any]) -> str:
    return "-" if tried["value"] is None else f"{tried['value']:,.4g}" + ("" if tried["met"] else " (no)")


def _cells(body: dict[str, Any]) -> list[str]:
    def time(seconds: float | None) -> str:
        if seconds is None:
            return "-"
        return f"{seconds / 3600:,.2f} h" if seconds >= 3600 else format_ns(seconds * 1e9)

    slo = body["slo_attainment"]
    return [
        body["policy"],
        body["cluster_policy"],
        str(body["seed"]),
        f"{body['jobs']:,}",
        f"{body['completed']:,}",
        f"{body['billed_tokens_per_s']:,.0f}",
        time(body["jct_s"]["mean"]),
        time(body["jct_s"]["p95"]),
        time(body["queue_s"]["mean"]),
        f"{100 * body['gpu_share']['busy']:.1f} %",
        "-" if slo is None else f"{100 * slo:.1f} %",
    ]
