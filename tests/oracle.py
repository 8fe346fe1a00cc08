"""A brute-force event calculator: plain Python, no event queue, written from DESIGN §4 and from nothing of the engines.

Everything that takes time is a job of one worker, which runs its jobs one at a time in their order. A job starts as soon
as its worker is free and all jobs before it are done. Time moves to the next end of a running job, found by looking at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from muxtune.sim.cost.base import Cost
from muxtune.spec.align import Batch
from muxtune.spec.catalogue import StageContext, adapter_sizes, replicated_parameters, subgraph_ops
from muxtune.spec.cluster import Link
from muxtune.spec.isolated import isolated_ops, isolated_subgraphs
from muxtune.spec.memory import stage_context
from muxtune.spec.ops import COLLECTIVES, Op, adamw, host, message
from muxtune.spec.plan import Instance
from muxtune.spec.program import Bound, Instruction


@dataclass(eq=False)
class Job:
    """Work of `duration_ns` that may start when every job of `after` is done."""

    duration_ns: int
    after: list[Job] = field(default_factory=list)
    start_ns: int | None = None
    end_ns: int | None = None


@dataclass(eq=False)
class Worker:
    """Runs its jobs in their order, one at a time: a rank, its host, one of its streams, or a channel."""

    jobs: list[Job] = field(default_factory=list)
    at: int = 0

    def give(self, duration_ns: int, after: Sequence[Job] = ()) -> Job:
        """Append a job."""
        self.jobs.append(Job(duration_ns=duration_ns, after=list(after)))
        return self.jobs[-1]


@dataclass(frozen=True)
class Answer:
    """`times[rank][instruction]` is (reached, done); `spans` maps (rank, instruction, hTask, subgraph) to (start, end).

    `priced_ns` sums device and host time of every operator, message and launch that was priced.
    """

    times: tuple[tuple[tuple[int, int], ...], ...]
    spans: dict[tuple[int, int, int, int], tuple[int, int]]
    priced_ns: int


def answer(bound: Bound, cost: Any) -> Answer:
    """When everything of a Program happens, and AssertionError if something never does."""
    jobs = _Jobs(bound, cost)
    advance(jobs.workers)
    spans = {place: (begin(found), end(found)) for place, found in jobs.kernels.items()}
    times = tuple(tuple((begin([first]), end([last])) for first, last in listing) for listing in jobs.instructions)
    return Answer(times=times, spans=spans, priced_ns=jobs.priced_ns)


def advance(workers: Sequence[Worker]) -> None:
    """Run all jobs: at each instant look at every worker until nothing moves, then go to the earliest end."""
    now_ns = 0
    while True:
        while sum(_moves(worker, now_ns) for worker in workers):
            pass
        running = [job for w in workers for job in w.jobs[w.at : w.at + 1] if job.start_ns is not None]
        if not running:
            break
        now_ns = min(job.start_ns + job.duration_ns for job in running if job.start_ns is not None)
    assert all(worker.at == len(worker.jobs) for worker in workers), "something waits for ever"


def _moves(worker: Worker, now_ns: int) -> bool:
    """End the worker's job if it is over, else start it if it may start."""
    if worker.at == len(worker.jobs):
        return False
    job = worker.jobs[worker.at]
    if job.start_ns is not None and job.start_ns + job.duration_ns == now_ns:
        job.end_ns = now_ns
        worker.at += 1
        return True
    if job.start_ns is None and all(x.end_ns is not None for x in job.after):
        job.start_ns = now_ns
        return True
    return False


def begin(jobs: Sequence[Job]) -> int:
    """First start of some jobs that have run."""
    return min(job.start_ns for job in jobs if job.start_ns is not None)


def end(jobs: Sequence[Job]) -> int:
    """Last end of some jobs that have run."""
    return max(job.end_ns for job in jobs if job.end_ns is not None)


