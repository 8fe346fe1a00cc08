"""`muxtune trace`: what convert, describe and generate take, and which function of `commands/trace.py` runs each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muxtune.experiments import options as opt
from muxtune.experiments.answer import Answer, example

trace_app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Convert, describe and generate traces of jobs (docs/trace-format.md).",
)

Source = Annotated[
    str, typer.Argument(metavar="TRACE", help="A trace file of any format, or paper[:days=1,rate_per_minute=2.59].")
]
Format = Annotated[
    str, typer.Option("--format", metavar="NAME", help="Its format (`muxtune list traces`); auto looks at the file.")
]
Models = Annotated[str, typer.Option("--models", metavar="A,B,...", help="Invented: backbones.  [default: llama2-7b]")]
Ranks = Annotated[str, typer.Option("--ranks", metavar="N,N,...", help="Invented: LoRA ranks.  [default: 16]")]
Datasets = Annotated[
    str,
    typer.Option("--datasets", metavar="A,B,...", help="Invented: data sets.  [default: sst2,openbookqa,rte]"),
]
Batches = Annotated[
    str, typer.Option("--batches", metavar="N,N,...", help="Invented: samples a global batch.  [default: 16,32,64]")
]
Tenants = Annotated[
    str, typer.Option("--tenants", metavar="N", help="Invented, where the source has none: tenants.  [default: 1]")
]
Mean = Annotated[
    str, typer.Option("--mean", metavar="MINUTES", help="Invented durations: mean.  [default: 372.6, the paper's]")
]
Std = Annotated[
    str, typer.Option("--std", metavar="MINUTES", help="Invented durations: standard deviation.  [default: 612.9]")
]
Slack = Annotated[
    str, typer.Option("--deadline-slack", metavar="X", help="Invent deadlines: X durations after arrival.")
]
Cancel = Annotated[
    str, typer.Option("--cancel-share", metavar="X", help="Invent cancellations: of this share of the jobs.")
]
Gpus = Annotated[
    str,
    typer.Option(
        "--gpus",
        metavar="ignore|scale",
        help="Use of the source's GPU count: none, or to scale the work.  [default: ignore]",
    ),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip bad rows and count them.")]
First = Annotated[int | None, typer.Option("--first", metavar="N", min=1, help="Only the first N jobs.")]
StartDay = Annotated[float, typer.Option("--start-day", metavar="X", min=0, help="Only jobs from day X on.")]
Days = Annotated[float | None, typer.Option("--days", metavar="X", help="Only jobs of X days.")]
MapSeed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of everything that is invented.")]
OutFile = Annotated[Path, typer.Option("--out", metavar="FILE", help="Trace file to write (.jsonl or .jsonl.gz).")]


@trace_app.command(epilog=example("trace convert cluster_job_log --out philly.jsonl --ranks 8,16 --days 7"))
def convert(
    source: Source,
    out: OutFile,
    format_key: Format = "auto",
    models: Models = "",
    ranks: Ranks = "",
    datasets: Datasets = "",
    batches: Batches = "",
    tenants: Tenants = "",
    mean: Mean = "",
    std: Std = "",
    deadline_slack: Slack = "",
    cancel_share: Cancel = "",
    gpus: Gpus = "",
    skip_bad: SkipBad = False,
    first: First = None,
    start_day: StartDay = 0.0,
    days: Days = None,
    seed: MapSeed = 0,
    as_json: opt.AsJson = False,
) -> Answer:
    """Write any trace as PEFT jobs in our format."""
    from muxtune.experiments.commands import trace as command

    texts = command.mapping_texts(models, ranks, datasets, batches, tenants, mean, std, deadline_slack, cancel_share)
    given = command.Given(
        source=source,
        format_key=format_key,
        mapping=texts,
        seed=seed,
        gpus=gpus,
        skip_bad=skip_bad,
        first=first,
        start_day=start_day,
        days=days,
    )
    return Answer(body=command.convert(given, out), show=command.show_written, as_json=as_json)


@trace_app.command(epilog=example("trace describe philly.jsonl --out out/philly"))
def describe(
    source: Source,
    format_key: Format = "auto",
    models: Models = "",
    ranks: Ranks = "",
    datasets: Datasets = "",
    batches: Batches = "",
    tenants: Tenants = "",
    mean: Mean = "",
    std: Std = "",
    deadline_slack: Slack = "",
    cancel_share: Cancel = "",
    gpus: Gpus = "",
    skip_bad: SkipBad = False,
    first: First = None,
    start_day: StartDay = 0.0,
    days: Days = None,
    seed: MapSeed = 0,
    out: opt.OutFolder = None,
    as_json: opt.AsJson = False,
) -> Answer:
    """Say what a trace holds; --out draws it."""
    from muxtune.experiments.commands import trace as command

    texts = command.mapping_texts(models, ranks, datasets, batches, tenants, mean, std, deadline_slack, cancel_share)
    given = command.Given(
        source=source,
        format_key=format_key,
        mapping=texts,
        seed=seed,
        gpus=gpus,
        skip_bad=skip_bad,
        first=first,
        start_day=start_day,
        days=days,
    )
    return Answer(body=command.describe_trace(given, out), show=command.show_description, as_json=as_json)


@trace_app.command(epilog=example("trace generate --days 7 --out week.jsonl"))
def generate(
    out: OutFile,
    jobs: Annotated[int | None, typer.Option("--jobs", metavar="N", help="Stop after N jobs.")] = None,
    days: Annotated[
        float | None, typer.Option("--days", metavar="X", help="Stop after X days.  [default: 7 without --jobs]")
    ] = None,
    rate: Annotated[float, typer.Option("--rate", metavar="X", help="Arrivals a minute.")] = 2.59,
    models: Models = "",
    ranks: Ranks = "",
    datasets: Datasets = "",
    batches: Batches = "",
    tenants: Tenants = "",
    mean: Mean = "",
    std: Std = "",
    deadline_slack: Slack = "",
    cancel_share: Cancel = "",
    seed: MapSeed = 0,
    as_json: opt.AsJson = False,
) -> Answer:
    """Write a trace like the paper's: Poisson arrivals, lognormal durations, random tasks."""
    from muxtune.experiments.commands import trace as command

    texts = command.mapping_texts(models, ranks, datasets, batches, tenants, mean, std, deadline_slack, cancel_share)
    body = command.generate_trace(out, jobs=jobs, days=days, rate=rate, mapping=texts, seed=seed)
    return Answer(body=body, show=command.show_written, as_json=as_json)


@trace_app.command(epilog=example("trace schema > trace-format.schema.json"))
def schema() -> Answer:
    """Print the JSON Schema of the header and of a job."""
    from muxtune.experiments.commands import trace as command

    return Answer(body=command.schema(), show=str, as_json=True)
