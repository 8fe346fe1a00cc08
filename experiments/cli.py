"""The commands: what each takes, and which file of `commands/` runs it.

Only typer is imported here; each command imports its floors when it runs, so that --help is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from muxtune.experiments import options as opt
from muxtune.experiments.answer import Answer, example
from muxtune.experiments.cli_replay import add_to
from muxtune.experiments.cli_trace import trace_app

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Plan, simulate and execute many PEFT fine-tuning tasks on shared LLM backbones.",
)


app.add_typer(trace_app, name="trace")
add_to(app)


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


@app.command(epilog=example("plan --workload work.yaml --cluster 2xA40 --policy muxtune:charge=exact --out plan.json"))
def plan(
    workload: opt.WorkloadFile,
    cluster: opt.ClusterName,
    policy: opt.PolicyName,
    tp: opt.Tp = 1,
    pp: opt.Pp = None,
    dp: opt.Dp = 1,
    sequence_parallel: opt.SequenceParallel = False,
    recompute: opt.Recomputation = opt.Recompute.none,
    search_layout: opt.SearchLayout = False,
    microbatches: opt.Microbatches = "4",
    objective: opt.Objective = "throughput",
    max_slowdown: opt.MaxSlowdown = None,
    cost: opt.Cost = "auto",
    allow_extrapolation: opt.Extrapolate = False,
    seed: opt.Seed = 0,
    current: opt.CurrentPlan = None,
    replan_cost: opt.ReplanCost = 0.0,
    horizon: opt.Horizon = 3600.0,
    full: opt.FullReplan = False,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Plan file to write.")] = Path("plan.json"),
    as_json: opt.AsJson = False,
) -> Answer:
    """Let one policy decide, and write its plan; with --current, change the plan in force where that pays."""
    from muxtune.experiments.commands import plan as command
    from muxtune.experiments.commands import replan as replans
    from muxtune.experiments.commands.problem import Options, parse_goal, parse_microbatches

    options = Options(
        tp=tp,
        pp=pp,
        dp=dp,
        sequence_parallel=sequence_parallel,
        recompute=recompute.value,
        search_layout=search_layout,
        microbatches=parse_microbatches(microbatches),
        cost=cost,
        allow_extrapolation=allow_extrapolation,
        seed=seed,
        goal=parse_goal(objective, max_slowdown),
    )
    charges = replans.parse_charges(current, replan_cost, horizon, full)
    if current is None:
        body = command.run(workload, cluster, policy, out, options)
    else:
        body = replans.run(workload, cluster, policy, out, options, current=current, config=charges)
    return Answer(body=body, show=command.show, as_json=as_json)


@app.command(epilog=example("check plan.json"))
def check(plan: opt.PlanFile, seed: opt.Seed = 0, as_json: opt.AsJson = False) -> Answer:
    """Say whether a plan can be executed (exit 1 if not)."""
    from muxtune.experiments.commands import check as command

    body = command.run(plan, seed=seed)
    return Answer(body=body, show=command.show, as_json=as_json, ok=body["ok"])


@app.command(name="check-policy", epilog=example("check-policy ./mine.py:MyPolicy"))
def check_policy(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="NAME[:key=value,...] or FILE.py:CLASS.")],
    as_json: opt.AsJson = False,
) -> Answer:
    """Ask the laws of every policy of one (exit 1 if it breaks one)."""
    from muxtune.experiments.commands import check_policy as command
    from muxtune.experiments.console import Progress

    with Progress() as progress:
        body = command.run(policy, progress)
    return Answer(body=body, show=command.show, as_json=as_json, ok=body["ok"])


@app.command(epilog=example("simulate plan.json --trace trace.json"))
def simulate(
    plan: opt.PlanFile,
    trace: opt.TraceFile = None,
    draws: opt.Draws = 8,
    cost: opt.Cost = "auto",
    allow_extrapolation: opt.Extrapolate = False,
    seed: opt.Seed = 0,
    out: opt.OutFolder = None,
    frequency: opt.Frequency = None,
    frequencies: opt.Frequencies = "",
    as_json: opt.AsJson = False,
) -> Answer:
    """Predict a plan's times, memory and energy; --out draws them."""
    from muxtune.experiments.commands import simulate as command

    body = command.run(
        plan,
        trace=trace,
        draws=draws,
        cost=cost,
        allow_extrapolation=allow_extrapolation,
        seed=seed,
        out=out,
        frequency=frequency,
        frequencies=frequencies,
    )
    return Answer(body=body, show=command.show, as_json=as_json)


