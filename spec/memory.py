"""Memory of a Program per rank over time, derived from shapes (mode `exact`: what is really in flight).

Static bytes stay for the whole Program; activations and messages only change at instructions. Eq. 5 of the paper, where all
tasks are in flight at once, is in memory_paper.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace

from muxtune.spec.catalogue import StageContext, adapter_sizes
from muxtune.spec.cluster import DeviceSpec
from muxtune.spec.footprint import Amount, Footprint, Tensors, amount
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan
from muxtune.spec.program import Bound, Instruction, RankProgram, UnitKey, UnitWork, instruction_text
from muxtune.spec.tensors import (
    ADAPTER_KINDS,
    again_tensors,
    chunk_kv_tensors,
    held_tensors,
    weight_tensors,
    working_bytes,
)


@noun
class RankPeak:
    """Peak of one rank: the bytes, what they are made of, the instruction that first reaches them (-1: before any).

    Of `lists` that run at once the peaks are added up, an upper bound; `instruction` is then that of the highest.
    """

    rank: int
    peak_bytes: int
    static_bytes: int
    instruction: int
    footprint: Footprint
    lists: int = 1


def stage_context(plan: Plan, instance: int, stage: int) -> StageContext:
    """The operator context of one stage of a plan's instance."""
    found = plan.instances[instance]
    adapters = tuple((t, plan.workload.task(t).peft) for t in found.tasks)
    return StageContext(model=plan.workload.model, layout=found.layout, stage=stage, adapters=adapters)


