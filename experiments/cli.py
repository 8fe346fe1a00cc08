"""The commands: what each takes, and which file of `commands/` runs it.

Only typer is imported here; each command imports its floors when it runs, so that --help is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muxtune.experiments import options as opt
from muxtune.experiments.answer import Answer, example
from muxtune.experiments.cli_plan import plan_app
from muxtune.experiments.cli_replay import add_to
from muxtune.experiments.cli_suite import suite_app
from muxtune.experiments.cli_trace import trace_app
from muxtune.experiments.cli_train import train_app

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Plan, simulate and execute many PEFT fine-tuning tasks on shared LLM backbones.",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"muxtune {installed('muxtune')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog=example("demo --out out/demo"))
def demo(
    out: opt.StudyFolder = Path("out/demo"), rounds: opt.Rounds = 20, seed: opt.Seed = 0, as_json: opt.AsJson = False
) -> str:
    """Profile, plan, simulate, execute and compare, on this CPU."""
    from muxtune.experiments.commands.demo import run

    return run(out=out, rounds=rounds, seed=seed, as_json=as_json)


@app.command(epilog=example("profile --workload work.yaml --cluster cpu --pp 1,2 --out profiles/mine"))
def profile(
    workload: opt.WorkloadFiles,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Profile folder; what is there is continued.")],
    cluster: opt.ClusterName = "cpu",
    pp: Annotated[
        str, typer.Option("--pp", metavar="N,N,...", help="Pipeline depths to measure for, separated by commas.")
    ] = "1",
    tp: Annotated[
        str, typer.Option("--tp", metavar="N,N,...", help="Degrees of tensor parallelism to measure for.")
    ] = "1",
    dp: Annotated[str, typer.Option("--dp", metavar="N,N,...", help="Numbers of replicas to measure for.")] = "1",
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Rounds over all operators.")] = 20,
    budget: Annotated[
        str, typer.Option("--budget", metavar="TIME", help="Stop after the round in which 90s, 5m, 1h have passed.")
    ] = "",
    precision: Annotated[
        float | None,
        typer.Option(
            "--precision", metavar="F", min=0.0, help="Stop when every median is known to this part, as 0.02."
        ),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Write DIR/report.html: points, curves, residuals.")] = False,
    as_json: opt.AsJson = False,
) -> Answer:
    """Measure a workload's operators and fit a cost model."""
    from muxtune.experiments.commands import profile as command
    from muxtune.experiments.console import Progress

    depths, seconds = command.parse_degrees(pp, "--pp"), command.parse_budget(budget)
    with Progress() as progress:
        body = command.run(
            workload,
            out,
            cluster=cluster,
            pipelines=depths,
            tensors=command.parse_degrees(tp, "--tp"),
            replicas=command.parse_degrees(dp, "--dp"),
            rounds=rounds,
            budget_s=seconds,
            precision=precision,
            report=report,
            progress=progress,
        )
    return Answer(body=body, show=command.show, as_json=as_json)


@app.command(epilog=example("validate --suite cpu --out out/validate"))
def validate(
    suite: Annotated[str, typer.Option("--suite", metavar="NAME", help="cpu or gpu.")] = "cpu",
    replay: Annotated[
        bool, typer.Option("--replay", help="Execute a trace of jobs that come and go; compare completion times.")
    ] = False,
    trace: Annotated[
        str, typer.Option("--trace", metavar="FILE", help="With --replay: a trace.  [default: Poisson arrivals]")
    ] = "",
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=2, help="With --replay: its first N jobs.")] = 20,
    policy: Annotated[
        str, typer.Option("--policy", metavar="POLICY", help="With --replay: what plans every change.")
    ] = "muxtune",
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="X", min=1, help="With --replay: the last job arrives then.")
    ] = 30.0,
    out: opt.StudyFolder = Path("out/validate"),
    rounds: opt.Rounds = 20,
    seed: opt.Seed = 0,
    as_json: opt.AsJson = False,
) -> Answer | str:
    """Hold predictions against measurements on this machine."""
    if replay:
        from muxtune.experiments.commands import validate_replay as command
        from muxtune.experiments.console import Progress

        source = trace or command.TRACE
        with Progress() as progress:
            body = command.run(
                out,
                trace=source,
                jobs=jobs,
                policy=policy,
                seconds=seconds,
                rounds=rounds,
                seed=seed,
                progress=progress,
            )
        return Answer(body=body, show=command.show, as_json=as_json)
    from muxtune.experiments.commands.validate import run

    return run(suite=suite, out=out, rounds=rounds, seed=seed, as_json=as_json)


@app.command(epilog=example("paper interleaving-gain"))
def paper(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="One recipe.  [default: all]")] = None,
    as_json: opt.AsJson = False,
) -> Answer:
    """Compute what the paper states and what laws give (exit 1 if a figure is missed)."""
    from muxtune.experiments.commands import paper as command
    from muxtune.experiments.console import Progress

    with Progress() as progress:
        body = command.run(recipe, progress)
    return Answer(body=body, show=command.show, as_json=as_json, ok=not body["missed"])


@app.command(epilog=example("report out/demo"))
def report(
    study: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a study (demo, validate): holds result.json.")
    ],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="File.  [default: DIR/report.html]")] = None,
    as_json: opt.AsJson = False,
) -> Answer:
    """Draw a study's report.html again from its results."""
    from muxtune.experiments.commands import report as command

    return Answer(body=command.run(study, out), show=command.show, as_json=as_json)


@app.command(name="list", epilog=example("list policies"))
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]",
            help="policies, cluster-policies, objectives, models, devices, datasets, traces, cost-models, peft, profiles.",
        ),
    ] = None,
    as_json: opt.AsJson = False,
) -> Answer:
    """List plug-ins and presets."""
    from muxtune.experiments.commands import catalog as command

    return Answer(body=command.run(kind), show=command.show, as_json=as_json)


for commands in (plan_app, suite_app, train_app):
    app.add_typer(commands)
app.add_typer(trace_app, name="trace")
add_to(app)
