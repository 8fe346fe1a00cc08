"""Problem: what `plan` and `compare` ask a policy to solve, read from files and options."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.costs import AUTO, CostChoice, choose_cost
from muxtune.experiments.commands.rows import cost_text
from muxtune.policies.alone import Alone, with_slowdowns
from muxtune.policies.base import Evaluate, SystemState
from muxtune.policies.choices import Choices, layout_choices, microbatch_counts
from muxtune.policies.objectives.base import THROUGHPUT, Goal, require_objective
from muxtune.sim.cost.base import CostModel
from muxtune.sim.simulate import make_evaluate
from muxtune.sim.traces.cluster import read_cluster
from muxtune.sim.traces.workload import read_workload
from muxtune.spec.cluster import Cluster
from muxtune.spec.errors import InputError
from muxtune.spec.layout import Layout, LayoutChoice, Recompute, even_layout
from muxtune.spec.model import ModelSpec
from muxtune.spec.noun import digest
from muxtune.spec.task import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of planning, as the command line spells them; `pp` None takes every device that is left.

    Several `microbatches`, or none (every power of two up to the largest global batch), are searched; `search_layout`
    searches tp, pp and dp as well. `goal` is what plans are ranked by; `pareto` holds the objectives (two, or none) whose
    best trade-offs `compare` marks.
    """

    tp: int = 1
    pp: int | None = None
    dp: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    microbatches: tuple[int, ...] = (4,)
    search_layout: bool = False
    cost: str = AUTO
    allow_extrapolation: bool = False
    draws: int = 8
    seed: int = 0
    goal: Goal = THROUGHPUT
    pareto: tuple[str, ...] = ()

    @property
    def objectives(self) -> tuple[str, ...]:
        """Every objective that is named."""
        return tuple(dict.fromkeys((self.goal.objective, *self.pareto)))

    @property
    def reads_slowdowns(self) -> bool:
        """Whether plans are ranked or marked by slowdowns."""
        return self.goal.reads_slowdowns or any(require_objective(o).reads_slowdowns for o in self.pareto)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A workload on a cluster under one layout, or under `choices` to pick from, and the cost model to plan with."""

    workload: Workload
    cluster: Cluster
    layout: Layout
    microbatches: int
    chosen: CostChoice
    options: Options
    choices: Choices | None = None

    @property
    def cost(self) -> CostModel:
        """The cost model to plan with."""
        return self.chosen.model

    def state(self) -> SystemState:
        """What a policy is handed; each state has its own simulator cache, so that no policy warms it for another."""
        return SystemState(
            workload=self.workload,
            cluster=self.cluster,
            layout=self.layout,
            microbatches=self.microbatches,
            seed=self.options.seed,
            evaluate=self._evaluate(),
            goal=self.options.goal,
        )

    def _evaluate(self) -> Evaluate:
        evaluate = make_evaluate(self.cost, self.options.seed, self.options.draws)
        return with_slowdowns(evaluate, self._references()) if self.options.goal.reads_slowdowns else evaluate

    def _references(self) -> tuple[LayoutChoice, ...]:
        """What a task alone may run under, where plans are ranked by slowdowns; else what the plan gives it."""
        if not self.options.reads_slowdowns:
            return ()
        given = LayoutChoice(layout=self.layout, microbatches=self.microbatches)
        return self.choices.kept if self.choices is not None and self.choices.kept else (given,)

    def alone(self) -> Alone:
        """Reference for slowdowns."""
        return Alone(make_evaluate(self.cost, self.options.seed, self.options.draws), self._references())

    def body(self) -> dict[str, Any]:
        """The keys that say what was asked."""
        return {
            "workload": self.workload.name,
            "cluster": self.cluster.name,
            "layout": "searched" if self.options.search_layout else self.layout.name,
            "recompute": self.layout.recompute,
            "microbatches": self.microbatches if self.choices is None else self._searched_counts(),
            "layout_choices": None if self.choices is None else self._searched(),
            "seed": self.options.seed,
            "objective": self.options.goal.objective,
            "max_slowdown": self.options.goal.max_slowdown,
            "slowdown_against": "alone under the plan's layout"
            if not (n := len(self._references()))
            else f"alone under the best of {n} choices",
            "cost_model": self.chosen.body(),
            "workload_digest": digest(self.workload),
        }

    def _searched_counts(self) -> list[int]:
        assert self.choices is not None
        return sorted({c.microbatches for c in self.choices.kept})

    def _searched(self) -> dict[str, int]:
        """How many layouts and counts every policy may pick from, and how many were left out."""
        assert self.choices is not None
        return {
            "kept": len(self.choices.kept),
            "pruned_shape": self.choices.pruned_shape,
            "pruned_memory": self.choices.pruned_memory,
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
    if options.microbatches and max(options.microbatches) < dp:
        raise InputError(
            f"--microbatches {max(options.microbatches)} with dp={dp}: some replicas would have none; give at least {dp}"
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
    for name in options.objectives:
        require_objective(name)
    tasks, place = read_workload(workload), read_cluster(cluster)
    choices = find_choices(tasks, place, options)
    if choices is not None and choices.kept:
        layout, microbatches = choices.kept[0].layout, choices.kept[0].microbatches
    else:
        layout, microbatches = choose_layout(tasks.model, place, options), (options.microbatches or (1,))[0]
    layouts = [layout] if choices is None else list(dict.fromkeys(c.layout for c in choices.kept))
    return Problem(
        workload=tasks,
        cluster=place,
        layout=layout,
        microbatches=microbatches,
        chosen=choose_cost(options.cost, place, tasks, layouts, options.allow_extrapolation),
        options=options,
        choices=choices,
    )


def find_choices(workload: Workload, cluster: Cluster, options: Options) -> Choices | None:
    """What is searched; None where the options name one layout and one micro-batch count.

    Raises:
        InputError: --search-layout beside a degree, or wrong degrees.
    """
    counts = options.microbatches or microbatch_counts(workload)
    if options.search_layout:
        given = (("--tp", options.tp, 1), ("--pp", options.pp, None), ("--dp", options.dp, 1))
        for name, value, default in given:
            if value != default:
                raise InputError(f"--search-layout with {name} {value}: the search chooses it; leave one of them out")
        return layout_choices(workload, cluster, counts, options.sequence_parallel, options.recompute)
    if len(options.microbatches) == 1:
        return None
    layout = choose_layout(workload.model, cluster, options)
    kept = tuple(LayoutChoice(layout=layout, microbatches=c) for c in counts if c >= layout.dp)
    return Choices(kept=kept, pruned_shape=len(counts) - len(kept), pruned_memory=0)


def parse_microbatches(text: str) -> tuple[int, ...]:
    """`4`, `2,4,8` or `auto` (an empty tuple).

    Raises:
        InputError: something else, or a number below 1.
    """
    if text == "auto":
        return ()
    pieces = text.split(",")
    if not all(piece.isascii() and piece.isdigit() and int(piece) >= 1 for piece in pieces):
        raise InputError(
            f"--microbatches {text!r}: give a number, numbers separated by commas, or auto; each at least 1"
        )
    return tuple(dict.fromkeys(map(int, pieces)))


def parse_goal(objective: str, max_slowdown: float | None) -> Goal:
    """What plans are ranked by.

    Raises:
        UnknownKeyError: no such objective. InputError: a cap that is not above 0.
    """
    require_objective(objective)
    if max_slowdown is not None and not 0 < max_slowdown < math.inf:
        raise InputError(f"--max-slowdown {max_slowdown}: must be above 0; 1 is as fast as alone")
    return Goal(objective=objective, max_slowdown=max_slowdown)


def problem_text(body: dict[str, Any]) -> str:
    """One line that says what was asked."""
    counts = body["microbatches"]
    number = ", ".join(map(str, counts)) if isinstance(counts, list) else counts
    layout = "layout searched" if body["layout"] == "searched" else body["layout"]
    head = f"{body['workload']} on {body['cluster']}, {layout}, {number} micro-batches"
    if found := body["layout_choices"]:
        left_out = f"{found['pruned_shape']} ruled out by shape, {found['pruned_memory']} by memory"
        head += f" ({found['kept']} choices, {left_out})"
    if body["objective"] != "throughput" or body["max_slowdown"] is not None:
        cap = "" if body["max_slowdown"] is None else f", slowdown at most {body['max_slowdown']:g}x"
        head += f", objective {body['objective']}{cap}"
    return f"{head}, {cost_text(body['cost_model'])}"
