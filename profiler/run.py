"""Profile a device for a workload and layouts: rounds over all cases, stored as they end, resumed after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from muxtune.executor.group import WorkerGroup
from muxtune.executor.messages import Call
from muxtune.profiler.bench import Timed
from muxtune.profiler.cases import Case, message_sizes, needed_cases, shared_cases
from muxtune.profiler.noise import settled
from muxtune.profiler.provenance import birth, revision, steal_since, stolen_ticks
from muxtune.profiler.store import Meta, Store
from muxtune.spec.align import spread_slots
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.errors import InputError
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.plan import Bucket, HTask, Instance, Part, Plan, Unit
from muxtune.spec.task import Workload

Progress = Callable[[int, int], None]
Row = tuple[int, str, int, int, int]
#: The 95 % interval of a median needs this many values.
LEAST_ROUNDS = 6


def calibration_plan(workload: Workload) -> Plan:
    """One task of the workload alone, one row a unit: used to time the interpreter itself, never compared with a policy."""
    task = workload.tasks[0]
    units = tuple(
        Unit(parts=(Part(htask=0, task=task.task_id, slots=slots),))
        for slots in spread_slots(task.global_batch_samples, task.global_batch_samples)
    )
    layout = even_layout(workload.model, pp=1)
    instance = Instance(
        name="calibration",
        devices=(0,),
        layout=layout,
        htasks=(HTask(tasks=(task.task_id,), alignment="varlen"),),
        buckets=(Bucket(htasks=(0,), units=units),),
        microbatches=len(units),
    )
    return Plan(workload=workload, cluster=parse_cluster("cpu"), instances=(instance,))


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop before the last round: at `deadline_s` (monotonic), or when every median is known to `precision`."""

    deadline_s: float | None = None
    precision: float | None = None

    def spent(self, store: Store, done: int) -> str:
        """Why to stop now; empty while another round is worth its time. One round is always measured."""
        if done and self.deadline_s is not None and time.monotonic() >= self.deadline_s:
            return f"the budget ended after {done} rounds"
        if self.precision is not None and done >= LEAST_ROUNDS and settled(store.rows(), self.precision).all:
            return f"every median was known to {self.precision:.0%} after {done} rounds"
        return ""


