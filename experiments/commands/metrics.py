"""What a training run says while it runs: metrics.jsonl, one line a task and step, and a line on standard error now and then."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from muxtune.executor.session import Iteration, ReplanReport
from muxtune.experiments.console import json_line
from muxtune.spec.align import Row
from muxtune.spec.errors import InputError
from muxtune.spec.files import require_writable, write_text
from muxtune.spec.noun import plain
from muxtune.spec.program import Bound
from muxtune.spec.units import format_ns

FILE = "metrics.jsonl"
#: Seconds between two lines on standard error, and tasks that one names.
EVERY_S, NAMED = 5.0, 8

Say = Callable[[str], None]


def quiet(text: str) -> None:
    """A Say that says nothing."""


class Metrics:
    """Writes metrics.jsonl into `out` (None: nowhere); a resumed run keeps the lines before its first iteration."""

    def __init__(self, out: Path | None, first: int, total: int, say: Say) -> None:
        self.total, self.say, self.said_s = total, say, -math.inf
        self.path = None if out is None else require_writable(out / FILE)
        if self.path is not None:
            kept = lines_before(self.path, first) if first else []
            write_text(self.path, "".join(kept))

    def iteration(self, done: Iteration) -> None:
        """Lines of one iteration; a skipped step is said at once."""
        counts = task_tokens(done.bound)
        lines = []
        for report in done.steps:
            billed_tokens, raw_tokens = counts[report.task]
            rate = billed_tokens * 1e9 / done.iteration_ns
            body = {"kind": "step", "iteration": done.number, **plain(report)}
            body |= {"billed_tokens": billed_tokens, "raw_tokens": raw_tokens}
            lines.append(body | {"provenance": {"iteration_ns": done.iteration_ns, "billed_tokens_per_s": rate}})
            if report.skipped:
                self.say(f"task {report.task}: step {report.step} skipped: gradient norm is {report.gradient_norm}")
        self._write(lines)
        now_s = time.monotonic()
        if done.number + 1 == self.total or now_s - self.said_s >= EVERY_S:
            self.said_s = now_s
            self.say(progress_text(done, self.total, counts))

    def replan(self, report: ReplanReport) -> None:
        """One line a change of plan."""
        body = plain(report)
        seconds = {name: body.pop(name) for name in list(body) if name.endswith("_seconds")}
        self._write([{"kind": "replan", **body, "provenance": seconds}])
        parts = [
            f"{', '.join(names)} {verb}" for names, verb in ((report.joined, "joined"), (report.left, "left")) if names
        ]
        self.say(f"before iteration {report.iteration}: {'; '.join(parts)} ({sum(seconds.values()):.2f} s)")

    def checkpoint(self, iteration: int, folder: Path, seconds: float) -> None:
        """One line a checkpoint, numbered by the last iteration that is in it."""
        body = {"kind": "checkpoint", "iteration": iteration - 1, "folder": folder.name}
        self._write([{**body, "provenance": {"save_seconds": seconds}}])

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(json_line, lines)))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}: make room") from error


def lines_before(path: Path, iteration: int) -> list[str]:
    """Whole lines of a metrics file that belong to earlier iterations; what a kill cut short is dropped."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            number = json.loads(line)["iteration"]
        except (ValueError, KeyError, TypeError):
            continue
        if number < iteration and line.endswith("\n"):
            kept.append(line)
    return kept


def task_tokens(bound: Bound) -> dict[str, tuple[int, int]]:
    """(billed, raw) tokens of one optimizer step of every task, averaged over the Program's steps."""
    rows: dict[str, list[Row]] = {t.task_id: [] for t in bound.plan.workload.tasks}
    for row in (row for w in bound.program.units for b in w.batches for row in b.rows):
        rows[row.task].append(row)
    return {
        t.task_id: (
            t.billed_len_tokens * t.global_batch_samples,
            sum(r.raw_tokens for r in rows[t.task_id]) // bound.program.steps,
        )
        for t in bound.plan.workload.tasks
    }


def progress_text(done: Iteration, total: int, counts: dict[str, tuple[int, int]]) -> str:
    """`iteration 3/10, 0.41 s: a loss 5.4321, 1,234 tokens/s; …` (billed tokens; the last step of each task)."""
    last = {r.task: r for r in done.steps}
    parts = [
        f"{t} loss {'?' if r.loss is None else f'{r.loss:.4f}'}, {counts[t][0] * 1e9 / done.iteration_ns:,.0f} tokens/s"
        for t, r in list(last.items())[:NAMED]
    ]
    parts += [f"and {len(last) - NAMED} more"] if len(last) > NAMED else []
    return f"iteration {done.number + 1}/{total}, {format_ns(done.iteration_ns)}: {'; '.join(parts)}"