def adapter_amounts(context: StageContext, tasks: Iterable[str], device: DeviceSpec) -> dict[str, Amount]:
    """Adapters of some tasks on one rank by kind; an adapter's tensors are rounded as if they were of one size."""
    found = dict.fromkeys(ADAPTER_KINDS, Amount())
    for parameters, tensors in (adapter_sizes(context, t) for t in tasks):
        for kind, each_bytes in ADAPTER_KINDS.items():
            size_bytes = parameters * each_bytes
            equal = amount([(-(-size_bytes // tensors), tensors)], device)
            rounding_bytes = equal.taken_bytes - size_bytes if not device.is_cpu else 0
            found[kind] = Amount(
                size_bytes=found[kind].size_bytes + size_bytes,
                rounding_bytes=found[kind].rounding_bytes + rounding_bytes,
            )
    return found


def static_footprint(plan: Plan, rank: int) -> Footprint:
    """Backbones, adapters, gradients and optimizer states that stay on a device for the whole Program.

    Resident backbones of instances that share the device add up; of swapped ones the largest counts. Adapters with their
    gradients and states always stay.
    """
    device = plan.cluster.device
    backbones: list[Amount] = []
    kinds: dict[str, list[Amount]] = {kind: [] for kind in ADAPTER_KINDS}
    for index, instance in enumerate(plan.instances):
        if rank not in instance.devices:
            continue
        context = stage_context(plan, index, instance.layout.stage_of(instance.devices.index(rank)))
        backbones.append(amount(weight_tensors(context), device))
        for kind, found in adapter_amounts(context, instance.tasks, device).items():
            kinds[kind].append(found)
    if plan.residency == "swapped":
        backbones = sorted(backbones, key=lambda a: a.taken_bytes)[-1:]
    kinds["weights"] = backbones
    return Footprint(
        **{f"{kind}_bytes": sum(a.size_bytes for a in amounts) for kind, amounts in kinds.items()},
        rounding_bytes=sum(a.rounding_bytes for amounts in kinds.values() for a in amounts),
    )


def static_bytes(plan: Plan, rank: int) -> int:
    """All of `static_footprint`."""
    return static_footprint(plan, rank).total_bytes


def stage_static_bytes(context: StageContext, tasks: Iterable[str], device: DeviceSpec) -> int:
    """Static bytes of one rank that holds one backbone's stage and the adapters of some tasks."""
    adapters = adapter_amounts(context, tasks, device).values()
    return amount(weight_tensors(context), device).taken_bytes + sum(a.taken_bytes for a in adapters)


#: What one unit needs on a stage: kept from forward to backward, made again in its backward, transient of either.
UnitAmounts = tuple[Amount, Amount, Amount]


class MemoryWalk:
    """Walks a rank's instructions and says what is in use during and after each.

    `parts` holds by kind what is in use beside the static bytes: `_put` and `_drop` are all that another kind needs.
    """

    def __init__(self, bound: Bound, rank: int) -> None:
        self.plan, self.rank = bound.plan, rank
        self.device = bound.plan.cluster.device
        self.works: dict[UnitKey, UnitWork] = {w.key: w for w in bound.program.units}
        self.static = static_footprint(bound.plan, rank)
        self.static_bytes = self.static.total_bytes
        self.parts: dict[str, dict[Hashable, Amount]] = {"activations": {}, "kv": {}, "messages": {}, "workspace": {}}
        self.moving_bytes = 0
        self.contexts: dict[int, StageContext] = {}
        self.amounts: dict[Hashable, UnitAmounts] = {}
        self.units: dict[UnitKey, UnitAmounts] = {}
        self.messages: dict[int, Amount] = {}

    def context(self, instance: int) -> StageContext:
        """The stage context of this rank in an instance."""
        if instance not in self.contexts:
            found = self.plan.instances[instance]
            stage = found.layout.stage_of(found.devices.index(self.rank))
            self.contexts[instance] = stage_context(self.plan, instance, stage)
        return self.contexts[instance]

    def step(self, instruction: Instruction) -> tuple[int, int]:
        """(bytes in use while the instruction runs, bytes in use after it)."""
        self.begin(instruction)
        during = self.in_use()
        self.end(instruction)
        return during, self.in_use()

    def begin(self, x: Instruction) -> None:
        """Take what an instruction needs while it runs."""
        if x.op in ("send", "recv"):
            if x.size_bytes not in self.messages:
                self.messages[x.size_bytes] = amount([(x.size_bytes, 1)], self.device)
            self._put("messages", (x.key, x.payload, x.op), self.messages[x.size_bytes])
        elif x.op != "step":
            held, again, working = self._unit(x.key)
            if x.op == "forward":
                # The received stream is from now on the input that the first layer keeps.
                self._drop("messages", (x.key, "activation", "recv"))
                self._put("activations", x.key, held)
                if kv := self._kv_tensors(x.key):
                    self._put("kv", x.key, amount(kv, self.device))
            else:
                self._put("activations", (x.key, "again"), again)
            self._put("workspace", x.key, working)

    def end(self, x: Instruction) -> None:
        """Give back what only the instruction needed, and after a backward what its unit kept."""
        if x.op == "send":
            self._drop("messages", (x.key, x.payload, x.op))
        if x.op in ("forward", "backward"):
            self._drop("workspace", x.key)
        if x.op == "backward":
            self._drop("activations", (x.key, "again"))
            self._drop("messages", (x.key, "gradient", "recv"))
            self._release(x.key)

    def _kv_tensors(self, key: UnitKey) -> Tensors:
        """KV and dKV of the hTasks whose packs have several chunks."""
        if self._chunks(key) == 1:
            return ()
        context, htasks = self.context(key.instance), self.plan.instances[key.instance].htasks
        chunked = (b for b in self.works[key].batches if htasks[b.htask].alignment == "chunk")
        return tuple(t for b in chunked for t in chunk_kv_tensors(context, b))

    def _release(self, key: UnitKey) -> None:
        """The last backward of a unit, that of its first chunk, frees what all its chunks hold."""
        for chunk in range(self._chunks(key) if key.chunk == 0 else 0):
            done = replace(key, chunk=chunk) if chunk else key
            self._drop("activations", done)
            self._drop("kv", done)

    def _chunks(self, key: UnitKey) -> int:
        return self.plan.instances[key.instance].buckets[key.bucket].units[key.unit].chunks

    def in_use(self) -> int:
        """Bytes in use now."""
        return self.static_bytes + self.moving_bytes

    def footprint(self) -> Footprint:
        """Bytes in use now, by kind."""
        found = dict(self.static.by_kind())
        for kind, amounts in self.parts.items():
            for each in amounts.values():
                found[kind] += each.size_bytes
                found["rounding"] += each.rounding_bytes
        return Footprint(**{f"{kind}_bytes": size_bytes for kind, size_bytes in found.items()})

    @property
    def units_in_flight(self) -> int:
        """Units between their forward and their backward."""
        return len(self.parts["activations"])

    def _put(self, kind: str, key: Hashable, taken: Amount) -> None:
        self.parts[kind][key] = taken
        self.moving_bytes += taken.taken_bytes

    def _drop(self, kind: str, key: Hashable) -> None:
        """Give back what was put under this key, if anything was."""
        found = self.parts[kind].pop(key, None)
        self.moving_bytes -= found.taken_bytes if found else 0

    def _unit(self, key: UnitKey) -> UnitAmounts:
        """What a unit needs here; units of one shape are computed once."""
        if key in self.units:
            return self.units[key]
        batches = self.works[key].batches
        shape = (key.instance, tuple(b.segments() for b in batches))
        if shape not in self.amounts:
            context = self.context(key.instance)
            held: Tensors = tuple(t for b in batches for t in held_tensors(context, b))
            # hTasks of a unit may be interleaved: each has a layer made again, but only one piece runs at a time.
            again: Tensors = tuple(t for b in batches for t in again_tensors(context, b))
            working: Tensors = ((max(working_bytes(context, b) for b in batches), 1),)
            self.amounts[shape] = (
                amount(held, self.device),
                amount(again, self.device),
                amount(working, self.device),
            )
        self.units[key] = self.amounts[shape]
        return self.units[key]


def rank_peaks(bound: Bound) -> tuple[RankPeak, ...]:
    """Peak of every rank of a Program, where it is first reached and what it is made of."""
    return tuple(_rank_peak(bound, listing) for listing in bound.program.ranks)


def _rank_peak(bound: Bound, listing: RankProgram) -> RankPeak:
    """Lists that run at once may all be at their peaks at one moment: their bytes add up."""
    static = static_footprint(bound.plan, listing.rank)
    peaks = [_list_peak(MemoryWalk(bound, listing.rank), listing, places) for places in listing.lists]
    highest = max(peaks, key=lambda p: p[0])
    footprint = static
    for _, _, found in peaks:
        footprint = footprint.plus(found).minus(static)
    return RankPeak(
        rank=listing.rank,
        peak_bytes=footprint.total_bytes,
        static_bytes=static.total_bytes,
        instruction=highest[1],
        footprint=footprint,
        lists=len(peaks),
    )


def _list_peak(walk: MemoryWalk, listing: RankProgram, places: range) -> tuple[int, int, Footprint]:
    """(peak, the instruction that first reaches it, what it is made of) with one of a rank's lists alone."""
    peak_bytes, at, footprint = walk.static_bytes, -1, walk.static
    for index in places:
        walk.begin(listing.instructions[index])
        if walk.in_use() > peak_bytes:
            peak_bytes, at, footprint = walk.in_use(), index, walk.footprint()
        walk.end(listing.instructions[index])
    return peak_bytes, at, footprint


def moment_text(bound: Bound, peak: RankPeak) -> str:
    """When a rank reaches its peak, for people."""
    if peak.instruction < 0:
        return "before the first instruction"
    listing = next(x for x in bound.program.ranks if x.rank == peak.rank)
    text = f"during {instruction_text(listing.instructions[peak.instruction])}, instruction {peak.instruction}"
    return text + (f", all {peak.lists} instances that run at once at their peaks" if peak.lists > 1 else "")