class Profiling:
    """Worker processes that hold every case ready, so that rounds can be measured before, between and after other work."""

    def __init__(self, workloads: Sequence[Workload], layouts: Sequence[Layout], folder: Path) -> None:
        if len({w.model for w in workloads}) > 1:
            raise InputError(
                f"workloads {[w.name for w in workloads]} are on different models: profile them one by one"
            )
        self.tasks = {t.task_id: t for w in reversed(workloads) for t in w.tasks}
        if len(self.tasks) < sum(len(w.tasks) for w in workloads):
            raise InputError("two workloads have a task of one name: give every task its own task_id")
        self.workload = workloads[0]
        self.cases: tuple[Case, ...] = needed_cases(workloads, layouts)
        self.meeting_ranks = tuple(sorted({x.tp * x.pp for x in layouts if x.tp * x.pp > 1}))
        self.shared = shared_cases(workloads, layouts)
        self.sizes_bytes = message_sizes(workloads) if any(x.pp > 1 for x in layouts) else ()
        self.store = Store(folder)
        meta = Meta(
            device="cpu",
            model=self.workload.model,
            cases=self.cases,
            message_bytes=self.sizes_bytes,
            meeting_ranks=self.meeting_ranks,
            shared=self.shared,
            provenance=birth("cpu"),
        )
        self.done = self.store.open(meta)
        self.stack = ExitStack()
        self.single: WorkerGroup | None = None
        self.groups: dict[int, WorkerGroup] = {}

    def _start(self) -> WorkerGroup:
        if self.single is None:
            self.single = self.stack.enter_context(WorkerGroup(even_layout(self.workload.model, pp=1), timeout_s=600))
            arguments = (self.workload.model, self.tasks, self.cases, calibration_plan(self.workload))
            self.single.ask(Call(function="muxtune.profiler.bench:prepare", arguments=arguments))
            for ranks in sorted({*self.meeting_ranks, *(c.ranks for c in self.shared)}):
                self.groups[ranks] = self.stack.enter_context(WorkerGroup(ranks))
                mine = tuple(c for c in self.shared if c.ranks == ranks)
                self.groups[ranks].ask(Call(function="muxtune.profiler.shared:prepare", arguments=(mine,)))
            self.measure_round()  # warm-up: allocations and lazy initialisation
        return self.single

    def measure_round(self) -> list[Row]:
        """Time every case once."""
        group = self.single or self._start()
        timed: list[Timed] = group.ask(Call(function="muxtune.profiler.bench:measure_round"))[0]
        rows = [(t.case, t.direction, t.wall_ns, t.cpu_ns, t.reference_ns) for t in timed]
        reference_ns, place = timed[-1].reference_ns, len(self.cases)
        if self.groups:
            rows += _transfers(next(iter(self.groups.values())), place, self.sizes_bytes, reference_ns)
        for offset, ranks in enumerate(self.meeting_ranks, start=place + len(self.sizes_bytes)):
            met_ns = _meeting_ns(self.groups[ranks])
            rows.append((offset, "all_reduce", met_ns, met_ns, reference_ns))
        first = place + len(self.sizes_bytes) + len(self.meeting_ranks)
        for ranks, group in self.groups.items():
            rows += _shared_rows(group, [first + i for i, c in enumerate(self.shared) if c.ranks == ranks])
        return rows

    def rounds(self, until: int, progress: Progress, budget: Budget | None = None) -> str:
        """Measure and store rounds until `until` of them are there; `progress` is told (done, until).

        With a budget it may end sooner; returns why it ended.
        """
        while self.done < until:
            if budget and (reason := budget.spent(self.store, self.done)):
                return reason
            self._start()
            before = stolen_ticks()
            rows = self.measure_round()
            self.store.append(self.done, rows, steal_since(before), revision())
            self.done += 1
            progress(self.done, until)
        return f"{until} rounds"

    def __enter__(self) -> Profiling:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()


def _transfers(pair: WorkerGroup, first: int, sizes_bytes: Sequence[int], reference_ns: int) -> list[Row]:
    """send, p2p and recv of every message size, between the first two ranks."""
    call = Call(function="muxtune.profiler.transfers:transfer_round", arguments=(tuple(sizes_bytes),))
    sender, receiver = pair.ask(call)[:2]
    rows: list[Row] = []
    for i in range(len(sizes_bytes)):
        (start_ns, sent_ns, _, _), (_, _, _, there_ns) = sender[2 * i], receiver[2 * i]
        (late_ns, _, _, received_ns) = receiver[2 * i + 1]
        send_ns, recv_ns = sent_ns - start_ns, received_ns - late_ns
        moved_ns = max(1, there_ns - start_ns - send_ns - recv_ns)
        for direction, time_ns in (("send", send_ns), ("p2p", moved_ns), ("recv", recv_ns)):
            rows.append((first + i, direction, time_ns, time_ns, reference_ns))
    return rows


def _shared_rows(group: WorkerGroup, places: Sequence[int]) -> list[Row]:
    """The parts of every shared case of a group, each of the rank that arrived last."""
    answers = group.ask(Call(function="muxtune.profiler.shared:measure_round")) if places else []
    rows: list[Row] = []
    for place, ranks in zip(places, zip(*(parts for _, parts in answers), strict=True), strict=True):
        for parts in zip(*ranks, strict=True):
            direction, wall_ns, cpu_ns = min(parts, key=lambda p: p[1])
            rows.append((place, direction, wall_ns, cpu_ns, answers[0][0]))
    return rows


def _meeting_ns(group: WorkerGroup) -> int:
    """Median of three meetings, each of the rank that arrives last: it waits for nothing but the exchange."""
    meetings = group.ask(Call(function="muxtune.profiler.transfers:meeting_round", arguments=(3,)))
    return int(sorted(min(times_ns) for times_ns in zip(*meetings, strict=True))[1])
