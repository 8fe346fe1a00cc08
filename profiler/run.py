"""Profile a device for a workload and layouts: rounds over all cases, stored as they end, resumed after a kill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from muxtune.executor.group import WorkerGroup
from muxtune.executor.messages import Call
from muxtune.profiler.bench import Timed
from muxtune.profiler.cases import Case, message_sizes, needed_cases
from muxtune.profiler.provenance import birth
from muxtune.profiler.store import Meta, Store
from muxtune.spec.align import spread_slots
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.errors import InputError
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.plan import Bucket, HTask, Instance, Part, Plan, Unit
from muxtune.spec.task import Workload

Progress = Callable[[int, int], None]
Row = tuple[int, str, int, int, int]


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


class Profiling:
    """Worker processes that hold every case ready, so that rounds can be measured before, between and after other work."""

    def __init__(self, workloads: Sequence[Workload], layouts: Sequence[Layout], folder: Path) -> None:
        if any(x.tp > 1 for x in layouts):
            raise InputError("the profiler measures layouts without tensor parallelism: leave --tp out")
        if len({w.model for w in workloads}) > 1:
            raise InputError(
                f"workloads {[w.name for w in workloads]} are on different models: profile them one by one"
            )
        self.tasks = {t.task_id: t for w in reversed(workloads) for t in w.tasks}
        if len(self.tasks) < sum(len(w.tasks) for w in workloads):
            raise InputError("two workloads have a task of one name: give every task its own task_id")
        self.workload = workloads[0]
        self.cases: tuple[Case, ...] = needed_cases(workloads, layouts)
        self.sizes_bytes = message_sizes(workloads) if any(x.pp > 1 for x in layouts) else ()
        self.store = Store(folder)
        meta = Meta(
            device="cpu",
            model=self.workload.model,
            cases=self.cases,
            message_bytes=self.sizes_bytes,
            provenance=birth("cpu"),
        )
        self.done = self.store.open(meta)
        self.stack = ExitStack()
        self.single: WorkerGroup | None = None
        self.pair: WorkerGroup | None = None

    def _start(self) -> WorkerGroup:
        if self.single is None:
            self.single = self.stack.enter_context(WorkerGroup(even_layout(self.workload.model, pp=1), timeout_s=600))
            arguments = (self.workload.model, self.tasks, self.cases, calibration_plan(self.workload))
            self.single.ask(Call(function="muxtune.profiler.bench:prepare", arguments=arguments))
            if self.sizes_bytes:
                self.pair = self.stack.enter_context(WorkerGroup(even_layout(self.workload.model, pp=2)))
            self.measure_round()  # warm-up: allocations and lazy initialisation
        return self.single

    def measure_round(self) -> list[Row]:
        """Time every case once."""
        group = self.single or self._start()
        timed: list[Timed] = group.ask(Call(function="muxtune.profiler.bench:measure_round"))[0]
        rows = [(t.case, t.direction, t.wall_ns, t.cpu_ns, t.reference_ns) for t in timed]
        if self.pair is not None:
            rows += _transfers(self.pair, len(self.cases), self.sizes_bytes, timed[-1].reference_ns)
        return rows

    def rounds(self, until: int, progress: Progress) -> None:
        """Measure and store rounds until `until` of them are there; `progress` is told (done, until)."""
        while self.done < until:
            self._start()
            self.store.append(self.done, self.measure_round())
            self.done += 1
            progress(self.done, until)

    def __enter__(self) -> Profiling:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()


def _transfers(pair: WorkerGroup, first: int, sizes_bytes: Sequence[int], reference_ns: int) -> list[Row]:
    """send, p2p and recv of every message size, and the meeting of two ranks (`all_reduce` of one float)."""
    sender, receiver = pair.ask(
        Call(function="muxtune.profiler.transfers:transfer_round", arguments=(tuple(sizes_bytes),))
    )
    rows: list[Row] = []
    for i in range(len(sizes_bytes)):
        (start_ns, sent_ns, _, _), (_, _, _, there_ns) = sender[2 * i], receiver[2 * i]
        (late_ns, _, _, received_ns) = receiver[2 * i + 1]
        send_ns, recv_ns = sent_ns - start_ns, received_ns - late_ns
        moved_ns = max(1, there_ns - start_ns - send_ns - recv_ns)
        for direction, time_ns in (("send", send_ns), ("p2p", moved_ns), ("recv", recv_ns)):
            rows.append((first + i, direction, time_ns, time_ns, reference_ns))
    meetings = pair.ask(Call(function="muxtune.profiler.transfers:meeting_round", arguments=(3,)))
    # The rank that arrives last waits for nothing but the exchange.
    middle_ns = sorted(min(pair_ns) for pair_ns in zip(*meetings, strict=True))[1]
    return [*rows, (first + len(sizes_bytes), "all_reduce", middle_ns, middle_ns, reference_ns)]
