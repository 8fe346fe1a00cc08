"""`muxtune replay` and `muxtune sweep`: what they take, and which file of `commands/` runs them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from muxtune.experiments import options as opt
from muxtune.experiments.answer import Answer, example


class Spread(StrEnum):
    """What runs the replays."""

    pool = "pool"
    ray = "ray"


EngineName = Annotated[
    Spread,
    typer.Option(
        "--engine", help="pool: processes here; ray: Ray, at RAY_ADDRESS or started here with --jobs workers."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Take the finished replays of --out as they are.")]


def replay(
    trace: Annotated[
        str,
        typer.Option("--trace", metavar="FILE", help="A trace of any format, or paper[:days=1,rate_per_minute=2.59]."),
    ],
    cluster: Annotated[
        list[str],
        typer.Option("--cluster", metavar="NAME|FILE", help="NODESxGPUSxDEVICE; repeated: pools of device types."),
    ],
    policy: Annotated[
        list[str] | None, typer.Option("--policy", metavar="POLICY", help="Co-scheduling policy; may be repeated.")
    ] = None,
    policies: Annotated[str, typer.Option("--policies", metavar="A,B,...", help="Several of them.")] = "",
    cluster_policy: Annotated[
        list[str] | None, typer.Option("--cluster-policy", metavar="POLICY", help="Cluster policy; may be repeated.")
    ] = None,
    cluster_policies: Annotated[
        str, typer.Option("--cluster-policies", metavar="X,Y,...", help="Several of them.")
    ] = "",
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Seeds, counted from --seed.")] = 1,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Backbone of every job.")] = None,
    deadline_slack: Annotated[
        str, typer.Option("--deadline-slack", metavar="X", help="Invent deadlines: X durations after arrival.")
    ] = "",
    tenants: Annotated[str, typer.Option("--tenants", metavar="N", help="Invent tenants where there are none.")] = "",
    first: Annotated[int | None, typer.Option("--first", metavar="N", min=1, help="Only the first N jobs.")] = None,
    days: Annotated[float | None, typer.Option("--days", metavar="X", help="Only jobs of X days.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip bad rows of the trace.")] = False,
    gpus_per_instance: Annotated[
        int | None,
        typer.Option(
            "--gpus-per-instance", metavar="N", min=1, help="[default: least power of two, backbone in half memory]"
        ),
    ] = None,
    tp: opt.Tp = 1,
    pp: opt.Pp = None,
    dp: opt.Dp = 1,
    microbatches: opt.Microbatches = "4",
    search_layout: opt.SearchLayout = False,
    tasks_per_instance: Annotated[
        int,
        typer.Option(
            "--tasks-per-instance", metavar="N", min=1, help="At most so many share one (hf-peft, nemo: one)."
        ),
    ] = 8,
    max_instances: Annotated[
        int | None, typer.Option("--max-instances", metavar="N", min=1, help="At most so many.")
    ] = None,
    until: Annotated[
        float | None, typer.Option("--until", metavar="DAYS", help="End there; else when all jobs left.")
    ] = None,
    costs: Annotated[
        str,
        typer.Option(
            "--costs", metavar="K=V,...", help="replan_s, join_s, leave_s, start_s, migrate_s, checkpoint_s, ..."
        ),
    ] = "",
    faults: Annotated[
        str,
        typer.Option(
            "--faults", metavar="K=V,...|FILE", help="gpu_mtbf_h, node_mtbf_h, repair_h, straggler_mtbf_h, ..."
        ),
    ] = "",
    max_restarts: Annotated[
        int | None, typer.Option("--max-restarts", metavar="N", min=0, help="Give a job up after more failures.")
    ] = None,
    merge_types: Annotated[
        bool,
        typer.Option("--merge-types", help="Plan types of equal tokens a step as one; the error is sampled and told."),
    ] = False,
    incremental: Annotated[
        bool,
        typer.Option("--incremental", help="Price mixes from kept prices of hTasks; the error is sampled and told."),
    ] = False,
    gpu_hour_price: Annotated[
        float, typer.Option("--gpu-hour-price", metavar="X", min=0, help="Price of a GPU hour.")
    ] = 1.0,
    size_for: Annotated[
        str | None,
        typer.Option("--size-for", metavar="GOAL", help="Smallest cluster for p95_jct<2h, slo_attainment>0.9, ..."),
    ] = None,
    cost: Annotated[
        str,
        typer.Option(
            "--cost", metavar="NAME|DIR|FILE", help="roofline, paper, interference, a measured profile, or auto."
        ),
    ] = "roofline",
    allow_extrapolation: opt.Extrapolate = False,
    engine: EngineName = Spread.pool,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=1, help="Replays side by side.")] = 1,
    resume: Resume = False,
    job_rows: Annotated[
        bool, typer.Option("--job-rows", help="Write a line a job to --out, as the jobs leave.")
    ] = False,
    seed: opt.Seed = 0,
    out: opt.OutFolder = None,
    as_json: opt.AsJson = False,
) -> Answer:
    """Replay a trace of jobs on a cluster: completion times, fairness, SLOs, energy."""
    from muxtune.experiments.commands import replay as command
    from muxtune.experiments.commands.compare import split_policies
    from muxtune.experiments.commands.problem import parse_microbatches
    from muxtune.experiments.commands.trace import Given, mapping_texts
    from muxtune.experiments.console import Progress
    from muxtune.experiments.replay_cell import Cell

    texts = mapping_texts("", "", "", "", tenants, "", "", deadline_slack, "")
    rates, file = command.parse_faults(faults)
    base = Cell(
        given=Given(source=trace, mapping=texts, first=first, days=days, skip_bad=skip_bad),
        clusters=tuple(cluster),
        seed=seed,
        model=model,
        gpus_per_instance=gpus_per_instance,
        tp=tp,
        pp=pp,
        dp=dp,
        microbatches=parse_microbatches(microbatches),
        search_layout=search_layout,
        tasks_per_instance=tasks_per_instance,
        max_instances=max_instances,
        until_days=until,
        costs=command.parse_costs(costs),
        fault_rates=rates,
        faults=file,
        max_restarts=max_restarts,
        merge_types=merge_types,
        incremental=incremental,
        cost=cost,
        allow_extrapolation=allow_extrapolation,
        gpu_hour_price=gpu_hour_price,
    )
    chosen = tuple(dict.fromkeys((*split_policies(policies), *(policy or ())))) or ("muxtune",)
    rules = tuple(dict.fromkeys((*split_policies(cluster_policies), *(cluster_policy or ())))) or ("fcfs",)
    with Progress() as progress:
        body = command.run(
            base,
            chosen,
            rules,
            seeds,
            size_for=size_for,
            engine=engine.value,
            jobs=jobs,
            resume=resume,
            job_rows=job_rows,
            out=out,
            progress=progress,
        )
    return Answer(body=body, show=command.show, as_json=as_json, ok=body["complete"])


def sweep(
    grid: Annotated[Path, typer.Argument(metavar="GRID", help="YAML or JSON: options of replay; a list is an axis.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Results; those that are there are taken as they are.")
    ],
    engine: EngineName = Spread.pool,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=1, help="Replays side by side.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run everything again.")] = False,
    as_json: opt.AsJson = False,
) -> Answer:
    """Run every combination of a grid of replays; a killed sweep goes on where it was."""
    from muxtune.experiments.commands import sweep as command
    from muxtune.experiments.console import Progress

    with Progress() as progress:
        body = command.run(grid, engine=engine.value, jobs=jobs, out=out, resume=not fresh, progress=progress)
    return Answer(body=body, show=command.show, as_json=as_json, ok=body["complete"])


def add_to(app: typer.Typer) -> None:
    """Make both commands of the app."""
    line = "replay --trace paper:days=1 --cluster 32x4xA40 --policies hf-peft,muxtune --cluster-policies fcfs,srtf --until 1"
    app.command(epilog=example(f"{line} --gpus-per-instance 4 --out out/replay"))(replay)
    app.command(epilog=example("sweep grid.yaml --jobs 2 --out out/sweep"))(sweep)
