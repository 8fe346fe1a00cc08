"""run_study: profile, fit, plan, simulate, execute and compare on this machine; `demo` and `validate` are studies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from muxtune.executor.group import WorkerGroup
from muxtune.experiments.ranking import rank
from muxtune.experiments.result import Pair, PlanRow, Repeat, Shrunk, StudyResult
from muxtune.experiments.shrink import MOST_STEPS, shrink
from muxtune.policies.base import SystemState, make_policy
from muxtune.profiler.fit import fit
from muxtune.profiler.plans import Measured, measure_plans
from muxtune.profiler.provenance import birth, steal_since, stolen_ticks
from muxtune.profiler.run import Profiling
from muxtune.sim.cost.table import FittedTable, Table
from muxtune.sim.simulate import Simulation, make_evaluate, simulate
from muxtune.spec.bind import bind
from muxtune.spec.check import require_valid
from muxtune.spec.cluster import Cluster
from muxtune.spec.files import write_noun
from muxtune.spec.layout import Layout
from muxtune.spec.metrics import CauseError, bubble_fraction, compare_causes, compare_operators
from muxtune.spec.plan import Plan
from muxtune.spec.program import Bound
from muxtune.spec.task import Workload

Progress = Callable[[str, int, int], None]
Partial = Callable[[StudyResult, list[Pair]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """What to compare. Every policy plans every workload under every layout; `rounds` are counted rounds.

    With `shrinks` the plan with the worst error is cut down to the smallest that still shows it. With `repeats` the first
    plan of every workload and layout is measured twice, as if it were two plans.
    """

    name: str
    workloads: tuple[Workload, ...]
    cluster: Cluster
    layouts: tuple[Layout, ...]
    policies: tuple[str, ...]
    microbatches: int
    rounds: int
    profile_rounds: int
    seed: int = 0
    shrinks: bool = False
    repeats: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan under study, with the one Program that is both predicted and measured."""

    workload: Workload
    layout_name: str
    policy: str
    bound: Bound
    seconds: float

    @property
    def name(self) -> str:
        """Unique in a study."""
        return f"{self.workload.name}/{self.layout_name}/{self.policy}"


def layout_name(layout: Layout) -> str:
    """`1 rank`, `pp=2`, `tp=2 pp=2`."""
    degrees = (("tp", layout.tp), ("pp", layout.pp), ("dp", layout.dp))
    words = [f"{name}={n}" for name, n in degrees if n > 1] + (["sp"] if layout.sequence_parallel else [])
    return " ".join(words) or "1 rank"


