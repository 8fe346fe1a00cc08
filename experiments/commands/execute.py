"""execute: train by a Plan on real worker processes, iteration by iteration, each with a fresh draw of samples."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from muxtune.executor.checkpoint import Checkpoint, checkpoints, locked, newest_checkpoint
from muxtune.executor.group import WorkerGroup, require_runnable
from muxtune.executor.joined import open_group
from muxtune.executor.layer_spec import LAYER_SPECS
from muxtune.executor.messages import Unload
from muxtune.executor.reports import StepReport
from muxtune.executor.session import Session
from muxtune.executor.torchrun import leads
from muxtune.experiments.commands import baseline
from muxtune.experiments.commands.feed import read_feed
from muxtune.experiments.commands.inputs import Progress, output_file, output_folder, read_plan, silent
from muxtune.experiments.commands.metrics import Metrics, Say, quiet
from muxtune.experiments.commands.training import Changes, Trained, require_reachable, train
from muxtune.experiments.console import json_text, render, table
from muxtune.kernels._choice import VARIABLE, Kernel, chosen
from muxtune.profiler.provenance import birth
from muxtune.spec.bind import bind
from muxtune.spec.check import require_valid
from muxtune.spec.chrome import chrome_trace
from muxtune.spec.errors import InputError, NoAnswerError
from muxtune.spec.files import write_text
from muxtune.spec.memory import rank_peaks
from muxtune.spec.noun import plain
from muxtune.spec.plan import Plan
from muxtune.spec.program import Bound
from muxtune.spec.units import format_bytes, format_ns

Device = Literal["cpu", "cuda"]


NO_CHANGES = Changes()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Options of training. `checkpoint` None saves nothing; `every` counts iterations between two saves.

    `layer_spec` is `auto`, `te` or `local`; `deterministic` refuses operators that may give other bits the next time.
    `backbone` is a Hugging Face folder to read weights from, `data` the folder that text data sets are in.
    """

    checkpoint: Path | None = None
    every: int = 10
    keep: int = 3
    resume: bool = False
    changes: Changes = NO_CHANGES
    deterministic: bool = False
    layer_spec: str = "auto"
    backbone: Path | None = None
    data: Path | None = None


def run(
    plan: Path,
    *,
    device: Device = "cpu",
    iterations: int = 5,
    kernel: Kernel = "auto",
    trace: Path | None = None,
    seed: int = 0,
    out: Path | None = None,
    training: TrainOptions | None = None,
    progress: Progress = silent,
    say: Say = quiet,
) -> dict[str, Any]:
    """Train by the plan for `iterations` passes, or until every task has taken its steps.

    `out` gets execute.json, metrics.jsonl and trace.json (the last pass, measured). A pass on a second copy comes first: it
    counts memory and warms up, and its adapters are thrown away.

    Raises:
        InputError: wrong file or device, a checkpoint that is not whole or of another run. NoAnswerError: the plan is
            invalid or does not fit this machine. ExecutionError: a worker failed.
    """
    options = training or TrainOptions()
    if options.layer_spec not in LAYER_SPECS:
        raise InputError(f"--layer-spec {options.layer_spec!r}: known are {', '.join(LAYER_SPECS)}")
    if not leads():
        progress, say, out, trace = silent, quiet, None, None
    traces = [output_file(trace, "--trace")] if trace else []
    traces += [output_file(output_folder(out) / "trace.json")] if out else []
    found = read_plan(plan)
    require_valid(found, seed, str(plan))
    require_runnable(found, f"{plan}: ")
    ranks = _ranks(found)
    bound = bind(found, seed=seed)
    _require_room(bound, device, ranks)
    require_reachable(options.changes, found, iterations, seed)
    used = _choose_kernel(kernel, device)
    food = read_feed(options.backbone, options.data, [found.workload, *(w for _, w in options.changes.joins)])
    with _held(options.checkpoint):
        start = starting_point(options, found, seed)
        metrics = Metrics(out, start.manifest.iteration if start else 0, iterations, say)
        with open_group(ranks, device, options.deterministic, options.layer_spec) as group:
            group.ask(food)
            memory = memory_pass(group, bound, seed)
            session = _session(group, found, seed, options, start, say)
            progress("execute", session.iteration, iterations)
            done = train(session, iterations, options.changes, metrics, options.every, options.keep, progress)
            curves = session.curves()
    body = _body(found, done, curves, device, ranks)
    body |= {"seed": seed, "resumed_at": start.manifest.iteration if start else None, "memory": memory}
    peaks = [x["peak_bytes"] for x in memory]
    body |= {"peak_bytes": max(peaks), "peak_bytes_per_rank": peaks, "kernel": used}
    body |= {"backbone": str(options.backbone or "random weights"), "texts": sorted(food.texts)}
    body["provenance"] = plain(birth(device))
    if done.last is not None and traces:
        trace_text = json.dumps(chrome_trace([(f"{found.made_by.policy} (measured)", done.last.timeline())]))
        for path in traces:
            write_text(path, trace_text)
    if out:
        write_text(out / "execute.json", json_text(body))
    return body


