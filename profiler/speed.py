"""The reference GEMM on every rank between two iterations: how fast a machine is while something else is measured."""

from __future__ import annotations

import statistics
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
