"""execute: a Plan on real worker processes, iteration by iteration, each with a fresh draw of samples."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from muxtune.executor.group import WorkerGroup, measured_timeline
from muxtune.executor.joined import open_group
from muxtune.executor.messages import Inspect, Inspection, Rebind, Unload
from muxtune.executor.torchrun import leads
from muxtune.experiments.commands.inputs import Progress, output_file, output_folder, read_plan, silent
from muxtune.experiments.console import json_text, render, table
from muxtune.profiler.provenance import birth
from muxtune.spec.align import count_tokens
from muxtune.spec.bind import bind
from muxtune.spec.check import require_valid
from muxtune.spec.chrome import chrome_trace
from muxtune.spec.errors import InputError, NoAnswerError
from muxtune.spec.files import write_text
from muxtune.spec.memory import rank_peaks
from muxtune.spec.noun import plain
from muxtune.spec.plan import Plan
from muxtune.spec.program import Bound
from muxtune.spec.timeline import Timeline
from muxtune.spec.units import format_bytes, format_ns

Device = Literal["cpu", "cuda"]


def run(
    plan: Path,
    *,
    device: Device = "cpu",
    iterations: int = 5,
    trace: Path | None = None,
    seed: int = 0,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run `iterations` passes of the plan; `out` gets execute.json and trace.json (the last pass, measured).

    A pass on a second copy comes first: it counts memory and warms up, and its adapters are thrown away.

    Raises:
        InputError: wrong file or device. NoAnswerError: the plan is invalid or does not fit this machine.
        ExecutionError: a worker failed.
    """
    progress = progress if leads() else silent
    traces = [output_file(trace, "--trace")] if trace else []
    traces += [output_folder(out) / "trace.json"] if out else []
    found = read_plan(plan)
    require_valid(found, seed, str(plan))
    ranks = _ranks(found)
    if found.residency == "swapped":
        raise InputError(f"{plan}: residency `swapped`: the executor keeps every backbone; use `resident`")
    steps = math.lcm(*(i.steps for i in found.instances))
    bounds = [bind(found, seed=seed, steps=steps, first_step=i * steps) for i in range(iterations)]
    _require_room(bounds[0], device, ranks)
    with open_group(ranks, device) as group:
        peaks = _memory_pass(group, bounds[0], seed)
        progress("execute", 0, iterations)
        timelines = _passes(group, bounds, seed, progress)
        inspections: list[Inspection] = group.ask(Inspect(name="plan"))
    body = _body(found, bounds, timelines, inspections, device)
    body |= {"peak_bytes": max(peaks), "peak_bytes_per_rank": peaks, "seed": seed, "provenance": plain(birth(device))}
    if not leads():
        return body
    for path in traces:
        write_text(path, json.dumps(chrome_trace([(f"{found.made_by.policy} (measured)", timelines[-1])])))
    if out:
        write_text(out / "execute.json", json_text(body))
    return body


def _ranks(plan: Plan) -> int:
    """Worker processes that a plan needs: one for each device up to the last that it uses."""
    return 1 + max(d for i in plan.instances for d in i.devices)


def _require_room(bound: Bound, device: Device, ranks: int) -> None:
    """Refuse before any process is started: no such device, or more bytes than this machine has."""
    if device == "cuda":
        if torch.cuda.device_count() < ranks:
            raise InputError(
                f"--device cuda: the plan needs {ranks} GPUs, {torch.cuda.device_count()} are here: use --device cpu"
            )
        return
    needed = sum(p.peak_bytes for p in rank_peaks(bound))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise NoAnswerError(
            f"the plan's {ranks} ranks need {format_bytes(needed)}, this machine has {format_bytes(there)}: "
            "plan a smaller model"
        )


def _memory_pass(group: WorkerGroup, bound: Bound, seed: int) -> list[int]:
    group.load("warm-up", bound, seed)
    peaks = [r.peak_bytes or 0 for r in group.run("warm-up", memory=True)]
    group.ask(Unload(name="warm-up"))
    return peaks


def _passes(group: WorkerGroup, bounds: Sequence[Bound], seed: int, progress: Progress) -> list[Timeline]:
    timelines: list[Timeline] = []
    group.load("plan", bounds[0], seed)
    for number, bound in enumerate(bounds):
        if number:
            group.ask(Rebind(name="plan", bound=bound))
        timelines.append(measured_timeline(bound, group.run("plan")))
        progress("execute", number + 1, len(bounds))
    return timelines


def _body(
    plan: Plan,
    bounds: Sequence[Bound],
    timelines: Sequence[Timeline],
    inspections: Sequence[Inspection],
    device: Device,
) -> dict[str, Any]:
    times = sorted(t.iteration_ns for t in timelines)
    low, middle, high = _quantiles(times)
    tasks = [t.task_id for t in plan.workload.tasks]
    # Losses are known where the head is: on the ranks of the last stage.
    reports = {
        t: max((i.reports[t] for i in inspections if t in i.reports), key=lambda r: len(r.losses)) for t in tasks
    }
    billed_len = [(t.task_id, t.billed_len_tokens) for t in plan.workload.tasks]
    _, billed, _ = count_tokens((b for x in bounds for w in x.program.units for b in w.batches), billed_len)
    return {
        "workload": plan.workload.name,
        "policy": plan.made_by.policy,
        "device": device,
        "ranks": len(timelines[0].ranks),
        "iterations": len(timelines),
        "iteration_ns": {"p20": low, "p50": middle, "p80": high},
        "billed_tokens_per_s": billed / sum(x.program.steps for x in bounds) * 1e9 / middle,
        "losses": {t: list(r.losses) for t, r in reports.items()},
        "skipped_steps": {t: r.skipped for t, r in reports.items()},
        "plan_digest": plan.decision_digest(),
        "program_digests": [t.program_digest for t in timelines],
        "planned_for": plan.cluster.name,
    }


def _quantiles(ordered: Sequence[int]) -> tuple[int, int, int]:
    """p20, p50, p80; of one value three times itself."""
    if len(ordered) == 1:
        return ordered[0], ordered[0], ordered[0]
    cuts = statistics.quantiles(ordered, n=10, method="inclusive")
    return round(cuts[1]), round(cuts[4]), round(cuts[7])


def show(body: dict[str, Any]) -> str:
    """Times of an iteration, memory, and the first and last loss of every task."""
    times = body["iteration_ns"]
    rows = [[t, f"{x[0]:.4f}", f"{x[-1]:.4f}", str(body["skipped_steps"][t])] for t, x in body["losses"].items()]
    return render(
        f"{body['workload']} by {body['policy']} on {body['device']}, {body['ranks']} ranks, "
        f"{body['iterations']} iterations (planned for {body['planned_for']})",
        f"iteration {format_ns(times['p50'])} (p20 {format_ns(times['p20'])}, p80 {format_ns(times['p80'])}), "
        f"{body['billed_tokens_per_s']:,.0f} billed tokens/s, peak {format_bytes(body['peak_bytes'])}",
        table(["task", "first loss", "last loss", "skipped steps"], rows),
        f"plan {body['plan_digest']}",
    )
