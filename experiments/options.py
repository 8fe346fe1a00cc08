"""The options that commands share: one spelling and one help text each."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class KernelName(StrEnum):
    """Back ends of grouped LoRA."""

    auto = "auto"
    triton = "triton"
    grouped_mm = "grouped-mm"
    loop = "loop"


class Device(StrEnum):
    """Where plans are executed."""

    cpu = "cpu"
    cuda = "cuda"


class Recompute(StrEnum):
    """What a unit keeps of its layers between forward and backward."""

    none = "none"
    full = "full"


WorkloadFile = Annotated[
    Path, typer.Option("--workload", metavar="FILE", help="Workload file (YAML or JSON): model and tasks.")
]
WorkloadFiles = Annotated[
    list[Path],
    typer.Option("--workload", metavar="FILE", help="Workload file; may be repeated (one model, different task_ids)."),
]
ClusterName = Annotated[
    str,
    typer.Option("--cluster", metavar="NAME|FILE", help="[NODESx]GPUSxDEVICE[-LINK] (4xA40-nvlink, cpu) or a file."),
]
SeveralWorkloads = Annotated[
    list[Path], typer.Option("--workload", metavar="FILE", help="Workload file (YAML or JSON); may be repeated.")
]
ClusterNames = Annotated[
    list[str],
    typer.Option("--cluster", metavar="NAME|FILE", help="[NODESx]GPUSxDEVICE[-LINK], cpu or a file; may be repeated."),
]
Jobs = Annotated[int, typer.Option("--jobs", metavar="N", min=1, help="Processes that plan side by side.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file, as `muxtune plan` writes it.")]
PolicyName = Annotated[str, typer.Option("--policy", metavar="POLICY", help="NAME[:key=value,...] or FILE.py:CLASS.")]
Tp = Annotated[int, typer.Option("--tp", metavar="N", min=1, help="Tensor parallelism.")]
Pp = Annotated[
    int | None,
    typer.Option(
        "--pp", metavar="N", min=1, help="Pipeline stages. [default: devices / (tp x dp), at most one stage a layer]"
    ),
]
Dp = Annotated[int, typer.Option("--dp", metavar="N", min=1, help="Data parallelism.")]
SequenceParallel = Annotated[
    bool, typer.Option("--sequence-parallel", help="Cut the residual stream over tp along the tokens.")
]
Recomputation = Annotated[
    Recompute,
    typer.Option("--recompute", help="full keeps only each layer's input; the backward runs the forward again."),
]
Microbatches = Annotated[
    str,
    typer.Option(
        "--microbatches",
        metavar="N[,N...]|auto",
        help="Micro-batches a global batch is spread over; several are searched.",
    ),
]
SearchLayout = Annotated[
    bool,
    typer.Option("--search-layout", help="Search tp x pp x dp, for every policy alike; leave out --tp, --pp, --dp."),
]
Cost = Annotated[
    str,
    typer.Option(
        "--cost",
        metavar="NAME|DIR|FILE",
        help="A measured profile (its folder or costs.json), roofline, paper, interference (NAME:key=value,…), or auto: "
        "a recorded profile that covers what is asked, else roofline.",
    ),
]
Objective = Annotated[
    str,
    typer.Option(
        "--objective",
        metavar="NAME|FILE.py:CLASS",
        help="What plans are ranked by (see `muxtune list objectives`); policies that search optimise it.",
    ),
]
MaxSlowdown = Annotated[
    float | None,
    typer.Option("--max-slowdown", metavar="X", help="Refuse plans that slow a task more than this, against alone."),
]
CurrentPlan = Annotated[
    Path | None,
    typer.Option(
        "--current", metavar="PLAN", help="Plan in force: insert who arrived, remove who left, keep the rest."
    ),
]
ReplanCost = Annotated[
    float, typer.Option("--replan-cost", metavar="SECONDS", help="What a change that nobody forces costs, once.")
]
Horizon = Annotated[
    float, typer.Option("--horizon", metavar="SECONDS", help="Time over which such a change has to pay.")
]
FullReplan = Annotated[
    bool, typer.Option("--full", help="Hold a new plan of the policy against the one in force, not a changed one.")
]
Extrapolate = Annotated[
    bool, typer.Option("--allow-extrapolation", help="Answer outside the measured range, and say how much rests on it.")
]
Draws = Annotated[
    int, typer.Option("--draws", metavar="N", min=1, help="Draws of samples to average over (varlen plans).")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the draws of samples.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
OutFolder = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for the result's files.")]
TraceFile = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE", help="Write a Chrome trace (opens in Perfetto).")
]
Frequency = Annotated[
    int | None,
    typer.Option("--frequency", metavar="MHZ", help="What-if: predict at this core clock, a step of the device."),
]
Frequencies = Annotated[
    str,
    typer.Option("--frequencies", metavar="all|MHZ,...", help="What-if: add time, power and energy at these steps."),
]
StudyFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for report, trace and results.")]
Rounds = Annotated[int, typer.Option("--rounds", metavar="N", min=2, help="Rounds that count; 20 resolve 10 %.")]
CheckpointFolder = Annotated[
    Path | None, typer.Option("--checkpoint", metavar="DIR", help="Save the run here, and every task that leaves.")
]
Every = Annotated[int, typer.Option("--every", metavar="K", min=1, help="Iterations between two checkpoints.")]
Keep = Annotated[int, typer.Option("--keep", metavar="N", min=1, help="Checkpoints to keep.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")]
Joins = Annotated[
    list[str] | None,
    typer.Option("--join", metavar="N:FILE", help="Tasks of a workload file join before iteration N; may be repeated."),
]
JoinsFrom = Annotated[
    list[str] | None,
    typer.Option(
        "--join-from",
        metavar="N:TASK=DIR",
        help="A task saved in a checkpoint folder goes on here before iteration N; may be repeated.",
    ),
]
Leaves = Annotated[
    list[str] | None,
    typer.Option("--leave", metavar="N:TASK", help="A task leaves before iteration N; may be repeated."),
]
Replan = Annotated[
    str,
    typer.Option(
        "--replan", metavar="POLICY", help="Who plans when tasks come or go.  [default: the plan without them]"
    ),
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Refuse operators that may give other bits the next time.")
]
LayerSpecName = Annotated[
    str, typer.Option("--layer-spec", metavar="NAME", help="Norms by te (Transformer Engine), local, or auto.")
]
Kernel = Annotated[
    KernelName,
    typer.Option(
        "--kernel", help="Grouped LoRA by triton (CUDA), grouped-mm or a loop; auto is triton on CUDA, else the loop."
    ),
]
Backbone = Annotated[
    Path | None,
    typer.Option("--backbone", metavar="DIR", help="Weights: folder of a Hugging Face model.  [default: random]"),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="DIR", help="Folder of the text data sets.  [default: seeded noise of their lengths]"
    ),
]
