"""Insertion: tasks join hTasks one by one where that costs least; the iteration is priced in closed form, nothing is simulated.

T = F(Q₁) + Σ_Q 2C·max_s L^s(Q) + B(Q_n): the eager template with one bucket an hTask feeds the heaviest hTask Q₁ first and the
lightest Q_n last, so that the pipeline fills with forwards of Q₁, F = Σ_{s<S} L^s_forward, and drains with backwards of Q_n.
Optimizer steps, messages and the host's work between operators are left out (MuxTune Eq. 3-4, §3.4.1).
"""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.policies.base import SystemState
from muxtune.policies.surrogate import Surrogate
from muxtune.sim.cost.base import CostModel
from muxtune.spec.align import Alignment
from muxtune.spec.errors import ExtrapolationError, InfeasibleError
from muxtune.spec.memory import stage_static_bytes
from muxtune.spec.noun import noun

#: How many tasks of each kind.
Counts = tuple[int, ...]


@noun
class Inserted:
    """What the tasks come to: iteration time, share of it in which the stages work, bytes of the fullest stage, hTasks."""

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


class Insertion:
    """Prices mixes of kinds of tasks on one shape: equal counts give equal prices, whatever was asked before.

    `kinds` are the ids of interchangeable tasks of the state's workload, as many as may share an instance.
    """

    def __init__(
        self,
        cost: CostModel,
        state: SystemState,
        kinds: Sequence[Sequence[str]],
        alignment: Alignment = "pad",
        chunk_tokens: int = 0,
    ) -> None:
        self.state, self.kinds = state, kinds
        self.surrogate = Surrogate(cost, state, alignment, chunk_tokens)
        contexts, device = self.surrogate.contexts, state.cluster.device
        self.empty_bytes = [stage_static_bytes(c, (), device) for c in contexts]
        self.adapter_bytes = [
            [stage_static_bytes(c, (ids[0],), device) - empty for ids in kinds]
            for c, empty in zip(contexts, self.empty_bytes, strict=True)
        ]
        place = {task: n for n, task in enumerate(self.surrogate.sorted_tasks())}
        self.order = sorted(range(len(kinds)), key=lambda k: place[kinds[k][0]])
        self._parts: dict[Counts, _Part | None] = {}

    def price(self, counts: Counts) -> Inserted:
        """So many tasks of each kind, inserted in the order of their tokens per micro-batch.

        Raises:
            InfeasibleError: a task fits neither into an hTask nor into one of its own.
            ExtrapolationError: the cost model does not answer for a task alone.
        """
        room = [
            self.state.cluster.device.memory_bytes - empty - sum(n * b for n, b in zip(counts, each, strict=True))
            for empty, each in zip(self.empty_bytes, self.adapter_bytes, strict=True)
        ]
        groups: list[Counts] = []
        for kind in self.order:
            for _ in range(counts[kind]):
                groups = self._insert(groups, kind, room)
        parts = [self._known(g) for g in groups]
        total_ns = _total_ns(parts)
        work_ns = sum(p.work_ns for p in parts)
        free = min(r - max(p.bytes[s] for p in parts) for s, r in enumerate(room))
        return Inserted(
            iteration_ns=total_ns,
            busy=min(1.0, work_ns / (total_ns * len(room))),
            peak_bytes=self.state.cluster.device.memory_bytes - free,
            htasks=tuple(groups),
        )

    def _insert(self, groups: list[Counts], kind: int, room: Sequence[int]) -> list[Counts]:
        """The hTasks with one more task; ties go to the hTask of its own, then to the earliest."""
        none: Counts = (0,) * len(self.kinds)
        best: tuple[int, list[Counts]] | None = None
        for at in (-1, *range(len(groups))):
            grown = _one_more(none if at < 0 else groups[at], kind)
            part = self._part(grown)
            if part is None or any(b > r for b, r in zip(part.bytes, room, strict=True)):
                continue
            tried = [*groups, grown] if at < 0 else [*groups[:at], grown, *groups[at + 1 :]]
            value_ns = _total_ns([self._known(g) for g in tried])
            if best is None or value_ns < best[0]:
                best = value_ns, tried
        if best is None:
            raise InfeasibleError(f"a task such as {self.kinds[kind][0]} fits no hTask beside the others on a device")
        return best[1]

    def _known(self, counts: Counts) -> _Part:
        found = self._parts[counts]
        assert found is not None, "hTasks are kept only where they are priced"
        return found

    def _part(self, counts: Counts) -> _Part | None:
        """The price of an hTask; None where the cost model does not answer for one of several tasks."""
        if counts not in self._parts:
            tasks = tuple(t for k in self.order for t in self.kinds[k][: counts[k]])
            try:
                self._parts[counts] = self._price(tasks)
            except ExtrapolationError:
                if len(tasks) == 1:
                    raise
                self._parts[counts] = None
        return self._parts[counts]

    def _price(self, tasks: tuple[str, ...]) -> _Part:
        surrogate = self.surrogate
        chunks = [surrogate.microbatch(tasks, chunk=j) for j in range(surrogate.chunks(tasks))]
        # Micro-batch 0 has samples of every task.
        priced = [c for c in chunks if c is not None]
        pairs = [sum(pair) for pair in zip(*(c.pair_ns for c in priced), strict=True)]
        rounds = surrogate.microbatches_per_replica
        return _Part(
            steady_ns=rounds * max(pairs),
            fill_ns=sum(priced[0].forward_ns[:-1]),
            drain_ns=sum(priced[-1].backward_ns[:-1]),
            weight_ns=pairs[0],
            work_ns=rounds * sum(pairs),
            bytes=tuple(surrogate.peak_bytes(tasks, s) - surrogate.static_bytes[s] for s in range(surrogate.stages)),
        )


def _one_more(counts: Counts, kind: int) -> Counts:
    return (*counts[:kind], counts[kind] + 1, *counts[kind + 1 :])


def _total_ns(parts: Sequence[_Part]) -> int:
    """T of some hTasks."""
    heaviest = max(parts, key=lambda p: (p.weight_ns, p.fill_ns))
    lightest = min(parts, key=lambda p: (p.weight_ns, p.drain_ns))
    return heaviest.fill_ns + sum(p.steady_ns for p in parts) + lightest.drain_ns
