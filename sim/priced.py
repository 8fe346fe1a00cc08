"""PricedProgram: every instruction of a Program with its price, so that both engines run the same figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from muxtune.sim.corun import Beside, Load, clock_load, make_load
from muxtune.sim.cost.base import Cost, CostModel, CostSum
from muxtune.sim.ledger import Ledger
from muxtune.sim.stage import Site, StageCache, StageRun, batch_shape
from muxtune.spec.catalogue import adapter_sizes, replicated_parameters
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.errors import PlanError
from muxtune.spec.memory import stage_context
from muxtune.spec.noun import noun
from muxtune.spec.ops import adamw, host, message
from muxtune.spec.plan import Instance, Launch
from muxtune.spec.program import (
    Bound,
    ChannelKey,
    Instruction,
    OpName,
    Program,
    RankProgram,
    UnitKey,
    channel_of,
    list_places,
)

#: Gradients and their norm are fp32.
GRADIENT_BYTES = NORM_BYTES = 4


@noun
class Priced:
    """One instruction. `duration_ns` leaves out waiting; send and recv name a `channel`, a step its `meeting`.

    `joules` are its operators' energy above idle. `load` is there on a device that runs several lists at once.
    """

    op: OpName
    duration_ns: int
    channel: int = -1
    meeting: int = -1
    run: StageRun | None = None
    joules: float = 0.0
    load: Load | None = None


@noun
class PricedRank:
    """The instructions of one device as in the Program, and for each the place of its unit there (−1 for a step)."""

    rank: int
    instructions: tuple[Priced, ...]
    units: tuple[int, ...] = ()
    starts: tuple[int, ...] = (0,)

    @property
    def lists(self) -> tuple[range, ...]:
        """Places of the instructions of each list."""
        return list_places(self.starts, len(self.instructions))


@noun
class Channel:
    """A directed edge for one payload; `transfers_ns` has the link time of each message, in sending order.

    Instances that run at once have one each, and share the edge.
    """

    source: int
    target: int
    payload: Literal["activation", "gradient"]
    transfers_ns: tuple[int, ...]


@noun
class PricedProgram:
    """What the pipeline engines run. `meetings` has the number of ranks of each step's rendezvous.

    `host_bound_ns` and `exposed_ns` are summed over all instructions of all ranks, as are the costs. `beside` says how lists
    that run at once slow each other; None where there are none.
    """

    ranks: tuple[PricedRank, ...]
    channels: tuple[Channel, ...]
    meetings: tuple[int, ...]
    costs: CostSum = CostSum()
    host_bound_ns: int = 0
    exposed_ns: int = 0
    beside: Beside | None = dataclasses.field(default=None, compare=False)


#: For each rank, in Program order: (start, end) of each of its instructions in ns.
RunTimes = tuple[tuple[tuple[int, int], ...], ...]


def price(bound: Bound, cost: CostModel, cache: StageCache) -> PricedProgram:
    """Price every instruction of a Program; `cache` must be of the same cost model.

    Raises:
        PlanError: a channel's ends disagree on the order of messages, or a launch list is missing.
        ExtrapolationError: the cost model has no figure for an operator.
    """
    return _Pricing(bound, cost, cache).run()


def deadlock(priced: PricedProgram, done: Sequence[Sequence[int]]) -> PlanError:
    """The error of a run that stopped with so many instructions finished of each rank's lists."""
    waits = [
        f"rank {listing.rank} at instruction {places[count]} ({listing.instructions[places[count]].op})"
        for listing, counts in zip(priced.ranks, done, strict=True)
        for places, count in zip(listing.lists, counts, strict=True)
        if count < len(places)
    ]
    return PlanError(f"the order deadlocks: {', '.join(waits)} wait for ever")


class _Known:
    """An instruction that was priced: what all of its kind share, and how many there are."""

    __slots__ = ("parts", "priced", "times", "transfer_ns")

    def __init__(self, priced: Priced, parts: Sequence[tuple[str, Cost]], transfer_ns: int = 0) -> None:
        self.priced, self.parts, self.transfer_ns = priced, parts, transfer_ns
        self.times = 0


