"""trace: convert any trace to ours, describe one, generate the paper's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from muxtune.experiments.commands.inputs import output_file, output_folder
from muxtune.experiments.console import json_text, note, render, table
from muxtune.sim.traces.describe import describe
from muxtune.sim.traces.formats.base import TraceOptions
from muxtune.sim.traces.formats.muxtune import write_trace
from muxtune.sim.traces.generate import NS_PER_DAY, Arrivals
from muxtune.sim.traces.mapping import Mapping
from muxtune.sim.traces.rows import Tally
from muxtune.sim.traces.trace import generate, open_trace, take
from muxtune.spec.errors import InputError
from muxtune.spec.files import json_schema, write_text
from muxtune.spec.jobs import GpuRule, Job, Trace, TraceHeader
from muxtune.spec.noun import noun, plain
from muxtune.spec.units import format_ns, seconds_to_ns

#: One line on standard error a so many jobs.
NOTE_JOBS = 100_000
LONGEST_DAYS = 36_500
BLOCKS = " ▁▂▃▄▅▆▇█"


@noun
class Given:
    """What the commands over a source take; `mapping` holds the texts of the options that were given."""

    source: str
    format_key: str = "auto"
    mapping: tuple[tuple[str, str], ...] = ()
    seed: int = 0
    gpus: str = ""
    skip_bad: bool = False
    first: int | None = None
    start_day: float = 0.0
    days: float | None = None


def mapping_texts(
    models: str, ranks: str, datasets: str, batches: str, tenants: str, mean: str, std: str, slack: str, cancel: str
) -> tuple[tuple[str, str], ...]:
    """(field of Mapping, text) of every option that was given."""
    names = (*("models", "ranks", "datasets", "batches", "tenants"), *("mean", "std", "deadline_slack", "cancel_share"))
    texts = (models, ranks, datasets, batches, tenants, mean, std, slack, cancel)
    return tuple((name, text) for name, text in zip(names, texts, strict=True) if text)


def parse_mapping(texts: tuple[tuple[str, str], ...]) -> Mapping | None:
    """The Mapping of some options; None where none was given.

    Raises:
        InputError: the option, its value and what was expected.
    """
    values: dict[str, Any] = {}
    for name, text in texts:
        option = f"--{name.replace('_', '-')} {text}"
        parts = tuple(p.strip() for p in text.split(","))
        if name in ("models", "datasets"):
            values[name] = parts
        elif name in ("ranks", "batches"):
            values[name] = tuple(int(_number(option, p, whole=True)) for p in parts)
        elif name == "tenants":
            values[name] = int(_number(option, text, whole=True))
        else:
            values[f"{name}_minutes" if name in ("mean", "std") else name] = _number(option, text, whole=False)
    try:
        return Mapping(**values) if values else None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"mapping: {error}") from error


def _number(option: str, text: str, whole: bool) -> float:
    try:
        return int(text) if whole else float(text)
    except ValueError as error:
        raise InputError(f"{option}: expected {'whole numbers' if whole else 'a number'}") from error


def open_given(given: Given) -> tuple[Trace, Tally]:
    """The trace that the options name, and what reading it leaves out.

    Raises:
        InputError: a wrong option or file.
    """
    tally = Tally(skip_bad=given.skip_bad)
    options = TraceOptions(mapping=parse_mapping(given.mapping), seed=given.seed, gpu_rule=_gpu_rule(given.gpus))
    trace = open_trace(given.source, options, tally, given.format_key)
    span_ns = None if given.days is None else _days_ns("--days", given.days)
    return take(trace, jobs=given.first, start_ns=_days_ns("--start-day", given.start_day), span_ns=span_ns), tally


def _gpu_rule(text: str) -> GpuRule | None:
    known: dict[str, GpuRule] = {rule: rule for rule in get_args(GpuRule)}
    if text and text not in known:
        raise InputError(f"--gpus {text}: expected one of {', '.join(known)}")
    return known[text] if text else None


def _days_ns(option: str, days: float) -> int:
    if not 0 <= days <= LONGEST_DAYS or (option == "--days" and not days):
        raise InputError(f"{option} {days:g}: expected days above 0, at most {LONGEST_DAYS}")
    return round(days * NS_PER_DAY)


def convert(given: Given, out: Path) -> dict[str, Any]:
    """Write the trace to `out` in our format; what was written, invented and left out.

    Raises:
        InputError: a wrong option or file; no job is left.
    """
    trace, tally = open_given(given)
    return _write(trace, tally, out)


def generate_trace(
    out: Path, *, jobs: int | None, days: float | None, rate: float, mapping: tuple[tuple[str, str], ...], seed: int
) -> dict[str, Any]:
    """Write the generated trace to `out`.

    Raises:
        InputError: a wrong option.
    """
    try:
        arrivals = Arrivals(rate_per_minute=rate, jobs=jobs, days=7.0 if jobs is None and days is None else days)
    except ValueError as error:
        raise InputError(f"trace generate: {error}") from error
    return _write(generate(arrivals, TraceOptions(mapping=parse_mapping(mapping), seed=seed)), Tally(), out)


def _write(trace: Trace, tally: Tally, out: Path) -> dict[str, Any]:
    count = write_trace(_watched(trace), output_file(out), required=1)
    return {"trace": trace.about.name, "out": str(out), "jobs": count, **_told(trace, tally)}


def _watched(trace: Trace) -> Trace:
    """The trace, with a line on standard error now and then."""

    def jobs() -> Iterator[Job]:
        for count, job in enumerate(trace, start=1):
            if count % NOTE_JOBS == 0:
                note(f"{trace.about.name}: {count:,} jobs")
            yield job

    return dataclasses.replace(trace, open_jobs=jobs)


def _told(trace: Trace, tally: Tally) -> dict[str, Any]:
    """What every result over a trace says."""
    about = trace.about
    return {
        "source": about.source,
        "seed": about.seed,
        "invented": list(about.invented),
        "statements": list(about.statements()),
        "left_out": dict(sorted(tally.left_out.items())),
        "bad_rows": tally.bad,
        "first_bad_row": tally.first_bad or None,
    }


def describe_trace(given: Given, out: Path | None) -> dict[str, Any]:
    """The Description of a trace; `out` gets describe.json and trace.svg.

    Raises:
        InputError: a wrong option or file; the trace holds no job.
    """
    folder = None if out is None else output_folder(out)
    trace, tally = open_given(given)
    found = describe(_watched(trace))
    if not found.jobs:
        raise InputError(f"{given.source}: no job is left to describe ({_left(tally)})")
    body = {"trace": trace.about.name, **plain(found), **_told(trace, tally)}
    if folder is not None:
        from muxtune.experiments.plots.trace import picture

        write_text(folder / "describe.json", json_text(body))
        write_text(folder / "trace.svg", picture(trace.about.name, found))
        body["files"] = [str(folder / "describe.json"), str(folder / "trace.svg")]
    return body


def _left(tally: Tally) -> str:
    parts = [f"{count} rows: {reason}" for reason, count in sorted(tally.left_out.items())]
    return "; ".join([*parts, f"{tally.bad} bad rows"])


def schema() -> dict[str, Any]:
    """JSON Schemas of the first line (`header`) and of every other line (`job`)."""
    return {"header": json_schema(TraceHeader), "job": json_schema(Job)}


def show_written(body: dict[str, Any]) -> str:
    """Where the trace is and what is true of it."""
    return render(f"{body['out']}: {body['jobs']:,} jobs of {body['source']}", *_remarks(body))


def _remarks(body: dict[str, Any]) -> list[str]:
    said = [f"left out: {count:,} rows: {reason}" for reason, count in body["left_out"].items()]
    if body["bad_rows"]:
        said.append(f"skipped: {body['bad_rows']:,} bad rows, the first: {body['first_bad_row']}")
    return [*said, *body["statements"]]


#: (label, key of the description) of what is counted.
COUNTED = (
    ("tenants", "top_tenants"),
    ("models", "models"),
    ("PEFT", "pefts"),
    ("data sets", "datasets"),
    ("batches", "batches"),
)


def show_description(body: dict[str, Any]) -> str:
    """Counts, a table of percentiles, the most frequent values, and the statements."""
    days = body["span_s"] / 86_400
    rate = f"{body['arrivals_per_minute']:.3g} arrivals a minute"
    columns = (("duration", "duration_s", _time), ("steps", "steps", _plain), ("GPUs", "gpus", _plain))
    rows = [_spread_row(label, body[key], unit) for label, key, unit in columns if body[key] is not None]
    shares = [name for name, _ in (body["duration_s"] or body["steps"])["percentiles"]]
    counts = [f"{label}: " + ", ".join(f"{name} {count:,}" for name, count in body[key]) for label, key in COUNTED]
    return render(
        f"{body['trace']}: {body['jobs']:,} jobs in {days:.1f} days, {rate}",
        table(["column", "jobs", "mean", "std", "least", *shares, "most"], rows),
        f"{body['tenants']:,} {counts[0]}",
        *counts[1:],
        f"{body['classes']:,} task classes; deadlines: {body['with_deadline']:,}, cancelled: {body['with_cancel']:,}",
        f"arrivals over time: {_sparkline(body['arrivals'])} (most in a hundredth of the time: {max(body['arrivals']):,})",
        *([] if body["gpu_hours"] is None else [f"{body['gpu_hours']:,.0f} GPU hours in the source"]),
        *_remarks(body),
        *body.get("files", ()),
    )


def _sparkline(counts: list[int]) -> str:
    """One letter for two bins, as high as their share of the fullest two; blank where nothing arrives."""
    pairs = [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]
    return "".join(BLOCKS[-(-n * (len(BLOCKS) - 1) // max(pairs))] for n in pairs)


def _spread_row(label: str, spread: dict[str, Any], unit: Callable[[float], str]) -> list[str]:
    moments = [unit(spread[key]) for key in ("mean", "std", "least")]
    return [label, f"{spread['count']:,}", *moments, *(unit(v) for _, v in spread["percentiles"]), unit(spread["most"])]


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else format_ns(seconds_to_ns(seconds))


def _plain(value: float) -> str:
    return f"{value:,.4g}" if value < 10_000 else f"{value:,.0f}"
