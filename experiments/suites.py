"""The fixed studies: `demo` and the validation suites, as data."""

from __future__ import annotations

from pathlib import Path

from muxtune.experiments.study import StudyConfig
from muxtune.sim.traces.workload import read_workload
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.errors import NoAnswerError, UnknownKeyError
from muxtune.spec.layout import even_layout

DATA = Path(__file__).parent / "data"
SUITES = ("cpu", "gpu")

BASELINES = ("hf-peft", "sl-peft", "temporal")
DEMO_POLICIES = (*BASELINES, "muxtune", "muxtune:alignment=varlen", "greedy", "random")
SUITE_POLICIES = (
    *DEMO_POLICIES,
    "muxtune:charge=exact",
    "muxtune:alignment=chunk",
    "greedy:alignment=varlen",
    "greedy:alignment=chunk",
)


def demo_study(rounds: int, seed: int) -> StudyConfig:
    """Two workloads of real lengths on a 2 M parameter LLaMA-like backbone, on one rank and on a pipeline of two."""
    workloads = tuple(read_workload(DATA / f"demo-{name}.yaml") for name in ("uniform", "mixed"))
    model = workloads[0].model
    return StudyConfig(
        name="demo",
        workloads=workloads,
        cluster=parse_cluster("2xcpu"),
        layouts=(even_layout(model), even_layout(model, pp=2)),
        policies=DEMO_POLICIES,
        microbatches=2,
        rounds=rounds,
        profile_rounds=rounds,
        seed=seed,
    )


def suite_study(suite: str, rounds: int, seed: int) -> StudyConfig:
    """The fixed plans of a validation suite: one rank, a pipeline, tensor parallelism and replicas of two.

    Raises:
        UnknownKeyError: there is no such suite. NoAnswerError: its device is not here.
    """
    if suite not in SUITES:
        raise UnknownKeyError("suite", suite, SUITES)
    if suite == "gpu":
        raise NoAnswerError(
            "suite gpu: pending, no GPU has been measured yet: run `python -m muxtune.experiments.gpu_suite --out DIR` on one "
            "(profiles/README.md)"
        )
    demo = demo_study(rounds, seed)
    model = demo.workloads[0].model
    return StudyConfig(
        name=f"suite-{suite}",
        workloads=demo.workloads,
        cluster=demo.cluster,
        layouts=(*demo.layouts, even_layout(model, tp=2), even_layout(model, dp=2)),
        policies=SUITE_POLICIES,
        microbatches=demo.microbatches,
        rounds=rounds,
        profile_rounds=rounds,
        seed=seed,
        shrinks=True,
        repeats=True,
    )
