"""Bench of job traces: CPU time and Python's memory a job, for ten times as many jobs."""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

from muxtune.sim.traces.formats.base import TraceOptions
from muxtune.sim.traces.formats.muxtune import write_trace
from muxtune.sim.traces.generate import Arrivals
from muxtune.sim.traces.trace import generate, open_trace
from muxtune.spec.jobs import Trace

JOBS = (10_000, 100_000)


def lines() -> Iterator[str]:
    """Generating, writing, and reading back in our format."""
    with tempfile.TemporaryDirectory() as folder:
        for what in ("generate and write", "read back"):
            costs = []
            for jobs in JOBS:
                made = generate(Arrivals(days=None, jobs=jobs), TraceOptions())
                path = Path(folder) / f"{jobs}.jsonl"
                start_s = time.process_time()
                if what == "read back":
                    count(open_trace(str(path)))
                else:
                    write_trace(made, path)
                costs.append((time.process_time() - start_s) / jobs)
            small, large = costs
            yield (
                f"trace, {what}: {1e6 * large:.0f} us CPU a job of {JOBS[1]:,}, "
                f"{large / small:.2f} x a job of {JOBS[0]:,} (target 1: flat)"
            )
        peaks = [peak_bytes(open_trace(str(Path(folder) / f"{jobs}.jsonl"))) for jobs in JOBS]
    yield f"trace, memory while reading: {(peaks[1] - peaks[0]) / (JOBS[1] - JOBS[0]):.0f} bytes a job more (its id)"


def count(trace: Trace) -> int:
    """Read a whole trace."""
    return sum(1 for _ in trace)


def peak_bytes(trace: Trace) -> int:
    """Peak of Python's memory over one reading."""
    tracemalloc.start()
    count(trace)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