class _Jobs:
    """The jobs of a Program: every rank's instructions in order, and what each of them sets going."""

    def __init__(self, bound: Bound, cost: Any) -> None:
        self.plan, self.program, self.cost = bound.plan, bound.program, cost
        self.device = bound.plan.cluster.device
        self.batches = {w.key: w.batches for w in bound.program.units}
        self.workers: list[Worker] = []
        self.ranks = {listing.rank: self._worker() for listing in bound.program.ranks}
        self.hosts = {rank: self._worker() for rank in self.ranks}
        self.streams = {(rank, name): self._worker() for rank in self.ranks for name in ("compute", "comm")}
        self.reached: dict[tuple[Any, ...], list[Job]] = {}
        self.kernels: dict[tuple[int, int, int, int], list[Job]] = {}
        self.priced_ns = 0
        self.instructions = [
            [self._instruction(listing.rank, index, x) for index, x in enumerate(listing.instructions)]
            for listing in bound.program.ranks
        ]
        self._messages()

    def _worker(self) -> Worker:
        self.workers.append(Worker())
        return self.workers[-1]

    def _instruction(self, rank: int, index: int, x: Instruction) -> tuple[Job, Job]:
        """(the moment at which the rank reaches the instruction, the job whose end is the instruction's)."""
        worker = self.ranks[rank]
        reached = worker.give(0)
        if x.op in ("forward", "backward"):
            return reached, self._clock(rank, index, x)
        if x.op == "step":
            met = self.reached.setdefault((x.key, x.task), [])
            met.append(reached)
            work = worker.give(self._step_ns(rank, x))
            work.after = met  # the list that every rank of the instance adds to
            return reached, work
        return reached, worker.give(self._alone_ns(self._price(message(x.op, x.size_bytes))))

    def _messages(self) -> None:
        """Jobs of the channels, and what they wait for: sent, and the receive before them over."""
        ends: dict[tuple[int, int, str], dict[str, list[tuple[Instruction, Job]]]] = {}
        for listing, jobs in zip(self.program.ranks, self.instructions, strict=True):
            for x, (_, work) in zip(listing.instructions, jobs, strict=True):
                if x.peer is not None:
                    edge = (listing.rank, x.peer) if x.op == "send" else (x.peer, listing.rank)
                    place = (*edge, str(x.payload))
                    ends.setdefault(place, {"send": [], "recv": []})[x.op].append((x, work))
        for (source, target, _), found in ends.items():
            channel, before = self._worker(), list[Job]()
            for (x, sent), (y, received) in zip(found["send"], found["recv"], strict=True):
                assert x.tag == y.tag, "messages overtake each other"
                price = self._over(message("p2p", x.size_bytes), self.plan.cluster.link(source, target))
                received.after = [channel.give(price.p50_ns, [sent, *before])]
                before = [received]

    def _clock(self, rank: int, index: int, x: Instruction) -> Job:
        """The instruction's own host work, then the launches of the unit's hTasks; done when the last kernel is."""
        instance = self.plan.instances[x.key.instance]
        stage, here = self._stage(instance, rank), instance.devices.index(rank)
        group = [d for i, d in enumerate(instance.devices) if i // instance.layout.tp == here // instance.layout.tp]
        context = stage_context(self.plan, x.key.instance, stage)
        overhead = self._price(host("instruction", x.op))  # type: ignore[arg-type]
        started = self.ranks[rank].give(overhead.p50_ns + overhead.host_ns)
        isolated = instance.buckets[x.key.bucket].adapter_fusion == "bucket"
        groups = {b.htask: self._groups(context, b, x, isolated) for b in self.batches[x.key]}
        done: dict[int, list[Job]] = {}
        for together in self._together(
            [y for y in self._launches(x, stage) if y.htask in groups], context, x, isolated
        ):
            first = together[0]
            before = [started, *(job for y in together for job in done.get(y.htask, []))]
            prices = [self._price(op, group) for y in together for op in groups[y.htask][y.subgraph]]
            if len(together) > 1 and prices:
                prices = [self._grouped(prices)]
            made = self._launch(rank, x, first.stream, prices, before)
            self.kernels[rank, index, first.htask, first.subgraph] = made
            done.update((y.htask, made) for y in together)
        return self.ranks[rank].give(0, [job for jobs in done.values() for job in jobs])

    def _launch(self, rank: int, x: Instruction, stream: str, prices: Sequence[Any], before: list[Job]) -> list[Job]:
        """The kernels of one launch; a launch without operators is a kernel of no length."""
        launch = self._price(host("launch", x.op))  # type: ignore[arg-type]
        if self.device.is_cpu:  # the host is the device
            whole_ns = sum(price.p50_ns + price.host_ns for price in (launch, *prices))
            return [self.streams[rank, "compute"].give(whole_ns, before)]
        issued = self.hosts[rank].give(launch.p50_ns + launch.host_ns, before[:1])
        if not prices:
            return [self.streams[rank, stream].give(0, [issued, *before])]
        made: list[Job] = []
        for price in prices:
            issued = self.hosts[rank].give(price.host_ns, [issued])
            made.append(self.streams[rank, stream].give(price.p50_ns, [issued, *before]))
        return made

    def _groups(
        self, context: StageContext, batch: Batch, x: Instruction, isolated: bool
    ) -> tuple[tuple[Op, ...], ...]:
        return (isolated_ops if isolated else subgraph_ops)(
            context, batch, "forward" if x.op == "forward" else "backward"
        )

    def _together(self, launches: list[Any], context: StageContext, x: Instruction, isolated: bool) -> list[list[Any]]:
        """Each launch with those behind it that launch the adapters of the same BaseOp for other hTasks."""
        way: Any = "forward" if x.op == "forward" else "backward"
        adapters = {s.index for s in isolated_subgraphs(context.layout, context.stage, way) if isolated and s.adapters}
        found: list[list[Any]] = []
        for y in launches:
            if found and y.subgraph in adapters and found[-1][0].subgraph == y.subgraph:
                found[-1].append(y)
            else:
                found.append([y])
        return found

    def _grouped(self, prices: Sequence[Any]) -> Any:
        """Utilisation 1 each: the sum of the kernels, issued once."""
        host_ns = max(price.host_ns for price in prices)
        self.priced_ns -= sum(price.host_ns for price in prices) - host_ns
        return Cost(p50_ns=sum(price.p50_ns for price in prices), host_ns=host_ns)

    def _launches(self, x: Instruction, stage: int) -> Iterator[Any]:
        for listing in self.program.launches:
            if (listing.instance, listing.bucket, listing.stage) == (x.key.instance, x.key.bucket, stage):
                yield from listing.launches if listing.direction == x.op else ()

    def _step_ns(self, rank: int, x: Instruction) -> int:
        """AdamW of the task's adapters here, after the sums over the ranks that hold the same parameters; then the norm."""
        assert x.task is not None
        instance = self.plan.instances[x.key.instance]
        context = stage_context(self.plan, x.key.instance, self._stage(instance, rank))
        parameters, tensors = adapter_sizes(context, x.task)
        tp, pp, here = instance.layout.tp, instance.layout.pp, instance.devices.index(rank)
        shards = [i for i in range(len(instance.devices)) if i // tp == here // tp]
        replicas = [i for i in range(len(instance.devices)) if i % (tp * pp) == here % (tp * pp)]
        replica = [i for i in range(len(instance.devices)) if i // (tp * pp) == here // (tp * pp)]
        whole = 4 * replicated_parameters(context, x.task)
        work_ns = self._alone_ns(self._price(adamw(parameters, tensors)))
        for size_bytes, group in ((whole, shards), (4 * parameters, replicas), (4, replica)):
            if size_bytes and len(group) > 1:
                devices = [instance.devices[i] for i in group]
                work_ns += self._over(message("all_reduce", size_bytes, (len(group),)), self._slowest(devices)).p50_ns
        return work_ns

    def _price(self, op: Op, group: Sequence[int] = ()) -> Any:
        """Price of an operator; a collective of a stage is priced on the slowest link between the devices of its group."""
        if op.family in COLLECTIVES:
            return self._over(op, self._slowest(group))
        found = self.cost.latency(op, self.device)
        self.priced_ns += found.p50_ns + found.host_ns
        return found

    def _over(self, op: Op, link: Link) -> Any:
        found = self.cost.link_latency(op, link)
        self.priced_ns += found.p50_ns + found.host_ns
        return found

    def _alone_ns(self, price: Any) -> int:
        return int(price.p50_ns + price.host_ns if self.device.is_cpu else max(price.p50_ns, price.host_ns))

    def _slowest(self, devices: Sequence[int]) -> Link:
        links = [self.plan.cluster.link(a, b) for a in devices for b in devices if a != b]
        return sorted(links, key=lambda x: (x.bandwidth_bytes_per_s, -x.latency_ns))[0]

    def _stage(self, instance: Instance, rank: int) -> int:
        return instance.devices.index(rank) // instance.layout.tp % instance.layout.pp
