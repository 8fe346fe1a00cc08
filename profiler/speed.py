"""How fast a machine is while something else is measured: the reference GEMM on every rank, and waits for a core."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from muxtune.executor.group import WorkerGroup
from muxtune.executor.messages import Call
from muxtune.executor.reference import reference_ns


def reference_round(worker: Any) -> int:
    """Time of the reference GEMM on this rank, right now."""
    return reference_ns(worker.device)


def group_reference_ns(group: WorkerGroup) -> float:
    """Mean over the ranks."""
    return statistics.fmean(group.ask(Call(function="muxtune.profiler.speed:reference_round")))


def waited_s(group: WorkerGroup) -> float:
    """Seconds that the ranks' threads were ready and had no core so far (Linux schedstat; 0 where it is not kept)."""
    files = [f for p in group.processes for f in Path(f"/proc/{p.pid}/task").glob("*/schedstat")]
    return sum(int(f.read_text().split()[1]) for f in files) / 1e9