class _Pricing:
    """Prices one Program; used once and thrown away. Instructions that cannot differ are priced once and counted."""

    def __init__(self, bound: Bound, cost: CostModel, cache: StageCache) -> None:
        self.plan, self.program, self.cost, self.cache = bound.plan, bound.program, cost, cache
        self.device = bound.plan.cluster.device
        self.units = {w.key: place for place, w in enumerate(bound.program.units)}
        self.launches = {(x.instance, x.bucket, x.stage, x.direction): x.launches for x in bound.program.launches}
        self.at_once = self.program.at_once
        self.channels: dict[ChannelKey, int] = {}
        self.transfers_ns: list[list[int]] = []
        self.meetings: dict[tuple[UnitKey, str | None], int] = {}
        self.meeting_ranks: list[int] = []
        self.sites: dict[tuple[int, int, int], tuple[Site, int]] = {}
        self.site_numbers: dict[tuple[int, Site], int] = {}
        self.known: dict[tuple[object, ...], _Known] = {}
        self.links: dict[tuple[int, ...], Link] = {}
        self.loads: dict[Load, Load] = {}
        self.shapes = self._shapes()

    def run(self) -> PricedProgram:
        _require_one_order(self.program)
        ranks = tuple(self._rank(x) for x in self.program.ranks)
        channels = tuple(
            Channel(source=source, target=target, payload=payload, transfers_ns=tuple(self.transfers_ns[index]))  # type: ignore[arg-type]
            for (source, target, payload, _), index in self.channels.items()
        )
        ledger = Ledger()
        for known in self.known.values():
            for family, price in known.parts:
                ledger.add(family, price, known.times)
            if known.priced.run:
                ledger.add_sum(known.priced.run.costs, known.times)
        runs = [(known.priced.run, known.times) for known in self.known.values() if known.priced.run]
        return PricedProgram(
            ranks=ranks,
            channels=channels,
            meetings=tuple(self.meeting_ranks),
            costs=ledger.sum(),
            host_bound_ns=sum(times * run.host_bound_ns for run, times in runs),
            exposed_ns=sum(times * run.exposed_ns for run, times in runs),
            beside=Beside(self.cost, self.device) if self.at_once else None,
        )

    def _shapes(self) -> list[int]:
        """For each unit the number of its shape within its bucket: units of one number are priced alike."""
        numbers: dict[tuple[object, ...], int] = {}
        contexts = [stage_context(self.plan, i, 0) for i in range(len(self.plan.instances))]
        found: list[int] = []
        for work in self.program.units:
            context = contexts[work.key.instance]
            shape = (work.key.instance, work.key.bucket, *(batch_shape(context, b) for b in work.batches))
            found.append(numbers.setdefault(shape, len(numbers)))
        return found

    def _rank(self, listing: RankProgram) -> PricedRank:
        rank, priced, units = listing.rank, list[Priced](), list[int]()
        for x in listing.instructions:
            unit = self.units.get(x.key, -1)
            if x.op in ("send", "recv"):
                found = self._transfer(rank, x)
            elif x.op == "step":
                found = self._step(rank, x)
            else:
                found = self._clock(rank, x, unit)
            found.times += 1
            priced.append(found.priced)
            units.append(unit)
        return PricedRank(rank=rank, instructions=tuple(priced), units=tuple(units), starts=listing.starts)

    def _clock(self, rank: int, x: Instruction, unit: int) -> _Known:
        """A forward or backward: the instruction's own host work, then the stage's clock."""
        site, number = self._site(rank, x.key.instance, x.key.bucket)
        place = (x.op, number, self.shapes[unit])
        if place not in self.known:
            assert x.op in ("forward", "backward")
            batches = self.program.units[unit].batches
            launches = self._launches(x, site.context.stage)
            run = self.cache.run(site, batches, x.op, launches)
            overhead = self.cost.latency(host("instruction", x.op), self.device)
            duration_ns = overhead.p50_ns + overhead.host_ns + run.duration_ns
            load = (
                self._same(clock_load(self.cost, site, duration_ns, batches, x.op, launches)) if self.at_once else None
            )
            joules = overhead.joules + run.costs.joules
            priced = Priced(op=x.op, duration_ns=duration_ns, run=run, joules=joules, load=load)
            self.known[place] = _Known(priced, [("instruction", overhead)])
        return self.known[place]

    def _transfer(self, rank: int, x: Instruction) -> _Known:
        """A send or recv: host work on the rank; the send also prices the message on its link."""
        place = (x.op, channel_of(rank, x, self.at_once), x.size_bytes)
        if place not in self.known:
            self.known[place] = self._first_transfer(rank, x)
        found = self.known[place]
        if x.op == "send":
            self.transfers_ns[found.priced.channel].append(found.transfer_ns)
        return found

    def _first_transfer(self, rank: int, x: Instruction) -> _Known:
        assert x.peer is not None
        channel = self.channels.setdefault(channel_of(rank, x, self.at_once), len(self.channels))
        if channel == len(self.transfers_ns):
            self.transfers_ns.append([])
        handed = self.cost.latency(message(x.op, x.size_bytes), self.device)
        duration_ns = alone_ns(handed, self.device)
        priced = Priced(op=x.op, duration_ns=duration_ns, channel=channel, joules=handed.joules)
        if x.op == "recv":
            return _Known(priced, [("recv", handed)])
        moved = self.cost.link_latency(message("p2p", x.size_bytes), self.plan.cluster.link(rank, x.peer))
        return _Known(priced, [("send", handed), ("p2p", moved)], moved.p50_ns)

    def _step(self, rank: int, x: Instruction) -> _Known:
        """The optimizer step of a task: gradients summed over the ranks that hold the same parameters, then its adapters."""
        assert x.task is not None
        instance = self.plan.instances[x.key.instance]
        context = self._site(rank, x.key.instance)[0].context
        parameters, tensors = adapter_sizes(context, x.task)
        op = adamw(parameters, tensors)
        own = self.cost.latency(op, self.device)
        layout, here = instance.layout, instance.devices.index(rank)
        replicated = replicated_parameters(context, x.task)
        sums = self._sums(instance, replicated * GRADIENT_BYTES, layout.stage_peers(here))
        sums += self._sums(instance, parameters * GRADIENT_BYTES, layout.replica_peers(here))
        # The gradient norm is over all stages and shards of one replica; replicas hold the same gradients by now.
        width = layout.tp * layout.pp
        replica = tuple(range(here // width * width, (here // width + 1) * width))
        sums += self._sums(instance, NORM_BYTES, replica)
        meeting = self.meetings.setdefault((x.key, x.task), len(self.meetings))
        if meeting == len(self.meeting_ranks):
            self.meeting_ranks.append(0)
        self.meeting_ranks[meeting] += 1
        duration_ns = alone_ns(own, self.device) + sum(each.p50_ns for each in sums)
        load = self._same(make_load(duration_ns, [(op, own.p50_ns)])) if self.at_once else None
        priced = Priced(op="step", duration_ns=duration_ns, meeting=meeting, joules=own.joules, load=load)
        parts = [("adamw", own), *(("all_reduce", each) for each in sums)]
        return self.known.setdefault(("step", rank, x.key, x.task), _Known(priced, parts))

    def _same(self, load: Load) -> Load:
        """The one object of all equal loads: neighbours are told apart by it."""
        return self.loads.setdefault(load, load)

    def _sums(self, instance: Instance, size_bytes: int, group: Sequence[int]) -> list[Cost]:
        """An all-reduce over some ranks of an instance; nothing for one rank or no bytes."""
        if len(group) == 1 or not size_bytes:
            return []
        devices = tuple(instance.devices[i] for i in group)
        if devices not in self.links:
            self.links[devices] = self.plan.cluster.slowest_link(devices)
        link = self.links[devices]
        return [self.cost.link_latency(message("all_reduce", size_bytes, (len(group),)), link)]

    def _site(self, rank: int, instance: int, bucket: int = 0) -> tuple[Site, int]:
        """Where a rank runs a bucket of an instance, and a number that equal places of the instance share."""
        if (rank, instance, bucket) not in self.sites:
            found = self.plan.instances[instance]
            isolated = found.buckets[bucket].adapter_fusion == "bucket"
            here = found.devices.index(rank)
            group = [found.devices[i] for i in found.layout.stage_peers(here)]
            context = stage_context(self.plan, instance, found.layout.stage_of(here))
            link = self.plan.cluster.slowest_link(group) if len(group) > 1 else None
            unfused = tuple(h for h, htask in enumerate(found.htasks) if not htask.fuse_adapters)
            site = Site(
                context=context,
                device=self.device,
                link=link,
                comm_ctas=found.comm_ctas,
                unfused=unfused,
                isolated=isolated,
            )
            number = self.site_numbers.setdefault((instance, site), len(self.site_numbers))
            self.sites[rank, instance, bucket] = (site, number)
        return self.sites[rank, instance, bucket]

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


def _require_one_order(program: Program) -> None:
    """Channels are FIFO: both ends must name the same messages in the same order."""
    tags: dict[ChannelKey, dict[str, list[int | None]]] = {}
    for listing in program.ranks:
        for x in listing.instructions:
            if x.op in ("send", "recv"):
                ends = tags.setdefault(channel_of(listing.rank, x, program.at_once), {"send": [], "recv": []})
                ends[x.op].append(x.tag)
    for (source, target, payload, _), ends in tags.items():
        if ends["send"] != ends["recv"]:
            raise PlanError(
                f"channel {source}→{target} ({payload}): messages are not received in the order they are sent"
            )
