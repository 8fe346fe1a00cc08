"""Opening traces: a file of any format, or `paper[:key=value,…]` for the generated one; and taking a part of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from muxtune.sim.traces.formats.base import TraceOptions, find_format
from muxtune.sim.traces.generate import Arrivals, generated_jobs
from muxtune.sim.traces.mapping import Filler, Mapping
from muxtune.sim.traces.rows import Tally, naming_damage
from muxtune.spec.errors import InputError
from muxtune.spec.jobs import Job, Trace, TraceHeader
from muxtune.spec.lengths import embedded_length
from muxtune.spec.registry import parse_config, split_reference

#: The name that stands for the generated trace.
GENERATED = "paper"


def open_trace(
    reference: str, options: TraceOptions | None = None, tally: Tally | None = None, format_key: str = "auto"
) -> Trace:
    """The trace of a file, or the generated one (`paper`, `paper:days=1`, `paper:days=none,jobs=1000,rate_per_minute=5`).

    Raises:
        InputError: no such file, of no known format, or not readable; UnknownKeyError: no such format or option.
    """
    options, tally = options or TraceOptions(), tally or Tally()
    path = Path(reference)
    if reference.partition(":")[0] == GENERATED and not path.exists():
        _, chosen = split_reference(reference)
        return generate(parse_config("trace", GENERATED, Arrivals, chosen), options)
    _, found = find_format(path, format_key)
    with naming_damage(path):
        trace = found.open(path, options, tally)
    return dataclasses.replace(trace, open_jobs=lambda: _jobs(path, trace))


def _jobs(path: Path, trace: Trace) -> Iterator[Job]:
    with naming_damage(path):
        yield from trace


def generate(arrivals: Arrivals, options: TraceOptions) -> Trace:
    """The generated trace: the same arguments give the same jobs."""
    filler = Filler(options.mapping or Mapping(), options.seed, frozenset())
    limits = [f"{arrivals.days:g} days"] if arrivals.days is not None else []
    limits += [f"{arrivals.jobs} jobs"] if arrivals.jobs is not None else []
    invented = ("arrival_ns", *filler.invented)
    about = TraceHeader(
        name=GENERATED,
        source=f"generated: Poisson arrivals, {arrivals.rate_per_minute:g} a minute, until {' or '.join(limits)}",
        invented=invented,
        mapping=filler.mapping.sentence(invented),
        seed=options.seed,
        gpu_rule=options.gpu_rule or "ignore",
    )
    return Trace(about=about, open_jobs=lambda: generated_jobs(arrivals, filler), lengths=embedded_length)


def take(trace: Trace, *, jobs: int | None = None, start_ns: int = 0, span_ns: int | None = None) -> Trace:
    """The jobs that arrive within `span_ns` from `start_ns` on, at most `jobs` of them, with `start_ns` as the new 0.

    The header says so.

    Raises:
        InputError: a limit below 0 or nothing left to take.
    """
    if start_ns < 0 or (jobs is not None and jobs < 1) or (span_ns is not None and span_ns < 1):
        raise InputError(
            f"jobs={jobs}, start_ns={start_ns}, span_ns={span_ns}: take at least one job from at least 0 on"
        )
    if jobs is None and not start_ns and span_ns is None:
        return trace
    span = "" if span_ns is None else f" of {span_ns} ns"
    count = "" if jobs is None else f", the first {jobs} jobs"
    source = f"{trace.about.source}; the part{span} from {start_ns} ns on{count}"
    return dataclasses.replace(
        trace,
        about=dataclasses.replace(trace.about, source=source),
        open_jobs=lambda: _part(trace, jobs, start_ns, span_ns),
    )


def _part(trace: Trace, jobs: int | None, start_ns: int, span_ns: int | None) -> Iterator[Job]:
    count = 0
    for job in trace:
        if job.arrival_ns < start_ns:
            continue
        if (jobs is not None and count >= jobs) or (span_ns is not None and job.arrival_ns >= start_ns + span_ns):
            return
        count += 1
        yield _earlier(job, start_ns) if start_ns else job


def _earlier(job: Job, by_ns: int) -> Job:
    """The job with every moment moved."""
    moments = {name: getattr(job, name) for name in ("arrival_ns", "deadline_ns", "cancel_ns")}
    return dataclasses.replace(job, **{name: t - by_ns for name, t in moments.items() if t is not None})
