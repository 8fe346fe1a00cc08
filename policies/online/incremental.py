"""Incremental: what a mix of tasks comes to, from prices of hTasks that are kept from mix to mix; nothing is simulated.

The partition is the planner's own DP (fusion.py). T = F(Q₁) + Σ_Q 2C·max_s L^s(Q) + B(Q_n): the eager template with one bucket an
hTask feeds the heaviest hTask Q₁ first and the lightest Q_n last, so that the pipeline fills with forwards of Q₁,
F = Σ_{s<S} L^s_forward, and drains with backwards of Q_n (MuxTune Eq. 3-6, §3.4.1). Left out: several hTasks in one bucket,
optimizer steps, messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxtune.policies.base import SystemState
from muxtune.policies.fusion import exact_partition, paper_partition
from muxtune.policies.muxtune import Charge
from muxtune.policies.surrogate import Surrogate
from muxtune.sim.cost.base import CostModel
from muxtune.spec.align import Alignment
from muxtune.spec.errors import ExtrapolationError, InfeasibleError
from muxtune.spec.memory import stage_static_bytes
from muxtune.spec.noun import noun

#: How many tasks of each kind.
Counts = tuple[int, ...]
#: Tasks of one hTask at most: without a bound every change of a mix makes hundreds of hTasks that no partition takes.
WIDEST = 10


@noun
class MixPrice:
    """What tasks come to: iteration time, share of it in which the stages work, bytes of the fullest stage, hTasks."""

    iteration_ns: int
    busy: float
    peak_bytes: int
    htasks: tuple[Counts, ...]


@noun
class _Part:
    """One hTask: 2C·max_s L^s, F, B, 2·L^1, Σ_s 2C·L^s, and its bytes beside the static ones of each stage."""

    steady_ns: int
    fill_ns: int
    drain_ns: int
    weight_ns: int
    work_ns: int
    bytes: tuple[int, ...]


class Incremental:
    """Prices mixes of kinds of tasks on one shape: equal counts give equal prices, whatever was asked before.

    `kinds` are the ids of interchangeable tasks of the state's workload, as many as may share an instance.
    """

    def __init__(
        self,
        cost: CostModel,
        state: SystemState,
        kinds: Sequence[Sequence[str]],
        charge: Charge = "paper",
        alignment: Alignment = "pad",
        chunk_tokens: int = 0,
    ) -> None:
        self.state, self.kinds, self.charge = state, kinds, charge
        self.surrogate = Surrogate(cost, state, alignment, chunk_tokens)
        contexts, device = self.surrogate.contexts, state.cluster.device
        self.empty_bytes = [stage_static_bytes(c, (), device) for c in contexts]
        self.adapter_bytes = [
            [stage_static_bytes(c, (ids[0],), device) - empty for ids in kinds]
            for c, empty in zip(contexts, self.empty_bytes, strict=True)
        ]
        place = {task: n for n, task in enumerate(self.surrogate.sorted_tasks())}
        self.order = sorted(range(len(kinds)), key=lambda k: place[kinds[k][0]])
        self.kind_of = {task: k for k, ids in enumerate(kinds) for task in ids}
        self._parts: dict[Counts, _Part | None] = {}

    def price(self, counts: Counts) -> MixPrice:
        """So many tasks of each kind.

        Raises:
            InfeasibleError: a task does not fit beside the others' adapters.
            ExtrapolationError: the cost model does not answer for a task alone.
        """
        memory_bytes = self.state.cluster.device.memory_bytes
        room = [
            memory_bytes - empty - sum(n * b for n, b in zip(counts, each, strict=True))
            for empty, each in zip(self.empty_bytes, self.adapter_bytes, strict=True)
        ]
        mix = _Mix(whole=self, room=room)
        tasks = [t for k in self.order for t in self.kinds[k][: counts[k]]]
        for task in tasks:
            if not mix.admits((task,)):
                raise InfeasibleError(f"task {task} does not fit beside the adapters of {len(tasks)} tasks")
        groups = (paper_partition if self.charge == "paper" else exact_partition)(mix, tasks)
        parts = [mix.part(g) for g in groups]
        total_ns, stages = _total_ns(parts), range(len(room))
        return MixPrice(
            iteration_ns=total_ns,
            busy=min(1.0, sum(p.work_ns for p in parts) / (total_ns * len(room))),
            peak_bytes=memory_bytes - min(room[s] - max(p.bytes[s] for p in parts) for s in stages),
            htasks=tuple(self.counts(g) for g in groups),
        )

    def counts(self, tasks: Sequence[str]) -> Counts:
        """How many of each kind."""
        found = [0] * len(self.kinds)
        for task in tasks:
            found[self.kind_of[task]] += 1
        return tuple(found)

    def part(self, tasks: Sequence[str]) -> _Part | None:
        """The price of an hTask; None where the cost model does not answer for several tasks together."""
        counts = self.counts(tasks)
        if counts not in self._parts:
            chosen = tuple(t for k in self.order for t in self.kinds[k][: counts[k]])
            try:
                self._parts[counts] = self._price(chosen)
            except ExtrapolationError:
                if len(chosen) == 1:
                    raise
                self._parts[counts] = None
        return self._parts[counts]

    def _price(self, tasks: tuple[str, ...]) -> _Part:
        surrogate = self.surrogate
        chunks = [surrogate.microbatch(tasks, chunk=j) for j in range(surrogate.chunks(tasks))]
        # Micro-batch 0 has samples of every task.
        priced = [c for c in chunks if c is not None]
        pairs = [sum(pair) for pair in zip(*(c.pair_ns for c in priced), strict=True)]
        rounds, static = surrogate.microbatches_per_replica, surrogate.static_bytes
        return _Part(
            steady_ns=rounds * max(pairs),
            fill_ns=sum(priced[0].forward_ns[:-1]),
            drain_ns=sum(priced[-1].backward_ns[:-1]),
            weight_ns=pairs[0],
            work_ns=rounds * sum(pairs),
            bytes=tuple(surrogate.peak_bytes(tasks, s) - static[s] for s in range(surrogate.stages)),
        )


@dataclass(frozen=True, slots=True)
class _Mix:
    """One mix as the partition algorithms ask for it (surrogate.Objective); `room` is what a stage has beside static bytes."""

    whole: Incremental
    room: Sequence[int]

    @property
    def stages(self) -> int:
        return self.whole.surrogate.stages

    def admits(self, tasks: tuple[str, ...]) -> bool:
        if len(tasks) > WIDEST:
            return False
        found = self.whole.part(tasks)
        return found is not None and all(b <= r for b, r in zip(found.bytes, self.room, strict=True))

    def part(self, tasks: tuple[str, ...]) -> _Part:
        found = self.whole.part(tasks)
        assert found is not None, "only what is admitted is priced"
        return found

    def warmup_ns(self, tasks: tuple[str, ...]) -> int:
        part = self.part(tasks)
        return part.fill_ns + part.drain_ns

    def steady_ns(self, tasks: tuple[str, ...]) -> int:
        return self.part(tasks).steady_ns


def _total_ns(parts: Sequence[_Part]) -> int:
    """T of some hTasks."""
    heaviest = max(parts, key=lambda p: (p.weight_ns, p.fill_ns))
    lightest = min(parts, key=lambda p: (p.weight_ns, p.drain_ns))
    return heaviest.fill_ns + sum(p.steady_ns for p in parts) + lightest.drain_ns
