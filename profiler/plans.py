"""Measure plans head to head: A B A B …, each iteration beside the reference GEMM; medians of ratios over all rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from muxtune.executor.group import WorkerGroup, measured_timeline
from muxtune.executor.messages import RankResult
from muxtune.spec.noun import noun
from muxtune.spec.program import Bound
from muxtune.spec.timeline import Timeline

WARMUP_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One plan's measurement. `ratio` is Program time over the reference GEMM's (median over rounds).

    `noise` is the relative difference of that median between odd and even rounds. `timeline` is the round whose ratio is
    nearest to the median, so that pictures show a typical iteration.
    """

    ratio: float
    noise: float
    ratios: tuple[float, ...]
    reference_ns: int
    timeline: Timeline
    peak_bytes: tuple[int, ...]


@noun
class _Sample:
    ratio: float
    reference_ns: float
    timeline: Timeline


def measure_plans(
    group: WorkerGroup, bounds: Mapping[str, Bound], rounds: int, progress: Callable[[int, int], None]
) -> dict[str, Measured]:
    """Run every Program once a round for `rounds` counted rounds, after warm-up and one pass that counts memory.

    `progress` is told (rounds done, rounds in all), warm-up included.
    """
    for name, bound in bounds.items():
        group.load(name, bound)
    samples: dict[str, list[_Sample]] = {name: [] for name in bounds}
    peaks: dict[str, tuple[int, ...]] = {}
    for number in range(WARMUP_ROUNDS + rounds):
        for name, bound in bounds.items():
            counts_memory = number == WARMUP_ROUNDS - 1
            results = group.run(name, memory=counts_memory)
            if counts_memory:
                peaks[name] = tuple(r.peak_bytes or 0 for r in results)
            if number >= WARMUP_ROUNDS:
                samples[name].append(_sample(bound, results))
        progress(number + 1, WARMUP_ROUNDS + rounds)
    return {name: _median(samples[name], peaks[name]) for name in bounds}


def _sample(bound: Bound, results: list[RankResult]) -> _Sample:
    timeline = measured_timeline(bound, results)
    reference_ns = statistics.fmean(r.reference_ns for r in results)
    return _Sample(ratio=timeline.iteration_ns / reference_ns, reference_ns=reference_ns, timeline=timeline)


def _median(samples: list[_Sample], peak_bytes: tuple[int, ...]) -> Measured:
    ratios = [s.ratio for s in samples]
    middle = statistics.median(ratios)
    halves = [statistics.median(ratios[i::2]) for i in (0, 1)] if len(ratios) > 1 else [middle, middle]
    typical = min(samples, key=lambda s: abs(s.ratio - middle))
    return Measured(
        ratio=middle,
        noise=abs(halves[0] - halves[1]) / middle,
        ratios=tuple(ratios),
        reference_ns=round(statistics.median(s.reference_ns for s in samples)),
        timeline=typical.timeline,
        peak_bytes=peak_bytes,
    )