@app.command(
    epilog=example(
        "compare --workload work.yaml --cluster 4xA40-nvlink --policies hf-peft,nemo,muxtune:charge=exact --search-layout"
    )
)
def compare(
    workload: opt.SeveralWorkloads,
    cluster: opt.ClusterNames,
    policies: Annotated[
        str,
        typer.Option(
            "--policies",
            metavar="A,B,...",
            help="Policies separated by commas; a piece key=value belongs to the policy before it.  [default: all]",
        ),
    ] = "",
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="POLICY", help="One more policy, with its options; may be repeated."),
    ] = None,
    tp: opt.Tp = 1,
    pp: opt.Pp = None,
    dp: opt.Dp = 1,
    sequence_parallel: opt.SequenceParallel = False,
    recompute: opt.Recomputation = opt.Recompute.none,
    search_layout: opt.SearchLayout = False,
    microbatches: opt.Microbatches = "4",
    objective: opt.Objective = "throughput",
    max_slowdown: opt.MaxSlowdown = None,
    cost: opt.Cost = "auto",
    allow_extrapolation: opt.Extrapolate = False,
    pareto: Annotated[
        str, typer.Option("--pareto", metavar="A,B", help="Mark the best trade-offs of two objectives.")
    ] = "",
    draws: opt.Draws = 8,
    jobs: opt.Jobs = 1,
    seed: opt.Seed = 0,
    out: opt.OutFolder = None,
    as_json: opt.AsJson = False,
) -> Answer:
    """Let several policies plan each workload on each cluster; best first."""
    from muxtune.experiments.commands import compare as command
    from muxtune.experiments.commands.pareto import parse_pareto
    from muxtune.experiments.commands.problem import Options, parse_goal, parse_microbatches
    from muxtune.experiments.console import Progress

    options = Options(
        tp=tp,
        pp=pp,
        dp=dp,
        sequence_parallel=sequence_parallel,
        recompute=recompute.value,
        search_layout=search_layout,
        microbatches=parse_microbatches(microbatches),
        cost=cost,
        allow_extrapolation=allow_extrapolation,
        draws=draws,
        seed=seed,
        goal=parse_goal(objective, max_slowdown),
        pareto=parse_pareto(pareto),
    )
    references = (*command.split_policies(policies), *(policy or ()))
    with Progress() as progress:
        body = command.run(workload, cluster, references, options, jobs=jobs, out=out, progress=progress)
    return Answer(body=body, show=command.show, as_json=as_json, ok=command.answered(body))


@app.command(epilog=example("execute plan.json --iterations 100 --checkpoint run/state --every 10 --resume --out run"))
def execute(
    plan: opt.PlanFile,
    device: Annotated[opt.Device, typer.Option("--device", help="cpu (gloo) or cuda (NCCL).")] = opt.Device.cpu,
    iterations: Annotated[
        int, typer.Option("--iterations", metavar="N", min=1, help="Passes, each with fresh samples.")
    ] = 5,
    kernel: opt.Kernel = opt.KernelName.auto,
    trace: opt.TraceFile = None,
    seed: opt.Seed = 0,
    out: opt.OutFolder = None,
    checkpoint: opt.CheckpointFolder = None,
    every: opt.Every = 10,
    keep: opt.Keep = 3,
    resume: opt.Resume = False,
    join: opt.Joins = None,
    join_from: opt.JoinsFrom = None,
    leave: opt.Leaves = None,
    replan: opt.Replan = "",
    cost: opt.Cost = "roofline",
    deterministic: opt.Deterministic = False,
    layer_spec: opt.LayerSpecName = "auto",
    backbone: opt.Backbone = None,
    data: opt.DataFolder = None,
    baseline: Annotated[
        str,
        typer.Option("--baseline", metavar="NAME", help="hf-peft: then the tasks one by one on transformers + peft."),
    ] = "",
    as_json: opt.AsJson = False,
) -> Answer:
    """Train by a plan on Megatron-core: times, memory, losses."""
    from muxtune.experiments.commands import execute as command
    from muxtune.experiments.commands.training import parse_changes
    from muxtune.experiments.console import Progress

    training = command.TrainOptions(
        checkpoint=checkpoint,
        every=every,
        keep=keep,
        resume=resume,
        changes=parse_changes(join or (), leave or (), replan, cost, join_from or ()),
        deterministic=deterministic,
        layer_spec=layer_spec,
        backbone=backbone,
        data=data,
    )
    with Progress() as progress:
        options: dict[str, Any] = {"iterations": iterations, "trace": trace, "seed": seed, "out": out}
        options |= {"training": training, "progress": progress, "say": progress.say}
        body = command.run(plan, device=device.value, kernel=kernel.value, **options)
    if baseline:
        from muxtune.experiments.commands import baseline as other

        body["baseline"] = other.run(plan, baseline, device=device.value, iterations=iterations, seed=seed)
    return Answer(body=body, show=command.show, as_json=as_json)


@app.command(epilog=example("export run/state --task alice --backbone meta-llama/Llama-2-7b-hf --out adapters/alice"))
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a run or of one checkpoint.")],
    task: Annotated[str, typer.Option("--task", metavar="TASK", help="Task whose adapter is written.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the adapter.")],
    backbone: Annotated[
        str, typer.Option("--backbone", metavar="NAME|DIR", help="Base model that the adapter's config names.")
    ] = "",
    architecture: Annotated[
        str, typer.Option("--architecture", metavar="NAME", help="llama, qwen2, gpt2, opt.  [default: by the shapes]")
    ] = "",
    as_json: opt.AsJson = False,
) -> Answer:
    """Write a trained LoRA adapter in the format of Hugging Face peft."""
    from muxtune.experiments.commands import export as command

    body = command.run(checkpoint, task, out, backbone=backbone, architecture=architecture)
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