class Study:
    """One run through the whole loop; `result` may be asked for at any time and is valid with what is there."""

    def __init__(self, config: StudyConfig, out: Path, progress: Progress) -> None:
        self.config, self.out, self.progress = config, out, progress
        self.started_s = time.monotonic()
        self.stolen = stolen_ticks()
        self.layouts = config.layouts
        self.tasks = [t for w in config.workloads for t in w.tasks]
        self.planned: list[Planned] = []
        self.measured: dict[str, Measured] = {}
        self.fitted: FittedTable | None = None
        self.shrunk: Shrunk | None = None
        self.repeats: list[Repeat] = []

    def run(self, partial: Partial) -> tuple[StudyResult, list[Pair]]:
        """Operator rounds before, between and after the plan rounds; `partial` gets a valid result after each.

        Layouts of equally many ranks run on the same processes, their plans in turn.
        """
        config = self.config
        sizes = sorted({x.ranks for x in self.layouts})
        chunks = len(sizes) + 1
        with Profiling(config.workloads, self.layouts, self.out / "profile") as profiling:
            self._operator_rounds(profiling, 1, chunks)
            self._plan()
            for index, ranks in enumerate(sizes):
                self._measure([x for x in self.layouts if x.ranks == ranks], ranks)
                self._operator_rounds(profiling, index + 2, chunks)
                self.fitted = fit(self.out / "profile", self.tasks)
                partial(*self.result(complete=index + 1 == len(sizes) and not config.shrinks))
        assert self.fitted is not None
        write_noun(self.fitted, self.out / "costs.json")
        if config.shrinks:
            self._shrink()
            partial(*self.result(complete=True))
        result, pairs = self.result(complete=True)
        write_noun(self._best(result.rows[-1].workload).bound.plan, self.out / "plan.json")
        return result, pairs

    def _best(self, workload: str) -> Planned:
        """The plan with the least measured time for a workload."""
        mine = [p for p in self.planned if p.workload.name == workload]
        return min(mine, key=lambda p: self.measured[p.name].ratio)

    def _operator_rounds(self, profiling: Profiling, part: int, parts: int) -> None:
        until = -(-self.config.profile_rounds * part // parts)
        profiling.rounds(until, lambda done, _: self.progress("profile", done, self.config.profile_rounds))

    def _plan(self) -> None:
        """Every policy plans on the costs measured so far; each plan is checked, bound once and written to disk."""
        config = self.config
        cost = Table(fit(self.out / "profile", self.tasks), config.cluster.device)
        total = len(self.layouts) * len(config.workloads) * len(config.policies)
        for layout in self.layouts:
            for workload in config.workloads:
                for reference in config.policies:
                    self.planned.append(self._plan_one(cost, workload, layout, reference))
                    self.progress("plan", len(self.planned), total)

    def _plan_one(self, cost: Table, workload: Workload, layout: Layout, reference: str) -> Planned:
        config = self.config
        state = SystemState(
            workload=workload,
            cluster=config.cluster,
            layout=layout,
            microbatches=config.microbatches,
            seed=config.seed,
            evaluate=make_evaluate(cost, config.seed),
        )
        start_s = time.monotonic()
        plan = make_policy(reference, cost).plan(state)
        seconds = time.monotonic() - start_s
        require_valid(plan)
        name = f"{workload.name}-{layout_name(layout)}-{reference}".replace(" ", "").replace(":", "-").replace("=", "")
        write_noun(plan, self.out / "plans" / f"{name}.json")
        bound = bind(plan, seed=config.seed)
        return Planned(
            workload=workload, layout_name=layout_name(layout), policy=reference, bound=bound, seconds=seconds
        )

    def _measure(self, layouts: Sequence[Layout], ranks: int) -> None:
        """Policies that decided alike share one Program, which is measured once."""
        names = [layout_name(x) for x in layouts]
        mine = [p for p in self.planned if p.layout_name in names]
        bounds = {p.bound.program.digest(): p.bound for p in mine}
        label = f"execute on {', '.join(names)}"
        firsts = list({(p.workload.name, p.layout_name): p for p in reversed(mine)}.values())
        firsts = firsts if self.config.repeats else []
        again = {f"{p.bound.program.digest()} again": p.bound for p in firsts}
        with WorkerGroup(ranks) as group:
            found = measure_plans(group, bounds | again, self.config.rounds, lambda d, n: self.progress(label, d, n))
        self.measured |= {p.name: found[p.bound.program.digest()] for p in mine}
        for planned in firsts:
            digest = planned.bound.program.digest()
            pair = (found[digest].ratio, found[f"{digest} again"].ratio)
            self.repeats.append(
                Repeat(
                    workload=planned.workload.name,
                    layout=planned.layout_name,
                    policy=planned.policy,
                    difference=abs(pair[0] - pair[1]) / min(pair),
                )
            )

    def _shrink(self) -> None:
        """Cut the worst plan down; it goes to worst.json."""
        result, _ = self.result(complete=False)
        worst, rounds = result.worst, max(4, self.config.rounds // 2)
        if worst is None or self.fitted is None or abs(worst.error) <= worst.noise:
            return
        planned = next(p for p in self.planned if p.bound.plan.decision_digest() == worst.plan_digest)
        cost, reference_ns = Table(self.fitted, self.config.cluster.device), self.fitted.reference_ns
        operators: dict[str, tuple[CauseError, ...]] = {}
        with WorkerGroup(planned.bound.plan.instances[0].layout) as group:

            def trial(plan: Plan) -> tuple[int, int, float]:
                bound = bind(plan, seed=self.config.seed)
                measured = measure_plans(group, {"plan": bound}, rounds, lambda d, n: None)["plan"]
                simulation, measured_ns = simulate(bound, cost), round(measured.ratio * reference_ns)
                scale = measured.reference_ns / reference_ns
                operators[plan.decision_digest()] = compare_operators(simulation.timeline, measured.timeline, scale)
                self.progress("shrink the worst plan", len(operators), MOST_STEPS + 1)
                return simulation.estimate.iteration_ns, measured_ns, measured.noise

            found = shrink(planned.bound.plan, trial)
        write_noun(found.plan, self.out / "worst.json")
        self.shrunk = Shrunk(
            workload=worst.workload,
            layout=worst.layout,
            policy=worst.policy,
            samples=tuple((t.task_id, t.global_batch_samples) for t in found.plan.workload.tasks),
            predicted_ns=found.predicted_ns,
            measured_ns=found.measured_ns,
            error=found.error,
            noise=found.noise,
            steps=found.steps,
            kept=found.kept,
            operators=operators[found.plan.decision_digest()],
        )

    def result(self, complete: bool) -> tuple[StudyResult, list[Pair]]:
        """Rows, rankings and timelines of the plans measured so far, on the costs fitted so far."""
        assert self.fitted is not None
        cost = Table(self.fitted, self.config.cluster.device)
        rows: list[PlanRow] = []
        pairs: list[Pair] = []
        for planned in self.planned:
            measured = self.measured.get(planned.name)
            if measured is None:
                continue
            simulation = simulate(planned.bound, cost)
            rows.append(plan_row(planned, simulation, measured, self.fitted.reference_ns))
            pairs.append(
                Pair(
                    workload=planned.workload.name,
                    layout=planned.layout_name,
                    policy=planned.policy,
                    predicted=simulation.timeline,
                    measured=measured.timeline,
                    scale=measured.reference_ns / self.fitted.reference_ns,
                )
            )
        born = birth("cpu", steal_percent=steal_since(self.stolen))
        config = self.config
        result = StudyResult(
            device=config.cluster.device.name,
            complete=complete,
            rows=tuple(rows),
            rankings=tuple(rank(rows)),
            families=self.fitted.families,
            fitted_on=f"calibration: {config.profile_rounds} rounds over operators, collectives and whole stages of "
            f"{config.workloads[0].model.name}",
            held_out=f"all {len(rows)} plans: no plan that is compared was used in fitting",
            reference_ns=self.fitted.reference_ns,
            provenance=born,
            seconds=time.monotonic() - self.started_s,
            shrunk=self.shrunk,
            repeats=tuple(self.repeats),
        )
        return result, pairs


def plan_row(planned: Planned, simulation: Simulation, measured: Measured, reference_ns: int) -> PlanRow:
    """One plan's row. Both times are brought to the speed that the machine had while the operators were profiled."""
    found, timeline = simulation.estimate, simulation.timeline
    measured_ns = round(measured.ratio * reference_ns)
    scale = measured.reference_ns / reference_ns
    return PlanRow(
        workload=planned.workload.name,
        layout=planned.layout_name,
        policy=planned.policy,
        plan_digest=planned.bound.plan.decision_digest(),
        program_digest=planned.bound.program.digest(),
        predicted_ns=found.iteration_ns,
        measured_ns=measured_ns,
        error=found.iteration_ns / measured_ns - 1,
        noise=measured.noise,
        relative_error=found.relative_error,
        extrapolated_fraction=found.extrapolated_fraction,
        rounds=len(measured.ratios),
        billed_tokens_per_s=found.billed_tokens * 1e9 / measured_ns,
        processed_tokens_per_s=found.processed_tokens * 1e9 / measured_ns,
        predicted_billed_tokens_per_s=found.rate_per_s(found.billed_tokens),
        predicted_peak_bytes=found.peak_bytes,
        measured_peak_bytes=measured.peak_bytes,
        predicted_bubble=bubble_fraction(timeline),
        measured_bubble=bubble_fraction(measured.timeline),
        plan_seconds=planned.seconds,
        causes=compare_causes(timeline, measured.timeline, scale),
        operators=compare_operators(timeline, measured.timeline, scale),
    )
