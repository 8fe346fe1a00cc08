"""Problem: what `plan` and `compare` ask a policy to solve, read from files and options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import load_cost
from muxtune.experiments.commands.rows import Alone, cost_body, cost_text
from muxtune.policies.base import SystemState
from muxtune.sim.cost.base import CostModel
from muxtune.sim.simulate import make_evaluate
from muxtune.sim.traces.cluster import read_cluster
from muxtune.sim.traces.workload import read_workload
from muxtune.spec.cluster import Cluster
from muxtune.spec.errors import InputError
from muxtune.spec.layout import Layout, Recompute, even_layout
from muxtune.spec.model import ModelSpec
from muxtune.spec.noun import digest
from muxtune.spec.task import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of planning, as the command line spells them; `pp` None takes every device that is left."""

    tp: int = 1
    pp: int | None = None
    dp: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    microbatches: int = 4
    cost: str = "roofline"
    allow_extrapolation: bool = False
    draws: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A workload on a cluster under one layout, and the cost model to plan with."""

    workload: Workload
    cluster: Cluster
    layout: Layout
    cost: CostModel
    options: Options

    def state(self) -> SystemState:
        """What a policy is handed; each state has its own simulator cache, so that no policy warms it for another."""
        return SystemState(
            workload=self.workload,
            cluster=self.cluster,
            layout=self.layout,
            microbatches=self.options.microbatches,
            seed=self.options.seed,
            evaluate=make_evaluate(self.cost, self.options.seed, self.options.draws),
        )

    def alone(self) -> Alone:
        """Reference for slowdowns."""
        return Alone(self.workload, self.cluster, self.cost, self.options.seed)

    def body(self) -> dict[str, Any]:
        """The keys that say what was asked."""
        return {
            "workload": self.workload.name,
            "cluster": self.cluster.name,
            "layout": self.layout.name,
            "recompute": self.layout.recompute,
            "microbatches": self.options.microbatches,
            "seed": self.options.seed,
            "cost_model": cost_body(self.cost),
            "workload_digest": digest(self.workload),
        }


def choose_layout(model: ModelSpec, cluster: Cluster, options: Options) -> Layout:
    """The layout of one instance; without `pp` as many stages as devices are left, at most one a layer.

    Raises:
        InputError: a degree below 1, more stages than layers, more ranks than devices, nothing to cut a sequence over.
    """
    tp, pp, dp = options.tp, options.pp, options.dp
    if tp < 1 or dp < 1 or (pp is not None and pp < 1):
        raise InputError(f"tp={tp}, pp={pp}, dp={dp}: each must be at least 1")
    if options.sequence_parallel and tp == 1:
        raise InputError(
            "--sequence-parallel with tp=1: there is nothing to cut over; give --tp 2 or more, or leave it out"
        )
    if options.microbatches < dp:
        raise InputError(
            f"--microbatches {options.microbatches} with dp={dp}: some replicas would have none; give at least {dp}"
        )
    stages = pp if pp is not None else max(1, min(cluster.size // (tp * dp), model.layers))
    if tp * stages * dp > cluster.size:
        raise InputError(
            f"tp={tp} x pp={stages} x dp={dp} needs {tp * stages * dp} devices, cluster {cluster.name} has "
            f"{cluster.size}: lower a degree or give a larger --cluster"
        )
    layout = even_layout(model, tp=tp, pp=stages, dp=dp, sequence_parallel=options.sequence_parallel)
    return replace(layout, recompute=options.recompute)


def read_problem(workload: Path, cluster: str, options: Options) -> Problem:
    """Read the files and build the layout and the cost model.

    Raises:
        InputError: wrong file, name or option.
    """
    tasks, place = read_workload(workload), read_cluster(cluster)
    return Problem(
        workload=tasks,
        cluster=place,
        layout=choose_layout(tasks.model, place, options),
        cost=load_cost(options.cost, place, options.allow_extrapolation),
        options=options,
    )


def problem_text(body: dict[str, Any]) -> str:
    """One line that says what was asked."""
    head = f"{body['workload']} on {body['cluster']}, {body['layout']}, {body['microbatches']} micro-batches"
    return f"{head}, {cost_text(body['cost_model'])}"
