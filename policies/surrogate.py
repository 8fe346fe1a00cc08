"""Surrogate of a plan: W + Σ_Q 2C·max_s L^s(Q) over its hTasks Q, W = the largest 2·Σ_{s<S} L^s(Q) (MuxTune Eq. 3-4).

L^s is the mean of an hTask's forward and backward latency on stage s, so that 2·L^s is the time of one clock pair. The
largest micro-batch stands for all C. Collectives count as exposed, as they are where a bucket holds one hTask. Of a
micro-batch in chunks the steady phase holds all, warm-up and drain the longest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from muxtune.policies.base import SystemState
from muxtune.policies.build import make_htask, mean_length, microbatch_samples, planning_chunks, stage_contexts
from muxtune.policies.microbatch import MicrobatchCost, UnitCost
from muxtune.policies.stage_latency import KEPT, Direction, Shape, StageLatency, only, stage_kind
from muxtune.sim.cost.base import CostModel, memory_of
from muxtune.spec.align import Alignment
from muxtune.spec.clock import LaunchRule
from muxtune.spec.errors import ExtrapolationError, InfeasibleError
from muxtune.spec.footprint import amount, rounded_bytes
from muxtune.spec.memory import stage_static_bytes
from muxtune.spec.plan import AdapterFusion
from muxtune.spec.task import Task
from muxtune.spec.tensors import again_tensors, chunk_kv_tensors, held_tensors, working_bytes
from muxtune.spec.units import format_bytes

Partition = tuple[tuple[str, ...], ...]


class Objective(Protocol):
    """What the partition algorithms need to know of a group of tasks; `Surrogate` is the one that planners use."""

    @property
    def stages(self) -> int:
        """S."""
        ...

    def admits(self, tasks: tuple[str, ...]) -> bool:
        """Whether the group may be an hTask."""
        ...

    def warmup_ns(self, tasks: tuple[str, ...]) -> int:
        """2·Σ_{s<S} L^s: warm-up and drain."""
        ...

    def steady_ns(self, tasks: tuple[str, ...]) -> int:
        """2C·max_s L^s: the steady phase."""
        ...


def value_ns(objective: Objective, groups: Sequence[tuple[str, ...]]) -> int:
    """W + Σ_Q 2C·max_s L^s(Q)."""
    return max(map(objective.warmup_ns, groups)) + sum(map(objective.steady_ns, groups))


def task_type(task: Task) -> tuple[int, int, str, str]:
    """What decides the price of a task in any hTask: tasks of one type are interchangeable."""
    return task.billed_len_tokens, task.global_batch_samples, task.dataset, repr(task.peft)


class Surrogate:
    """Latency and memory of candidate hTasks of one state; every answer is remembered.

    `rule` orders the launches of hTasks that share a clock.
    """

    def __init__(
        self,
        cost: CostModel,
        state: SystemState,
        alignment: Alignment,
        chunk_tokens: int = 0,
        rule: LaunchRule | None = None,
        adapter_fusion: AdapterFusion = "htask",
    ) -> None:
        self.state, self.alignment, self.chunk_tokens = state, alignment, chunk_tokens
        self.rule, self.adapter_fusion = rule or LaunchRule(), adapter_fusion
        self.contexts = stage_contexts(state.workload, state.layout)
        self.device = state.cluster.device
        self.latency = StageLatency(cost, state.cluster, state.workload, self.contexts)
        self.shared: dict[tuple[object, ...], MicrobatchCost] = memory_of(cost).table(
            KEPT, "microbatches", state.workload.model, state.layout, self.device, self.latency.link
        )
        self.tasks = {t.task_id: t for t in state.workload.tasks}
        self.mean_tokens = {t: mean_length(state.workload, t) for t in self.tasks} if alignment == "varlen" else {}
        everyone = tuple(self.tasks)
        self.static_bytes = tuple(stage_static_bytes(c, everyone, self.device) for c in self.contexts)
        self.microbatches: dict[tuple[tuple[str, ...], int, int], MicrobatchCost] = {}
        self.asked: dict[tuple[tuple[str, ...], int, int], MicrobatchCost | None] = {}
        #: Units by the (identities of) prices of their hTasks' micro-batches, here and of the largest ones.
        self.units: dict[tuple[int, ...], UnitCost] = {}
        self.admitted: dict[tuple[str, ...], bool] = {}
        self.cut: dict[tuple[tuple[str, ...], int], tuple[Shape, ...]] = {}

    @property
    def stages(self) -> int:
        """S."""
        return self.state.layout.pp

    def sorted_tasks(self) -> tuple[str, ...]:
        """Task ids by tokens per micro-batch, ascending (§3.3); tasks of one type stand together; ties by id."""
        return tuple(sorted(self.tasks, key=lambda t: (self._tokens((t,)), task_type(self.tasks[t]), t)))

    def _tokens(self, tasks: tuple[str, ...]) -> int:
        """Processed tokens of the largest micro-batch."""
        return sum(self.shape(tasks, chunk=j).tokens for j in range(self.chunks(tasks)))

    def chunks(self, tasks: tuple[str, ...], index: int = 0) -> int:
        """K of micro-batch `index` of an hTask, at least 1."""
        return max(1, len(self._chunk_shapes(tasks, index))) if self.alignment == "chunk" else 1

    def _chunk_shapes(self, tasks: tuple[str, ...], index: int) -> tuple[Shape, ...]:
        if (tasks, index) not in self.cut:
            samples = [microbatch_samples(self.tasks[t], self.state.microbatches, index) for t in tasks]
            size = make_htask(self.state.workload, tasks, "chunk", self.chunk_tokens).chunk_tokens
            shapes: list[Shape] = []
            for rows in planning_chunks(self.state.workload, tasks, samples, size):
                tokens = Counter({row.task: 0 for row in rows})
                for row in rows:
                    tokens[row.task] += row.length_tokens
                shapes.append(Shape(parts=tuple((t, n // size, size) for t, n in tokens.items()), rows=rows))
            self.cut[tasks, index] = tuple(shapes)
        return self.cut[tasks, index]

    def shape(self, tasks: tuple[str, ...], index: int = 0, longest_case: bool = False, chunk: int = 0) -> Shape:
        """Rows of (a chunk of) micro-batch `index`; `longest_case` is a draw that makes `varlen` samples longest."""
        if self.alignment == "chunk":
            cut = self._chunk_shapes(tasks, index)
            return cut[chunk] if chunk < len(cut) else Shape(parts=())
        longest = max(self.tasks[t].billed_len_tokens for t in tasks)
        parts = []
        for task_id in tasks:
            count = microbatch_samples(self.tasks[task_id], self.state.microbatches, index)
            if self.alignment == "pad":
                length = longest
            else:
                length = self.tasks[task_id].billed_len_tokens if longest_case else self.mean_tokens[task_id]
            if count:
                parts.append((task_id, count, length))
        return Shape(parts=tuple(parts))

    def microbatch(self, tasks: tuple[str, ...], index: int = 0, chunk: int = 0) -> MicrobatchCost | None:
        """Price of (a chunk of) micro-batch `index`; None if no task of the hTask has samples in it.

        Raises:
            ExtrapolationError: the cost model refuses to answer for this shape.
        """
        asked = (tasks, index, chunk)
        if asked not in self.asked:
            self.asked[asked] = self._microbatch(tasks, index, chunk)
        return self.asked[asked]

    def _microbatch(self, tasks: tuple[str, ...], index: int, chunk: int) -> MicrobatchCost | None:
        """Micro-batches with equal samples of every task are priced once."""
        if chunk >= self.chunks(tasks, index) or not (shape := self.shape(tasks, index, chunk=chunk)).parts:
            return None
        # Samples fall by one at the index that is left over when a batch is spread: in between all micro-batches are alike.
        falls = (self.tasks[t].global_batch_samples % self.state.microbatches for t in tasks)
        key = (tasks, max((at for at in falls if at <= index), default=0), chunk)
        if key not in self.microbatches:
            longest = self.shape(tasks, index, longest_case=True, chunk=chunk)
            self.microbatches[key] = self._shared(shape, longest, cut=self.chunks(tasks, index) > 1)
        return self.microbatches[key]

    def _shared(self, shape: Shape, longest_case: Shape, cut: bool) -> MicrobatchCost:
        """Micro-batches of equal adapters and lengths are priced once for all plans, whatever their tasks are called."""
        pefts = self.latency.pefts
        rows, longest = (tuple((pefts[t], n, each) for t, n, each in x.parts) for x in (shape, longest_case))
        key = (rows, shape.runs() if shape.rows else (), longest if longest != rows else (), cut)
        if key not in self.shared:
            self.shared[key] = self._price(shape, longest_case, cut)
        return self.shared[key]

    def _price(self, shape: Shape, longest_case: Shape, cut: bool) -> MicrobatchCost:
        batch, model, device = longest_case.token_batch(), self.state.workload.model, self.device
        # Stages of one depth hold the same, but for the last one.
        layers = self.state.layout.layers_per_stage
        kinds = [(stage_kind(c)[1], n) for c, n in zip(self.contexts, layers, strict=True)]
        tasks = [t for t, _, _ in longest_case.parts]
        contexts = {kind: only(c, tasks) for kind, c in zip(kinds, self.contexts, strict=True)}
        held = {k: amount(held_tensors(c, batch), device).taken_bytes for k, c in contexts.items()}
        kv = {k: amount(chunk_kv_tensors(c, batch) if cut else (), device).taken_bytes for k, c in contexts.items()}
        again = {k: amount(again_tensors(c, batch), device).taken_bytes for k, c in contexts.items()}
        working = {k: rounded_bytes(working_bytes(c, batch), device) for k, c in contexts.items()}
        return MicrobatchCost(
            forward_ns=self.latency.latency_ns(shape, "forward"),
            backward_ns=self.latency.latency_ns(shape, "backward"),
            held_bytes=tuple(held[k] + kv[k] for k in kinds),
            again_bytes=tuple(again[k] for k in kinds),
            working_bytes=tuple(working[k] for k in kinds),
            message_bytes=self.state.layout.shard_tokens(batch.tokens) * model.hidden * model.element_bytes,
        )

    def _largest(self, tasks: tuple[str, ...]) -> tuple[MicrobatchCost, ...]:
        """The chunks of micro-batch 0, which has samples of every task."""
        found = (self.microbatch(tasks, chunk=j) for j in range(self.chunks(tasks)))
        return tuple(x for x in found if x is not None)

    def warmup_ns(self, tasks: tuple[str, ...]) -> int:
        """2·Σ_{s<S} L^s: warm-up and drain."""
        return sum(map(max, zip(*(x.pair_ns[:-1] for x in self._largest(tasks)), strict=True)))

    @property
    def microbatches_per_replica(self) -> int:
        """C over the data-parallel replicas, rounded up."""
        return -(-self.state.microbatches // self.state.layout.dp)

    def steady_ns(self, tasks: tuple[str, ...]) -> int:
        """2C·max_s L^s: the steady phase (of the replica with most micro-batches)."""
        return self.microbatches_per_replica * max(self._pairs_ns(tasks))

    def _pairs_ns(self, tasks: tuple[str, ...]) -> tuple[int, ...]:
        """2·L^s of all chunks of the largest micro-batch."""
        return tuple(map(sum, zip(*(x.pair_ns for x in self._largest(tasks)), strict=True)))

    def direction_ns(self, tasks: tuple[str, ...], index: int, stage: int, direction: Direction, chunk: int = 0) -> int:
        """Forward or backward of (a chunk of) micro-batch `index` on a stage, nothing beside it; 0 without samples."""
        cost = self.microbatch(tasks, index, chunk)
        if cost is None:
            return 0
        return (cost.forward_ns if direction == "forward" else cost.backward_ns)[stage]

    def isolates(self, groups: Sequence[tuple[str, ...]]) -> bool:
        """Whether the hTasks of a bucket launch their adapters together: each has one task (§3.4.3), and there are several."""
        return self.adapter_fusion == "bucket" and len(groups) > 1 and all(len(tasks) == 1 for tasks in groups)

    @property
    def overlaps(self) -> bool:
        """Whether collectives run beside compute: there are some, and they have a stream of their own."""
        return self.state.layout.tp > 1 and not self.state.cluster.device.is_cpu

    def first_stage_ns(self, tasks: tuple[str, ...]) -> int:
        """2·L^(1): what buckets are balanced and sorted by."""
        return self._pairs_ns(tasks)[0]

    @property
    def priced(self) -> int:
        """Distinct micro-batches priced so far."""
        return len(self.microbatches)

    def peak_bytes(self, tasks: tuple[str, ...], stage: int) -> int:
        """Peak of a stage under 1F1B with this hTask alone in flight and every task's adapter resident."""
        cost = self._largest(tasks)
        units = min(self.microbatches_per_replica, max(self.tasks[t].global_batch_samples for t in tasks))
        # A unit's chunks are held until its first chunk's backward; until then K−1 chunks of the next have come in.
        in_flight = min(self.stages - stage + 2 * (len(cost) - 1), units * len(cost))
        whole, rest = divmod(in_flight, len(cost))
        held = whole * sum(x.held_bytes[stage] for x in cost) + sum(x.held_bytes[stage] for x in cost[:rest])
        return self.static_bytes[stage] + held + max(self.transient_bytes([x], stage) for x in cost)

    def transient_bytes(self, unit: Sequence[MicrobatchCost], stage: int) -> int:
        """Bytes beside the held ones while a unit runs: the widest hTask's, layers made again, and a received gradient."""
        gradient = sum(x.message_bytes for x in unit) if stage + 1 < self.stages else 0
        again = sum(x.again_bytes[stage] for x in unit)
        return max(x.working_bytes[stage] for x in unit) + again + rounded_bytes(gradient, self.device)

    def admits(self, tasks: tuple[str, ...]) -> bool:
        """Whether the group fits in memory alone and lies where the cost model answers."""
        if tasks not in self.admitted:
            try:
                fits = all(self.peak_bytes(tasks, s) <= self.memory_bytes for s in range(self.stages))
            except ExtrapolationError:
                fits = False
            self.admitted[tasks] = fits
        return self.admitted[tasks]

    @property
    def memory_bytes(self) -> int:
        """Memory of one device."""
        return self.device.memory_bytes

    def require_single_tasks(self) -> None:
        """Refuse a state in which a task cannot even be an hTask of its own.

        Raises:
            InfeasibleError: it does not fit: names rank, bytes needed and bytes there.
            ExtrapolationError: the cost model does not answer for it.
        """
        for task_id in self.tasks:
            for stage in range(self.stages):
                needed = self.peak_bytes((task_id,), stage)
                if needed > self.memory_bytes:
                    raise InfeasibleError(
                        f"task {task_id} does not fit as an hTask of its own: {self._short(stage, needed)}"
                    )

    def _short(self, stage: int, needed: int) -> str:
        return (
            f"rank {stage * self.state.layout.tp} needs {format_bytes(needed)} "
            f"({format_bytes(self.static_bytes[stage])} of them static), "
            f"{self.state.cluster.device.name} has {format_bytes(self.memory_bytes)}"
        )
