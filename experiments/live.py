"""Live: jobs that really arrive at one instance, share it first come, first served, and leave it; every change is re-planned.

The clock is the machine's, from the moment at which `run` begins. Tasks change at the end of an iteration, as in sim/cluster.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from muxtune.executor.group import WorkerGroup
from muxtune.executor.messages import Unload
from muxtune.executor.session import NAME, ReplanReport, Session
from muxtune.policies.base import Evaluate, Policy, SystemState
from muxtune.profiler.speed import group_reference_ns, waited_s
from muxtune.spec.cluster import Cluster
from muxtune.spec.jobs import Job, Trace, job_task
from muxtune.spec.layout import Layout
from muxtune.spec.model import ModelSpec
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan
from muxtune.spec.task import Task, Workload


@noun
class Change:
    """A change of the set of tasks: how many came and left, how long the instance stood still, and what of it was planning."""

    joined: int
    left: int
    seconds: float
    report: ReplanReport | None


@noun
class Pass:
    """One iteration: tasks, its time on the ranks, and the time until then since the last end that no rank computed."""

    tasks: int
    span_s: float
    between_s: float


@noun
class Life:
    """A job's times on the clock of the run; `start_s` is the begin of its first iteration."""

    job_id: str
    arrival_s: float
    start_s: float
    end_s: float
    steps: int


@noun
class Lived:
    """What happened: jobs in the order of the trace, changes (the first one loads the backbone), iterations, speeds.

    `waited_s` is how long the ranks were ready and had no core.
    """

    lives: tuple[Life, ...]
    changes: tuple[Change, ...]
    passes: tuple[Pass, ...]
    reference_ns: tuple[float, ...]
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """How the tasks of an instance are planned, whoever they are."""

    model: ModelSpec
    cluster: Cluster
    layout: Layout
    microbatches: int
    policy: Policy
    evaluate: Evaluate
    trace: Trace
    seed: int = 0

    def plan(self, tasks: Sequence[Task]) -> Plan:
        """The policy's plan for these tasks.

        Raises:
            PlanError, NoAnswerError: there is none.
        """
        names = dict.fromkeys(t.dataset for t in tasks)
        tables = tuple(self.trace.lengths(name) for name in names)
        workload = Workload(name="instance", model=self.model, datasets=tables, tasks=tuple(tasks))
        state = SystemState(
            workload=workload,
            cluster=self.cluster,
            layout=self.layout,
            microbatches=self.microbatches,
            seed=self.seed,
            evaluate=self.evaluate,
        )
        return self.policy.plan(state)


class Live:
    """One instance on a group of workers. `run` may be called again; each run begins with an instance that is not loaded."""

    def __init__(self, group: WorkerGroup, planner: Planner, most: int) -> None:
        self.group, self.planner, self.most = group, planner, most

    def run(self, jobs: Sequence[Job], told: Callable[[int, int], None] = lambda done, of: None) -> Lived:
        """Train these jobs (with `steps`, by arrival) from the first arrival to the last departure.

        Raises:
            PlanError, NoAnswerError: a mix cannot be planned. ExecutionError: a worker failed.
        """
        run, before_s = _Run(self, jobs), waited_s(self.group)
        while not run.over():
            if not run.change() and not run.iterate():
                time.sleep(max(0.0, run.next_arrival_s() - run.now_s()))
            told(len(run.ends), len(jobs))
        self.group.ask(Unload(name=NAME))
        return run.lived(waited_s(self.group) - before_s)


class _Run:
    def __init__(self, live: Live, jobs: Sequence[Job]) -> None:
        self.live, self.jobs = live, jobs
        self.coming, self.waiting = deque(jobs), deque[Job]()
        self.here: dict[str, Job] = {}
        self.session: Session | None = None
        self.starts: dict[str, float] = {}
        self.ends: dict[str, float] = {}
        self.changes: list[Change] = []
        self.passes: list[Pass] = []
        self.speeds: list[float] = []
        self.began_s = time.perf_counter()

    def now_s(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.began_s

    def over(self) -> bool:
        """Whether every job has left."""
        return len(self.ends) == len(self.jobs)

    def next_arrival_s(self) -> float:
        """When the next job comes."""
        return self.coming[0].arrival_ns / 1e9

    def change(self) -> bool:
        """Let tasks that are done leave and those that wait join; whether anything changed. Without a task nothing does."""
        now_s = self.now_s()
        while self.coming and self.coming[0].arrival_ns / 1e9 <= now_s:
            self.waiting.append(self.coming.popleft())
        gone = [name for name in self.here if name in self.ends]
        stay = [job for name, job in self.here.items() if name not in self.ends]
        came = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.live.most - len(stay)))]
        if not (came or (gone and stay)):
            return False
        self.speeds.append(group_reference_ns(self.live.group))
        report = self._plan([*stay, *came])
        self.here = {job.job_id: job for job in (*stay, *came)}
        self.changes.append(Change(joined=len(came), left=len(gone), seconds=self.now_s() - now_s, report=report))
        return True

    def _plan(self, jobs: Sequence[Job]) -> ReplanReport | None:
        began_s = time.perf_counter()
        plan = self.live.planner.plan([job_task(job, job.steps or 1) for job in jobs])
        planned_s = time.perf_counter() - began_s
        if self.session is None:
            self.session = Session(self.live.group, plan, self.live.planner.seed)
            return None
        if {job.job_id for job in jobs} - set(self.here):
            return self.session.register_tasks(plan, planned_s)
        return self.session.replan(plan, planned_s)

    def iterate(self) -> bool:
        """Run one iteration; False where there is no task."""
        active = [name for name in self.here if name not in self.ends]
        if self.session is None or not active:
            return False
        began_s = self.now_s()
        done = self.session.iterate()
        ended_s = self.now_s()
        for name in active:
            self.starts.setdefault(name, began_s)
        self.ends |= dict.fromkeys((t for t in self.session.finished() if t in active), ended_s)
        span_s = done.span_ns / 1e9
        self.passes.append(Pass(tasks=len(active), span_s=span_s, between_s=max(0.0, ended_s - began_s - span_s)))
        return True

    def lived(self, without_core_s: float) -> Lived:
        """All that was seen."""
        lives = tuple(
            Life(
                job_id=job.job_id,
                arrival_s=job.arrival_ns / 1e9,
                start_s=self.starts[job.job_id],
                end_s=self.ends[job.job_id],
                steps=len(self.session.curves()[job.job_id]) if self.session else 0,
            )
            for job in self.jobs
        )
        return Lived(
            lives=lives,
            changes=tuple(self.changes),
            passes=tuple(self.passes),
            reference_ns=tuple(self.speeds),
            waited_s=without_core_s,
        )
