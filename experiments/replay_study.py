"""ReplayStudy: an accelerated trace executed on this machine, and the cluster engine's prediction of every job beside it.

What the prediction is fed: operator times (profiled before and after the run), the costs of changes, and the host time between
iterations (both measured on other jobs, before and after). JCT = end − arrival; error = predicted / measured − 1.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from muxtune.executor.group import WorkerGroup
from muxtune.experiments.commands.inputs import Progress
from muxtune.experiments.live import Live, Lived, Planner
from muxtune.experiments.pricing import PlanPricer, tasks_per_instance
from muxtune.policies.base import make_policy
from muxtune.policies.cluster.base import make_cluster_policy
from muxtune.profiler.fit import fit
from muxtune.profiler.run import Profiling
from muxtune.sim.cluster.engine import Replay
from muxtune.sim.cluster.prices import Prices, Shelf
from muxtune.sim.cluster.setup import Setup
from muxtune.sim.cost.table import FittedTable, Table
from muxtune.sim.simulate import make_evaluate
from muxtune.sim.traces.formats.muxtune import write_trace
from muxtune.spec.cluster import Cluster
from muxtune.spec.errors import InputError
from muxtune.spec.estimate import Estimate
from muxtune.spec.files import write_noun
from muxtune.spec.fleet import FleetCosts, InstanceShape, TaskType, task_type
from muxtune.spec.jobs import Job, Trace, job_steps, job_task
from muxtune.spec.layout import even_layout
from muxtune.spec.model import ModelSpec
from muxtune.spec.noun import noun
from muxtune.spec.task import Workload

#: Steps of the jobs that measure the costs of changes: they leave one by one and in pairs.
PROBE_STEPS = (2, 4, 4, 6, 3, 5, 7, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayStudyConfig:
    """What is run: a trace whose jobs are moved onto `model`; its last arrival comes after `seconds`."""

    trace: Trace
    model: ModelSpec
    cluster: Cluster
    policy: str = "muxtune"
    microbatches: int = 2
    most: int = 4
    seconds: float = 30.0
    profile_rounds: int = 20
    seed: int = 0


@noun
class Costs:
    """What changes and iterations took on the host, by least squares over the jobs that measured them; never below 0."""

    replan_s: float
    join_s: float
    leave_s: float
    start_s: float
    between_s: float
    between_task_s: float

    def fleet(self) -> FleetCosts:
        """As the cluster engine takes them; the backbone is loaded within `start_s`, which the first change follows."""
        names = ("replan", "join", "leave", "between", "between_task")
        given = {f"{name}_ns": round(getattr(self, f"{name}_s") * 1e9) for name in names}
        start_s = max(0.0, self.start_s - self.replan_s - self.join_s)
        return FleetCosts(**given, start_ns=round(start_s * 1e9), load_bytes_per_s=2**62)


@noun
class Compared:
    """The run, its prediction at the speed that the machine had meanwhile, and at the speed of the profile."""

    trace: Trace
    lived: Lived
    costs: Costs
    speed: float
    predicted: tuple[dict[str, Any], ...]
    unscaled: tuple[dict[str, Any], ...]
    shares: dict[str, float]
    extrapolated_fraction: float


class ReplayStudy:
    """Profile, measure changes, run, measure and profile again, predict."""

    def __init__(self, config: ReplayStudyConfig, out: Path, progress: Progress) -> None:
        self.config, self.out, self.progress = config, out, progress
        self.layout = even_layout(config.model, pp=1)
        self.most = tasks_per_instance(config.policy, config.most)
        self.jobs = list(itertools.islice(config.trace, 10_000))
        if len(self.jobs) < 2:
            raise InputError(f"trace {config.trace.about.name}: has {len(self.jobs)} jobs: give at least 2")
        self.extrapolated = 0.0

    def run(self) -> Compared:
        """The whole study; `out` gets trace.jsonl, costs.json and the profile.

        Raises:
            InputError: a trace that cannot be used. ExecutionError: a worker failed.
        """
        config = self.config
        half = -(-config.profile_rounds // 2)
        with Profiling([self._types()], [self.layout], self.out / "profile") as profiling:
            profiling.rounds(half, lambda done, _: self.progress("profile", done, config.profile_rounds))
            trace = self._accelerated(self._fit())
            write_trace(trace, self.out / "trace.jsonl")
            jobs = list(trace)
            with WorkerGroup(self.layout) as group:
                live = Live(group, self._planner(self._fit()), self.most)
                before = live.run(self._probe(jobs))
                lived = live.run(jobs, lambda done, of: self.progress("run", done, of))
                after = live.run(self._probe(jobs))
            rounds = config.profile_rounds
            profiling.rounds(rounds, lambda done, _: self.progress("profile", done, rounds))
        fitted = fit(self.out / "profile", self._types().tasks)
        write_noun(fitted, self.out / "costs.json")
        return self._compared(trace, lived, measured_costs([before, after]), fitted)

    def _compared(self, trace: Trace, lived: Lived, costs: Costs, fitted: FittedTable) -> Compared:
        speed = statistics.median(lived.reference_ns) / fitted.reference_ns
        table = Table(fitted, self.config.cluster.device, allow_extrapolation=True)
        predicted, shares = self._predict(trace, costs, table, speed)
        return Compared(
            trace=trace,
            lived=lived,
            costs=costs,
            speed=speed,
            predicted=predicted,
            unscaled=self._predict(trace, costs, table, 1.0)[0],
            shares=shares,
            extrapolated_fraction=self.extrapolated,
        )

    def _moved(self, job: Job) -> Job:
        """The job on the tiny backbone."""
        length = min(job.billed_len_tokens, self.config.model.max_positions)
        return replace(job, model=self.config.model.name, billed_len_tokens=length, cancel_ns=None, deadline_ns=None)

    def _types(self) -> Workload:
        """One task a type, repeated until an instance is full: what is profiled covers every mix."""
        kinds = list({task_type(j): j for j in map(self._moved, self.jobs)}.values())
        times = -(-self.most // len(kinds))
        tasks = tuple(
            replace(job_task(job, 1), task_id=f"type-{n}-{i}", arrival_ns=0)
            for n in range(times)
            for i, job in enumerate(kinds)
        )
        tables = tuple(self.config.trace.lengths(name) for name in dict.fromkeys(t.dataset for t in tasks))
        return Workload(name="types", model=self.config.model, datasets=tables, tasks=tasks)

    def _fit(self) -> Table:
        fitted = fit(self.out / "profile", self._types().tasks)
        return Table(fitted, self.config.cluster.device, allow_extrapolation=True)

    def _accelerated(self, cost: Table) -> Trace:
        """Arrivals and durations divided by one number; durations become steps by the work rule."""
        first_ns, last_ns = self.jobs[0].arrival_ns, self.jobs[-1].arrival_ns
        faster = max(1.0, (last_ns - first_ns) / (self.config.seconds * 1e9))
        solo = self._pricer("hf-peft", cost)

        def made(job: Job) -> Job:
            moved = self._moved(job)
            if job.duration_ns is not None:
                shorter = replace(moved, duration_ns=round(job.duration_ns / faster))
                steps = job_steps(shorter, solo([task_type(moved)], self._shape()).iteration_ns)
                moved = replace(moved, duration_ns=None, steps=steps)
            return replace(moved, arrival_ns=round((job.arrival_ns - first_ns) / faster))

        jobs = tuple(map(made, self.jobs))
        about = self.config.trace.about
        mapping = f"{about.mapping}; {faster:.6g} times faster, on {self.config.model.name}".lstrip("; ")
        header = replace(about, mapping=mapping)
        return Trace(about=header, open_jobs=lambda: iter(jobs), lengths=self.config.trace.lengths)

    def _shape(self) -> InstanceShape:
        config = self.config
        return InstanceShape(
            model=config.model.name, slice=config.cluster, layout=self.layout, microbatches=config.microbatches
        )

    def _pricer(self, policy: str, cost: Table) -> PlanPricer:
        model = self.config.model
        return PlanPricer(
            policy, lambda _: cost, self.config.trace.lengths, model_of=lambda _: model, seed=self.config.seed
        )

    def _planner(self, cost: Table) -> Planner:
        config = self.config
        return Planner(
            model=config.model,
            cluster=config.cluster,
            layout=self.layout,
            microbatches=config.microbatches,
            policy=make_policy(config.policy, cost),
            evaluate=make_evaluate(cost, config.seed),
            trace=config.trace,
            seed=config.seed,
        )

    def _probe(self, jobs: Sequence[Job]) -> list[Job]:
        """Short jobs of the trace's types that all come at once."""
        kinds = list({task_type(j): j for j in jobs}.values())
        return [
            replace(kinds[i % len(kinds)], job_id=f"probe-{i}", arrival_ns=0, steps=PROBE_STEPS[i % len(PROBE_STEPS)])
            for i in range(2 * max(self.most, len(PROBE_STEPS)))
        ]

    def _predict(
        self, trace: Trace, costs: Costs, table: Table, speed: float
    ) -> tuple[tuple[dict[str, Any], ...], dict[str, float]]:
        """A row a job, and the devices' seconds by what they did; iterations take `speed` times as long as profiled."""
        config, made = self.config, self._pricer(self.config.policy, table)

        def price(types: Sequence[TaskType], shape: InstanceShape) -> Estimate:
            found = made(types, shape)
            self.extrapolated = max(self.extrapolated, found.extrapolated_fraction)
            return replace(found, iteration_ns=round(found.iteration_ns * speed))

        setup = Setup(
            clusters=(config.cluster,),
            layout_of=lambda _: self.layout,
            model_of=lambda _: config.model,
            microbatches_of=lambda _: config.microbatches,
            tasks_per_instance=self.most,
            max_instances=1,
            costs=costs.fleet(),
        )
        rows: dict[str, dict[str, Any]] = {}
        shelves = Shelf(price), Shelf(self._pricer("hf-peft", table))

        def told(row: dict[str, Any]) -> None:
            rows[row["job_id"]] = row

        replay = Replay(trace, make_cluster_policy("fcfs"), setup, Prices(*shelves), told, timed=False)
        replay.run()
        return tuple(rows[j.job_id] for j in trace), {k: v / 1e9 for k, v in replay.fleet.books.gpu_ns.items()}