def _held(checkpoint: Path | None) -> AbstractContextManager[None]:
    """The checkpoint folder, held by this process; under torchrun rank 0 holds it for all."""
    if checkpoint is None or not leads():
        return nullcontext()
    return locked(output_folder(checkpoint, "--checkpoint"))


def starting_point(options: TrainOptions, plan: Plan, seed: int) -> Checkpoint | None:
    """The checkpoint to go on from; None for a run from the start.

    Raises:
        InputError: --resume without a folder, a checkpoint of another plan or seed or one that is not whole, or a folder
            with checkpoints and no --resume.
    """
    root = options.checkpoint
    if root is None:
        if options.resume:
            raise InputError("--resume: from where? give --checkpoint DIR as well")
        return None
    if not options.resume:
        if there := checkpoints(root):
            raise InputError(
                f"--checkpoint {root}: holds {there[0].name}: add --resume to go on from it, or give another folder"
            )
        return None
    found = newest_checkpoint(root)
    if found is not None:
        for name, here, wanted in (
            ("plan", found.manifest.run_digest, plan.decision_digest()),
            ("seed", found.manifest.seed, seed),
        ):
            if here != wanted:
                raise InputError(
                    f"{found.folder}: its run began with {name} {here}, this one has {name} {wanted}: resume with the "
                    f"{name} it began with, or give another --checkpoint"
                )
    return found


def _session(
    group: WorkerGroup, plan: Plan, seed: int, options: TrainOptions, start: Checkpoint | None, say: Say
) -> Session:
    if start is not None:
        assert options.checkpoint is not None
        say(f"resuming after iteration {start.manifest.iteration} from {start.folder}")
        return Session.resume(group, start, options.checkpoint)
    if options.resume:
        say(f"--resume: {options.checkpoint} holds no checkpoint yet: starting from the beginning")
    return Session(group, plan, seed, options.checkpoint)


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


def _choose_kernel(kernel: Kernel, device: Device) -> str:
    """Set the back end of grouped LoRA for the workers that start from now on, and say which one they will use."""
    try:
        used = chosen(torch.device(device), kernel)
    except ValueError as error:
        raise InputError(f"--kernel {kernel}: {error}") from error
    os.environ[VARIABLE] = kernel
    return used


def memory_pass(group: WorkerGroup, bound: Bound, seed: int) -> list[dict[str, int]]:
    """Bytes of each rank: what stays by kind, the peak measured over a whole pass, and the peak that was predicted."""
    group.load("warm-up", bound, seed)
    results = group.run("warm-up", memory=True, reference=False)
    group.ask(Unload(name="warm-up"))
    predicted = {p.rank: p.peak_bytes for p in rank_peaks(bound)}
    found = []
    for result in results:
        backbone, adapters, optimizer = result.kinds or (0, 0, 0)
        found.append(
            {
                "rank": result.rank,
                "peak_bytes": result.peak_bytes or 0,
                "predicted_peak_bytes": predicted.get(result.rank, 0),
                "backbone_bytes": backbone,
                "adapter_bytes": adapters,
                "optimizer_bytes": optimizer,
            }
        )
    return found


