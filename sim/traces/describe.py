"""What a trace holds: counts, percentiles, and arrivals over time; one pass, a few numbers a job kept."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np

from muxtune.spec.jobs import Job, Trace
from muxtune.spec.noun import noun
from muxtune.spec.units import NS_PER_S

SHARES = (5, 25, 50, 75, 95, 99)
#: Bins of the arrivals over time, and of the cumulative curves.
BINS, CURVE_POINTS = 100, 101
TOP = 10


@noun
class Spread:
    """How the values of one column are spread; `quantiles` are p0, p1, …, p100 of the empirical distribution."""

    count: int
    mean: float
    std: float
    least: float
    most: float
    percentiles: tuple[tuple[str, float], ...]
    quantiles: tuple[float, ...]


@noun
class Description:
    """A whole trace in figures. `classes` counts distinct (model, PEFT, data set, billed length, batch)."""

    jobs: int
    span_s: float
    arrivals_per_minute: float
    bin_s: float
    arrivals: tuple[int, ...]
    duration_s: Spread | None
    steps: Spread | None
    gpus: Spread | None
    gpu_hours: float | None
    tenants: int
    top_tenants: tuple[tuple[str, int], ...]
    models: tuple[tuple[str, int], ...]
    datasets: tuple[tuple[str, int], ...]
    batches: tuple[tuple[str, int], ...]
    pefts: tuple[tuple[str, int], ...]
    classes: int
    with_deadline: int
    with_cancel: int


class _Columns:
    """Numbers of the jobs seen so far; -1 stands for None."""

    def __init__(self) -> None:
        self.numbers = {name: array("q") for name in ("arrival_ns", "duration_ns", "steps", "gpus_milli")}
        self.counts: dict[str, Counter[str]] = {n: Counter() for n in ("tenant", "model", "dataset", "batch", "peft")}
        self.classes: set[tuple[object, ...]] = set()
        self.with_deadline = self.with_cancel = 0

    def add(self, job: Job) -> None:
        for name, column in self.numbers.items():
            value = getattr(job, name)
            column.append(-1 if value is None else value)
        rank = getattr(job.peft, "rank", None)
        peft = job.peft.kind if rank is None else f"{job.peft.kind} of rank {rank}"
        values = (job.tenant, job.model, job.dataset, str(job.global_batch_samples), peft)
        for counter, value in zip(self.counts.values(), values, strict=True):
            counter[value] += 1
        self.classes.add((job.model, job.peft, job.dataset, job.billed_len_tokens, job.global_batch_samples))
        self.with_deadline += job.deadline_ns is not None
        self.with_cancel += job.cancel_ns is not None

    def known(self, name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        values = np.frombuffer(self.numbers[name], dtype=np.int64)
        return values[values >= 0].astype(np.float64)


def describe(trace: Trace) -> Description:
    """Read the whole trace.

    Raises:
        InputError: a bad row.
    """
    columns = _Columns()
    for job in trace:
        columns.add(job)
    arrival_s = columns.known("arrival_ns") / NS_PER_S
    jobs = len(arrival_s)
    span_s = float(arrival_s[-1] - arrival_s[0]) if jobs else 0.0
    first_s = float(arrival_s[0]) if jobs else 0.0
    bins, _ = np.histogram(arrival_s, bins=BINS, range=(first_s, first_s + (span_s or 1.0)))
    ran = np.frombuffer(columns.numbers["duration_ns"], dtype=np.int64)
    gpus = np.frombuffer(columns.numbers["gpus_milli"], dtype=np.int64)
    both = (ran >= 0) & (gpus >= 0)
    return Description(
        jobs=jobs,
        span_s=span_s,
        arrivals_per_minute=(jobs - 1) / (span_s / 60) if span_s else 0.0,
        bin_s=span_s / BINS,
        arrivals=tuple(int(n) for n in bins),
        duration_s=_spread(columns.known("duration_ns") / NS_PER_S),
        steps=_spread(columns.known("steps")),
        gpus=_spread(columns.known("gpus_milli") / 1000),
        gpu_hours=float(np.sum(ran[both] / NS_PER_S * (gpus[both] / 1000)) / 3600) if both.any() else None,
        tenants=len(columns.counts["tenant"]),
        top_tenants=_top(columns.counts["tenant"]),
        models=_top(columns.counts["model"]),
        datasets=_top(columns.counts["dataset"]),
        batches=_top(columns.counts["batch"]),
        pefts=_top(columns.counts["peft"]),
        classes=len(columns.classes),
        with_deadline=columns.with_deadline,
        with_cancel=columns.with_cancel,
    )


def _spread(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Spread | None:
    """None where no job has the column."""
    if not len(values):
        return None
    quantiles = np.percentile(values, np.linspace(0, 100, CURVE_POINTS), method="inverted_cdf")
    return Spread(
        count=len(values),
        mean=float(values.mean()),
        std=float(values.std()),
        least=float(values.min()),
        most=float(values.max()),
        percentiles=tuple((f"p{share}", float(quantiles[share])) for share in SHARES),
        quantiles=tuple(float(q) for q in quantiles),
    )


def _top(counter: Counter[str]) -> tuple[tuple[str, int], ...]:
    """The most frequent, equal ones by name."""
    ordered: Sequence[tuple[str, int]] = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    return tuple(ordered[:TOP])
