"""Problem: what `plan` and `compare` ask a policy to solve, read from files and options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import choose_layout, load_cost
from muxtune.experiments.commands.rows import Alone, cost_body, cost_text
from muxtune.policies.base import SystemState
from muxtune.sim.cost.base import CostModel
from muxtune.sim.simulate import make_evaluate
from muxtune.sim.traces.cluster import read_cluster
from muxtune.sim.traces.workload import read_workload
from muxtune.spec.cluster import Cluster
from muxtune.spec.layout import Layout
from muxtune.spec.noun import digest
from muxtune.spec.task import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of planning, as the command line spells them; `pp` None takes every device that is left."""

    tp: int = 1
    pp: int | None = None
    dp: int = 1
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
            "layout": f"tp={self.layout.tp} pp={self.layout.pp} dp={self.layout.dp}",
            "microbatches": self.options.microbatches,
            "seed": self.options.seed,
            "cost_model": cost_body(self.cost),
            "workload_digest": digest(self.workload),
        }


def read_problem(workload: Path, cluster: str, options: Options) -> Problem:
    """Read the files and build the layout and the cost model.

    Raises:
        InputError: wrong file, name or option.
    """
    tasks, place = read_workload(workload), read_cluster(cluster)
    return Problem(
        workload=tasks,
        cluster=place,
        layout=choose_layout(tasks.model, place, options.tp, options.pp, options.dp),
        cost=load_cost(options.cost, place, options.allow_extrapolation),
        options=options,
    )


def problem_text(body: dict[str, Any]) -> str:
    """One line that says what was asked."""
    head = f"{body['workload']} on {body['cluster']}, {body['layout']}, {body['microbatches']} micro-batches"
    return f"{head}, {cost_text(body['cost_model'])}"
