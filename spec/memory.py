"""Memory of a Program per rank, derived from shapes: static bytes, bytes held from a unit's forward to its backward, peak.

Counted as the executor holds them: what autograd saves of each piece, plus the transient of the piece that runs.
"""

from __future__ import annotations

from dataclasses import replace

from muxtune.spec.align import Batch
from muxtune.spec.catalogue import StageContext, adapter_sizes, shard, stage_pieces
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan
from muxtune.spec.program import Bound, Instruction, UnitKey, UnitWork

#: Adapter parameter, gradient and the two AdamW moments, all fp32.
ADAPTER_STATE_BYTES = 16
#: dK and dV of a chunk are added up over the later chunks in fp32.
DKV_BYTES = 4


@noun
class RankPeak:
    """Peak of one rank: the bytes, the instruction during which they are reached, and how many of them are static."""

    rank: int
    peak_bytes: int
    static_bytes: int
    instruction: int


def stage_context(plan: Plan, instance: int, stage: int) -> StageContext:
    """The operator context of one stage of a plan's instance."""
    found = plan.instances[instance]
    adapters = tuple((t, plan.workload.task(t).peft) for t in found.tasks)
    return StageContext(model=plan.workload.model, layout=found.layout, stage=stage, adapters=adapters)


def backbone_bytes(context: StageContext) -> int:
    """Weights of one rank's shard of the backbone."""
    model, layout = context.model, context.layout
    count = len(layout.layers_of(context.stage)) * model.layer_parameters // layout.tp
    if layout.is_first(context.stage):
        count += model.embedding_parameters // layout.tp
    if layout.is_last(context.stage):
        count += model.head_parameters // layout.tp
        if model.tied_embeddings and not layout.is_first(context.stage):
            count += model.vocab * model.hidden // layout.tp
    return count * model.element_bytes


def adapter_bytes(context: StageContext, tasks: tuple[str, ...]) -> int:
    """Adapters of some tasks on one rank with gradients and optimizer states."""
    return sum(adapter_sizes(context, t)[0] for t in tasks) * ADAPTER_STATE_BYTES


