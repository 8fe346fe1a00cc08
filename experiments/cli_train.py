"""Commands that train: execute, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from muxtune.experiments import options as opt
from muxtune.experiments.answer import Answer, example

train_app = typer.Typer()


@train_app.command(
    epilog=example("execute plan.json --iterations 100 --checkpoint run/state --every 10 --resume --out run")
)
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


@train_app.command(
    epilog=example("export run/state --task alice --backbone meta-llama/Llama-2-7b-hf --out adapters/alice")
)
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
