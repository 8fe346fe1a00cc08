"""Commands that plan and predict: plan, check, check-policy, simulate, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muxtune.experiments import options as opt
from muxtune.experiments.answer import Answer, example

plan_app = typer.Typer()


@plan_app.command(
    epilog=example("plan --workload work.yaml --cluster 2xA40 --policy muxtune:charge=exact --out plan.json")
)
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


@plan_app.command(epilog=example("check plan.json"))
def check(plan: opt.PlanFile, seed: opt.Seed = 0, as_json: opt.AsJson = False) -> Answer:
    """Say whether a plan can be executed (exit 1 if not)."""
    from muxtune.experiments.commands import check as command

    body = command.run(plan, seed=seed)
    return Answer(body=body, show=command.show, as_json=as_json, ok=body["ok"])


@plan_app.command(name="check-policy", epilog=example("check-policy ./mine.py:MyPolicy"))
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


@plan_app.command(epilog=example("simulate plan.json --trace trace.json"))
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


@plan_app.command(
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
