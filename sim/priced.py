"""PricedProgram: every instruction of a Program with its price, so that both engines run the same figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from muxtune.sim.cost.base import Cost, CostModel, CostSum
from muxtune.sim.ledger import Ledger
from muxtune.sim.stage import Site, StageCache, StageRun, batch_shape
from muxtune.spec.catalogue import adapter_sizes, replicated_parameters
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.errors import PlanError
from muxtune.spec.memory import stage_context
from muxtune.spec.noun import noun
from muxtune.spec.ops import Op, adamw, host, message
from muxtune.spec.plan import Instance, Launch
from muxtune.spec.program import Bound, Instruction, OpName, RankProgram, UnitKey

#: Gradients and their norm are fp32.
GRADIENT_BYTES = NORM_BYTES = 4


@noun
class Priced:
    """One instruction. `duration_ns` leaves out waiting; send and recv name a `channel`, a step its `meeting`.

    `joules` are its operators' energy above idle.
    """

    op: OpName
    duration_ns: int
    channel: int = -1
    meeting: int = -1
    run: StageRun | None = None
    joules: float = 0.0


@noun
class PricedRank:
    """The instructions of one device, in order."""

    rank: int
    instructions: tuple[Priced, ...]


@noun
class Channel:
    """A directed edge for one payload; `transfers_ns` has the link time of each message, in sending order."""

    source: int
    target: int
    payload: Literal["activation", "gradient"]
    transfers_ns: tuple[int, ...]


@noun
class PricedProgram:
    """What the pipeline engines run. `meetings` has the number of ranks of each step's rendezvous.

    `host_bound_ns` and `exposed_ns` are summed over all instructions of all ranks, as are the costs.
    """

    ranks: tuple[PricedRank, ...]
    channels: tuple[Channel, ...]
    meetings: tuple[int, ...]
    costs: CostSum = CostSum()
    host_bound_ns: int = 0
    exposed_ns: int = 0


#: For each rank, in Program order: (start, end) of each of its instructions in ns.
RunTimes = tuple[tuple[tuple[int, int], ...], ...]


def price(bound: Bound, cost: CostModel, cache: StageCache) -> PricedProgram:
    """Price every instruction of a Program; `cache` must be of the same cost model.

    Raises:
        PlanError: a channel's ends disagree on the order of messages, or a launch list is missing.
        ExtrapolationError: the cost model has no figure for an operator.
    """
    return _Pricing(bound, cost, cache).run()


def deadlock(priced: PricedProgram, done: Sequence[int]) -> PlanError:
    """The error of a run that stopped with `done` instructions finished on each rank."""
    waits = [
        f"rank {listing.rank} at instruction {at} ({listing.instructions[at].op})"
        for listing, at in zip(priced.ranks, done, strict=True)
        if at < len(listing.instructions)
    ]
    return PlanError(f"the order deadlocks: {', '.join(waits)} wait for ever")


class _Pricing:
    """Prices one Program; used once and thrown away."""

    def __init__(self, bound: Bound, cost: CostModel, cache: StageCache) -> None:
        self.plan, self.program, self.cost, self.cache = bound.plan, bound.program, cost, cache
        self.device = bound.plan.cluster.device
        self.works = {w.key: w for w in bound.program.units}
        self.launches = {(x.instance, x.bucket, x.stage, x.direction): x.launches for x in bound.program.launches}
        self.ledger = Ledger()
        self.host_bound_ns = self.exposed_ns = 0
        self.channels: dict[tuple[int, int, str], int] = {}
        self.transfers_ns: list[list[int]] = []
        self.meetings: dict[tuple[UnitKey, str | None], int] = {}
        self.meeting_ranks: list[int] = []
        self.sites: dict[tuple[int, int], Site] = {}
        self.runs: dict[tuple[object, ...], StageRun] = {}
        self.messages: dict[tuple[int, Link], Cost] = {}

    def run(self) -> PricedProgram:
        _require_one_order(self.program.ranks)
        ranks = tuple(
            PricedRank(rank=x.rank, instructions=tuple(self._instruction(x.rank, i) for i in x.instructions))
            for x in self.program.ranks
        )
        channels = tuple(
            Channel(source=source, target=target, payload=payload, transfers_ns=tuple(self.transfers_ns[index]))  # type: ignore[arg-type]
            for (source, target, payload), index in self.channels.items()
        )
        return PricedProgram(
            ranks=ranks,
            channels=channels,
            meetings=tuple(self.meeting_ranks),
            costs=self.ledger.sum(),
            host_bound_ns=self.host_bound_ns,
            exposed_ns=self.exposed_ns,
        )

    def _instruction(self, rank: int, x: Instruction) -> Priced:
        if x.op in ("send", "recv"):
            return self._transfer(rank, x)
        if x.op == "step":
            return self._step(rank, x)
        return self._clock(rank, x)

    def _clock(self, rank: int, x: Instruction) -> Priced:
        """A forward or backward: the instruction's own host work, then the stage's clock."""
        assert x.op in ("forward", "backward")
        site, work = self._site(rank, x.key.instance), self.works[x.key]
        stage = site.context.stage
        shapes = tuple(batch_shape(site.context, b) for b in work.batches)
        key = (x.key.instance, x.key.bucket, stage, site.link, x.op, shapes)
        if key not in self.runs:
            self.runs[key] = self.cache.run(site, work.batches, x.op, self._launches(x, stage))
        run = self.runs[key]
        overhead = self.cost.latency(host("instruction", x.op), self.device)
        self.ledger.add("instruction", overhead)
        self.ledger.add_sum(run.costs)
        self.host_bound_ns += run.host_bound_ns
        self.exposed_ns += run.exposed_ns
        duration_ns = overhead.p50_ns + overhead.host_ns + run.duration_ns
        return Priced(op=x.op, duration_ns=duration_ns, run=run, joules=overhead.joules + run.costs.joules)

    def _transfer(self, rank: int, x: Instruction) -> Priced:
        """A send or recv: host work on the rank; the send also prices the message on its link."""
        assert x.peer is not None
        assert x.payload is not None
        edge = (rank, x.peer, x.payload) if x.op == "send" else (x.peer, rank, x.payload)
        channel = self.channels.setdefault(edge, len(self.channels))
        if channel == len(self.transfers_ns):
            self.transfers_ns.append([])
        if x.op == "send":
            self.transfers_ns[channel].append(self._message_ns(x.size_bytes, self.plan.cluster.link(rank, x.peer)))
        handed = self._alone(message(x.op, x.size_bytes))
        return Priced(op=x.op, duration_ns=alone_ns(handed, self.device), channel=channel, joules=handed.joules)

    def _step(self, rank: int, x: Instruction) -> Priced:
        """The optimizer step of a task: gradients summed over the ranks that hold the same parameters, then its adapters."""
        assert x.task is not None
        instance = self.plan.instances[x.key.instance]
        context = self._site(rank, x.key.instance).context
        parameters, tensors = adapter_sizes(context, x.task)
        update = self._alone(adamw(parameters, tensors))
        duration_ns = alone_ns(update, self.device)
        layout, here = instance.layout, instance.devices.index(rank)
        replicated = replicated_parameters(context, x.task)
        duration_ns += self._sum_ns(instance, replicated * GRADIENT_BYTES, layout.stage_peers(here))
        duration_ns += self._sum_ns(instance, parameters * GRADIENT_BYTES, layout.replica_peers(here))
        # The gradient norm is over all stages and shards of one replica; replicas hold the same gradients by now.
        width = layout.tp * layout.pp
        replica = tuple(range(here // width * width, (here // width + 1) * width))
        duration_ns += self._sum_ns(instance, NORM_BYTES, replica)
        meeting = self.meetings.setdefault((x.key, x.task), len(self.meetings))
        if meeting == len(self.meeting_ranks):
            self.meeting_ranks.append(0)
        self.meeting_ranks[meeting] += 1
        return Priced(op="step", duration_ns=duration_ns, meeting=meeting, joules=update.joules)

    def _sum_ns(self, instance: Instance, size_bytes: int, group: Sequence[int]) -> int:
        """An all-reduce over some ranks of an instance; nothing for one rank or no bytes."""
        if len(group) == 1 or not size_bytes:
            return 0
        link = self.plan.cluster.slowest_link([instance.devices[i] for i in group])
        found = self.cost.link_latency(message("all_reduce", size_bytes, (len(group),)), link)
        self.ledger.add("all_reduce", found)
        return found.p50_ns

    def _message_ns(self, size_bytes: int, link: Link) -> int:
        found = self.messages.get((size_bytes, link))
        if found is None:
            found = self.messages[size_bytes, link] = self.cost.link_latency(message("p2p", size_bytes), link)
        self.ledger.add("p2p", found)
        return found.p50_ns

    def _alone(self, op: Op) -> Cost:
        """Cost of an operator with nothing beside it."""
        found = self.cost.latency(op, self.device)
        self.ledger.add(op.family, found)
        return found

    def _site(self, rank: int, instance: int) -> Site:
        if (rank, instance) not in self.sites:
            found = self.plan.instances[instance]
            here = found.devices.index(rank)
            group = [found.devices[i] for i in found.layout.stage_peers(here)]
            context = stage_context(self.plan, instance, found.layout.stage_of(here))
            link = self.plan.cluster.slowest_link(group) if len(group) > 1 else None
            unfused = tuple(h for h, htask in enumerate(found.htasks) if not htask.fuse_adapters)
            self.sites[rank, instance] = Site(
                context=context, device=self.device, link=link, comm_ctas=found.comm_ctas, unfused=unfused
            )
        return self.sites[rank, instance]

    def _launches(self, x: Instruction, stage: int) -> tuple[Launch, ...]:
        place = (x.key.instance, x.key.bucket, stage, x.op)
        if place not in self.launches:
            raise PlanError(
                f"instance {place[0]}: bucket {place[1]} has no {x.op} launch list for stage {stage}: add one"
            )
        return self.launches[place]  # type: ignore[index]


def alone_ns(cost: Cost, device: DeviceSpec) -> int:
    """Time of one operator with nothing beside it: host and device one after the other on a CPU, side by side else."""
    return cost.p50_ns + cost.host_ns if device.is_cpu else max(cost.p50_ns, cost.host_ns)


def _require_one_order(ranks: Sequence[RankProgram]) -> None:
    """Channels are FIFO: both ends must name the same messages in the same order."""
    tags: dict[tuple[int, int, str], dict[str, list[int | None]]] = {}
    for listing in ranks:
        for x in listing.instructions:
            if x.op in ("send", "recv"):
                assert x.peer is not None
                edge = (listing.rank, x.peer) if x.op == "send" else (x.peer, listing.rank)
                tags.setdefault((*edge, str(x.payload)), {"send": [], "recv": []})[x.op].append(x.tag)
    for (source, target, payload), ends in tags.items():
        if ends["send"] != ends["recv"]:
            raise PlanError(
                f"channel {source}→{target} ({payload}): messages are not received in the order they are sent"
            )