def measured_costs(runs: Sequence[Lived]) -> Costs:
    """seconds of a change = replan + join · came + leave · left; between two iterations = between + between_task · tasks."""
    changes = [c for run in runs for c in run.changes[1:]]
    passes = [p for run in runs for p in run.passes]
    replan, join, leave = _least_squares([((c.joined, c.left), c.seconds) for c in changes])
    between, each = _least_squares([((p.tasks,), p.between_s) for p in passes])
    return Costs(
        replan_s=replan,
        join_s=join,
        leave_s=leave,
        start_s=statistics.median(run.changes[0].seconds for run in runs),
        between_s=between,
        between_task_s=each,
    )


def _least_squares(seen: Sequence[tuple[tuple[int, ...], float]]) -> tuple[float, ...]:
    """Coefficients ≥ 0 of 1 and the counts; of equal counts the median, weighted by how often they were seen."""
    groups: dict[tuple[int, ...], list[float]] = {}
    for counts, seconds in seen:
        groups.setdefault(counts, []).append(seconds)
    weights = np.sqrt([len(values) for values in groups.values()])
    matrix = np.array([(1, *counts) for counts in groups], dtype=float) * weights[:, None]
    found, _ = nnls(matrix, np.array([statistics.median(v) for v in groups.values()]) * weights)
    return tuple(float(x) for x in found)
