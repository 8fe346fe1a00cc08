"""PricedProgram: every instruction of a Program with its price, so that both engines run the same figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from muxtune.sim.cost.base import Cost, CostModel, CostSum
from muxtune.sim.stage import Ledger, Site, StageCache, StageRun, batch_shape
from muxtune.spec.catalogue import adapter_sizes
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.errors import PlanError
from muxtune.spec.memory import stage_context
from muxtune.spec.noun import noun
from muxtune.spec.ops import Op, adamw, host, message
from muxtune.spec.plan import Launch, Plan
from muxtune.spec.program import Bound, Instruction, OpName, UnitKey

#: The gradient norm that the ranks of an instance sum before a step: one fp32.
NORM_BYTES = 4


@noun
class Priced:
    """One instruction. `duration_ns` leaves out waiting; send and recv name a `channel`, step a `meeting` (by place)."""

    op: OpName
    duration_ns: int
    channel: int = -1
    meeting: int = -1
    run: StageRun | None = None


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
