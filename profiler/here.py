"""Measure operators in this process, on whatever device it has: case by case, so that no more than one is in memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from muxtune.executor.reference import reference_ns
from muxtune.executor.solo import drawn_weights
from muxtune.executor.stage import StageModel
from muxtune.profiler.bench import Bench
from muxtune.profiler.cases import Case, needed_cases
from muxtune.profiler.clocks import choose_clock, flush
from muxtune.profiler.fit import fit
from muxtune.profiler.provenance import birth, revision
from muxtune.profiler.run import Row, calibration_plan
from muxtune.profiler.store import Meta, Store
from muxtune.sim.cost.table import FittedTable
from muxtune.spec.errors import NoAnswerError
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.task import Workload

REPEATS_CUDA = 5


def measure_here(
    workload: Workload,
    layouts: Sequence[Layout],
    device: torch.device,
    preset: str,
    deadline_s: float,
    rounds: int = 3,
) -> FittedTable:
    """A fitted table of the operators of a workload under some layouts, as one rank runs them; no collectives.

    Raises:
        NoAnswerError: not one round was finished by `deadline_s` (monotonic).
    """
    cases = needed_cases([workload], layouts)
    tasks = {t.task_id: t for t in workload.tasks}
    choose_clock(device)
    model = workload.model
    stage = StageModel(model, even_layout(model), 0, 0, device, seed=0, weights=drawn_weights(model, device))
    worker: Any = SimpleNamespace(device=device, groups={})
    bench = Bench(worker, model, tasks, stage, calibration_plan(workload))
    with tempfile.TemporaryDirectory(prefix="muxtune-") as folder:
        store = Store(Path(folder))
        store.open(Meta(device=preset, model=model, cases=cases, message_bytes=(), provenance=birth(preset)))
        for number in range(rounds):
            rows = _round(bench, cases, device, deadline_s)
            if not rows and not number:
                raise NoAnswerError(
                    f"{model.name}: the budget ended within the first round over {len(cases)} operators"
                )
            if not rows:
                break
            store.append(number, rows, revision=revision())
        return fit(store.folder, workload.tasks)


def _round(bench: Bench, cases: Sequence[Case], device: torch.device, deadline_s: float) -> list[Row]:
    """One pass over all cases; nothing where the time ends on the way."""
    rows: list[Row] = []
    for index, case in enumerate(cases):
        if time.monotonic() >= deadline_s:
            return []
        run = bench.build(case)
        run()
        reference = reference_ns(device)
        for _ in range(REPEATS_CUDA if device.type == "cuda" else 1):
            for direction, device_ns, host_ns in run():
                # Host work has no device time.
                spent_ns = host_ns if case.dtype == "host" and device.type == "cuda" else device_ns
                rows.append((index, direction, spent_ns, host_ns, reference))
        if device.type == "cuda":
            flush(device)
            direction, device_ns, host_ns = run()[0]
            rows.append((index, f"{direction}.flushed", device_ns, host_ns, reference))
    return rows