def held_bytes(context: StageContext, batch: Batch) -> int:
    """Bytes that one batch keeps on a stage from its forward to its backward."""
    held = 0
    for piece in stage_pieces(context.layout, context.stage):
        if piece.name == "attention":
            held += _attention_held(context, batch)
        elif piece.name == "mlp":
            held += _mlp_held(context, batch)
        elif piece.name in ("norm1", "norm2", "final_norm"):
            held += context.layout.shard_tokens(batch.tokens) * (context.model.hidden + 1)
        elif piece.name == "head":
            held += batch.tokens * 2 * (context.model.vocab // context.layout.tp)
    return held * context.model.element_bytes


def _adapted(context: StageContext, batch: Batch, target: str) -> tuple[bool, int]:
    """(whether any task of the batch adapts the target, elements of the adapters' own intermediates)."""
    inner = 0
    found = False
    for task, start, end in batch.segments():
        peft = context.peft(task)
        if target in peft.targets:
            found = True
            inner += (end - start) * peft.operator()[1]
    return found, inner


def _saved_input(context: StageContext, batch: Batch, target: str) -> int:
    """Elements saved for the adapters of one BaseOp: its input, and the low-rank intermediate."""
    found, inner = _adapted(context, batch, target)
    return (batch.tokens * shard(context.model, context.layout.tp, target)[0] if found else 0) + inner


def _attention_held(context: StageContext, batch: Batch) -> int:
    """q, k, v after rope, the output, its log-sum-exp, and the inputs of adapted linears (elements)."""
    model, tp = context.model, context.layout.tp
    heads, kv = model.heads // tp, max(1, model.kv_heads // tp)
    per_token = (2 * heads + 2 * kv) * model.head_dim + heads
    return batch.tokens * per_token + _saved_input(context, batch, "qkv") + _saved_input(context, batch, "proj")


def _mlp_held(context: StageContext, batch: Batch) -> int:
    """Input of the activation (gate and up), its inner product, and the inputs of adapted linears (elements)."""
    model, tp = context.model, context.layout.tp
    per_token = (model.fc1_out + (model.ffn_hidden if model.gated else 0)) // tp
    return batch.tokens * per_token + _saved_input(context, batch, "fc1") + _saved_input(context, batch, "fc2")


def chunk_kv_bytes(context: StageContext, batch: Batch) -> int:
    """Keys and values that a chunk leaves to the later chunks of its pack, and the fp32 dK and dV that they add up for it.

    Counted beside what autograd saves of the chunk, which recomputation may drop, and from the chunk's forward on.
    """
    model, layout = context.model, context.layout
    kv = 2 * max(1, model.kv_heads // layout.tp) * model.head_dim * len(layout.layers_of(context.stage))
    return batch.tokens * kv * (model.element_bytes + DKV_BYTES)


def working_bytes(context: StageContext, batch: Batch) -> int:
    """Largest transient beside the held bytes: gradients of the widest piece while its backward runs."""
    model, tp = context.model, context.layout.tp
    widest = max(2 * model.fc1_out // tp, 2 * model.qkv_out // tp)
    if context.layout.is_last(context.stage):
        widest = max(widest, model.vocab // tp)
    return batch.tokens * (widest + 2 * model.hidden) * model.element_bytes


def static_bytes(plan: Plan, rank: int) -> int:
    """Backbones, adapters, gradients and optimizer states that stay on a device for the whole Program."""
    backbones: list[int] = []
    adapters = 0
    for index, instance in enumerate(plan.instances):
        if rank not in instance.devices:
            continue
        context = stage_context(plan, index, instance.layout.stage_of(instance.devices.index(rank)))
        backbones.append(backbone_bytes(context))
        adapters += adapter_bytes(context, instance.tasks)
    kept = sum(backbones) if plan.residency == "resident" else max(backbones, default=0)
    return kept + adapters


class MemoryWalk:
    """Walks a rank's instructions and says how many bytes are in use during each (activations only change at instructions)."""

    def __init__(self, bound: Bound, rank: int) -> None:
        self.plan, self.rank = bound.plan, rank
        self.works: dict[UnitKey, UnitWork] = {w.key: w for w in bound.program.units}
        self.static_bytes = static_bytes(bound.plan, rank)
        self.held: dict[UnitKey, int] = {}
        self.inbox: dict[tuple[UnitKey, str], int] = {}
        self.contexts: dict[int, StageContext] = {}

    def context(self, instance: int) -> StageContext:
        """The stage context of this rank in an instance."""
        if instance not in self.contexts:
            found = self.plan.instances[instance]
            stage = found.layout.stage_of(found.devices.index(self.rank))
            self.contexts[instance] = stage_context(self.plan, instance, stage)
        return self.contexts[instance]

    def step(self, instruction: Instruction) -> tuple[int, int]:
        """(bytes in use while the instruction runs, bytes in use after it)."""
        key, payload = instruction.key, instruction.payload or ""
        if instruction.op == "recv":
            self.inbox[key, payload] = instruction.size_bytes
            return self.in_use(), self.in_use()
        if instruction.op == "send":
            return self.in_use() + instruction.size_bytes, self.in_use()
        if instruction.op == "step":
            return self.in_use(), self.in_use()
        context, work = self.context(key.instance), self.works[key]
        working = max(working_bytes(context, b) for b in work.batches)
        if instruction.op == "forward":
            self.held[key] = sum(held_bytes(context, b) for b in work.batches) + self._kv_bytes(context, work)
        during = self.in_use() + working
        if instruction.op == "backward":
            self.inbox.pop((key, "gradient"), None)
            self._release(key)
        return during, self.in_use()

    def _kv_bytes(self, context: StageContext, work: UnitWork) -> int:
        """KV and dKV of the hTasks whose packs have several chunks."""
        instance = self.plan.instances[work.key.instance]
        if instance.buckets[work.key.bucket].units[work.key.unit].chunks == 1:
            return 0
        return sum(chunk_kv_bytes(context, b) for b in work.batches if instance.htasks[b.htask].alignment == "chunk")

    def _release(self, key: UnitKey) -> None:
        """The last backward of a unit, that of its first chunk, frees what all its chunks hold."""
        chunks = self.plan.instances[key.instance].buckets[key.bucket].units[key.unit].chunks
        for chunk in range(chunks if key.chunk == 0 else 0):
            done = replace(key, chunk=chunk)
            self.held.pop(done, None)
            self.inbox.pop((done, "activation"), None)

    def in_use(self) -> int:
        """Bytes in use between instructions."""
        return self.static_bytes + sum(self.held.values()) + sum(self.inbox.values())


def rank_peaks(bound: Bound) -> tuple[RankPeak, ...]:
    """Peak bytes of every rank of a Program and where it is reached (mode `exact`: what is really in flight)."""
    peaks: list[RankPeak] = []
    for listing in bound.program.ranks:
        walk = MemoryWalk(bound, listing.rank)
        best = (walk.static_bytes, -1)
        for index, instruction in enumerate(listing.instructions):
            during, _ = walk.step(instruction)
            best = max(best, (during, index), key=lambda b: b[0])
        peaks.append(
            RankPeak(rank=listing.rank, peak_bytes=best[0], static_bytes=walk.static_bytes, instruction=best[1])
        )
    return tuple(peaks)
