"""The paper's arrivals (MuxTune §5.4): Poisson, 2.59 a minute; everything else comes from the mapping, seeded."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from muxtune.sim.traces.mapping import NS_PER_MINUTE, Filler
from muxtune.sim.traces.record import Record
from muxtune.spec.jobs import Job
from muxtune.spec.noun import noun
from muxtune.spec.units import MAX_NS

RATE_PER_MINUTE = 2.59
NS_PER_DAY = 24 * 60 * NS_PER_MINUTE


@noun
class Arrivals:
    """How many jobs arrive how fast: until `days` have passed or `jobs` have come, whichever is first."""

    rate_per_minute: float = RATE_PER_MINUTE
    days: float | None = 7.0
    jobs: int | None = None

    def __post_init__(self) -> None:
        if not 1e-6 <= self.rate_per_minute <= 1e9:
            raise ValueError(f"rate={self.rate_per_minute}: must be from 1e-6 to 1e9 jobs a minute")
        if self.days is None and self.jobs is None:
            raise ValueError("give days, jobs or both: a trace ends")
        if self.days is not None and not 0 < self.days <= 36_500:
            raise ValueError(f"days={self.days}: must be above 0, at most 36500")
        if self.jobs is not None and not 1 <= self.jobs <= 10**9:
            raise ValueError(f"jobs={self.jobs}: must be from 1 to 10^9")


def generated_jobs(arrivals: Arrivals, filler: Filler) -> Iterator[Job]:
    """The jobs, `job-0`, `job-1`, …: gaps are −ln(1 − u) / rate with u from Python's Mersenne Twister of the filler's seed."""
    uniform = random.Random(filler.seed).random
    end_ns = MAX_NS if arrivals.days is None else round(arrivals.days * NS_PER_DAY)
    mean_gap_ns = NS_PER_MINUTE / arrivals.rate_per_minute
    now_ns, count = 0, 0
    while arrivals.jobs is None or count < arrivals.jobs:
        now_ns += round(-math.log1p(-uniform()) * mean_gap_ns)
        if now_ns >= end_ns:
            return
        yield filler.job(Record(job_id=f"job-{count}", submit_ns=now_ns), 0)
        count += 1