def _body(
    plan: Plan, done: Trained, curves: Mapping[str, Sequence[StepReport]], device: Device, ranks: int
) -> dict[str, Any]:
    low, middle, high = _quantiles(sorted(done.times_ns))
    count = len(done.times_ns)
    return {
        "workload": plan.workload.name,
        "policy": plan.made_by.policy,
        "device": device,
        "ranks": ranks,
        "iterations": count,
        "iteration_ns": {"p20": low, "p50": middle, "p80": high},
        "billed_tokens_per_s": done.billed_tokens / count * 1e9 / middle if middle else None,
        "losses": {t: [r.loss for r in reports] for t, reports in curves.items()},
        "learning_rates": {t: [r.learning_rate for r in reports] for t, reports in curves.items()},
        "gradient_norms": {t: [r.gradient_norm for r in reports] for t, reports in curves.items()},
        "skipped_steps": {t: sum(r.skipped for r in reports) for t, reports in curves.items()},
        "skips": {t: [r.step for r in reports if r.skipped] for t, reports in curves.items()},
        "plan_digest": plan.decision_digest(),
        "program_digests": done.program_digests,
        "planned_for": plan.cluster.name,
        "replans": [plain(r) for r in done.replans],
        "save_seconds": done.save_seconds,
    }


def _quantiles(ordered: Sequence[int]) -> tuple[int | None, int | None, int | None]:
    """p20, p50, p80; of one value three times itself, of none nothing (a resumed run that was done already)."""
    if len(ordered) < 2:
        only = ordered[0] if ordered else None
        return only, only, only
    cuts = statistics.quantiles(ordered, n=10, method="inclusive")
    return round(cuts[1]), round(cuts[4]), round(cuts[7])


def show(body: dict[str, Any]) -> str:
    """Times of an iteration, memory, and the first and last loss of every task."""
    times = body["iteration_ns"]
    rows = [
        [t, str(len(x)), *(_loss(x[i] if x else None) for i in (0, -1)), str(body["skipped_steps"][t])]
        for t, x in body["losses"].items()
    ]
    speed = (
        f"iteration {format_ns(times['p50'])} (p20 {format_ns(times['p20'])}, p80 {format_ns(times['p80'])}), "
        f"{body['billed_tokens_per_s']:,.0f} billed tokens/s, peak {format_bytes(body['peak_bytes'])}"
        if times["p50"]
        else "nothing was left to do"
    )
    return render(
        f"{body['workload']} by {body['policy']} on {body['device']}, {body['ranks']} ranks, "
        f"{body['iterations']} iterations (planned for {body['planned_for']})",
        speed,
        table(["task", "steps", "first loss", "last loss", "skipped steps"], rows),
        *(_memory_text(x) for x in body["memory"]),
        *(_replan_text(x) for x in body["replans"]),
        *([baseline.text(body["baseline"])] if "baseline" in body else []),
        f"plan {body['plan_digest']}",
    )


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _memory_text(rank: dict[str, int]) -> str:
    kinds = ", ".join(f"{k} {format_bytes(rank[f'{k}_bytes'])}" for k in ("backbone", "adapter", "optimizer"))
    peak, predicted = (format_bytes(rank[k]) for k in ("peak_bytes", "predicted_peak_bytes"))
    return f"memory of rank {rank['rank']}: peak {peak} (predicted {predicted}); of it {kinds}"


def _replan_text(replan: dict[str, Any]) -> str:
    changes = [f"{', '.join(replan[k])} {k}" for k in ("joined", "left") if replan[k]]
    parts = ", ".join(f"{k} {replan[f'{k}_seconds']:.3f} s" for k in ("plan", "check", "save", "apply"))
    return f"before iteration {replan['iteration']}: {'; '.join(changes)} ({parts})"
