"""Stage latency of an hTask (MuxTune Eq. 3): frozen operators on all tokens plus the grouped adapters of each BaseOp.

Equal to `stage_latency_ns` of the batch, but layers are priced once and sums are shared between hTasks, so that a
planner can price thousands of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from muxtune.policies.build import planning_row
from muxtune.sim.cost.base import (
    Cost,
    CostModel,
    adapter_cost,
    batch_ops,
    comm_load,
    memory_of,
    priced_groups,
    prices,
    stream_ns,
)
from muxtune.spec import ops
from muxtune.spec.align import Batch, Row
from muxtune.spec.catalogue import StageContext
from muxtune.spec.clock import Chain, Node
from muxtune.spec.cluster import Cluster, DeviceSpec, Link, slowest
from muxtune.spec.isolated import launched_subgraphs
from muxtune.spec.layout import Layout
from muxtune.spec.noun import noun
from muxtune.spec.ops import ADAPTERS, Op, host
from muxtune.spec.peft import TARGETS, PeftSpec
from muxtune.spec.task import Workload

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")
#: (rows, KV length, query length) of attention calls.
Runs = tuple[tuple[int, int, int], ...]
TargetCosts = tuple[tuple[str, Cost], ...]
#: For each BaseOp of an adapter: u_a·t_a, its time alone, and its host time where that counts as compute.
Terms = tuple[tuple[str, int, int, int], ...]
#: Values that are kept of a place between plans, and chains, which are longer.
KEPT, KEPT_CHAINS = 1 << 15, 1 << 11


@noun
class Shape:
    """Rows of a micro-batch: (task, rows, tokens a row) for each task, tasks in hTask order.

    Of a chunk, parts hold (task, packs, chunk size), and `rows` the sequences in them.
    """

    parts: tuple[tuple[str, int, int], ...]
    rows: tuple[Row, ...] = ()

    @property
    def tokens(self) -> int:
        """Processed tokens."""
        return sum(rows * length for _, rows, length in self.parts)

    def runs(self) -> Runs:
        """Runs of neighbouring rows alike in attention: one attention call each."""
        if self.rows:
            return self.row_batch().attention_runs()
        runs: list[tuple[int, int, int]] = []
        for _, rows, length in self.parts:
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0] + rows, length, length)
            else:
                runs.append((rows, length, length))
        return tuple(runs)

    def row_batch(self) -> Batch:
        """All rows."""
        if self.rows:
            return Batch(htask=0, rows=self.rows)
        rows = (planning_row(task, slot, length) for task, count, length in self.parts for slot in range(count))
        return Batch(htask=0, rows=tuple(rows))

    def token_batch(self) -> Batch:
        """One row a task with all its tokens: enough for whatever depends on tokens and not on single rows."""
        rows = (planning_row(task, 0, count * length) for task, count, length in self.parts)
        return Batch(htask=0, rows=tuple(rows))


@noun
class AdapterFloor:
    """What a task's adapters of one BaseOp and direction cost on each stage at least, in any hTask.

    `shared_ns` is added to those of the other tasks, `alone_ns` is less than all together, and `once_ns` (host time that counts
    as compute) is paid beside all `shared_ns`.
    """

    shared_ns: tuple[int, ...]
    alone_ns: tuple[int, ...]
    once_ns: tuple[int, ...]


def thin_context(context: StageContext, layers: int) -> StageContext:
    """The same stage in a model where each stage has this many layers; all but a stage's first layer are alike."""
    return replace(context, layout=replace(context.layout, layers_per_stage=(layers,) * context.layout.pp))


def stage_kind(context: StageContext) -> tuple[bool, bool]:
    """Stages of one kind (first, last, both, neither) differ in their number of layers only."""
    return context.layout.is_first(context.stage), context.layout.is_last(context.stage)


def shard_link(cluster: Cluster, layout: Layout) -> Link | None:
    """The slowest link inside a tp group of an instance on the first devices; None where nothing is sharded."""
    if layout.tp == 1:
        return None
    return slowest(cluster.slowest_link(layout.stage_peers(rank)) for rank in range(layout.ranks))


def only(context: StageContext, tasks: Sequence[str]) -> StageContext:
    """The stage with the adapters of some tasks alone: quicker to search."""
    known = dict(context.adapters)
    return replace(context, adapters=tuple((t, known[t]) for t in tasks))


def _terms_of(costs: TargetCosts, device: DeviceSpec) -> Terms:
    return tuple(
        (name, round(c.utilisation * c.p50_ns), c.p50_ns, stream_ns(c, device) - c.p50_ns) for name, c in costs
    )


def _add_terms(found: dict[str, list[int]], terms: Terms, times: int) -> None:
    """Add so many equal adapters to the groups of their BaseOps: sums of u_a·t_a, the largest times alone and of the host."""
    for name, adds_ns, alone_ns, host_ns in terms:
        row = found.setdefault(name, [0, 0, 0])
        row[0] += times * adds_ns
        row[1] = max(row[1], alone_ns)
        row[2] = max(row[2], host_ns)


class StageLatency:
    """Prices micro-batches on every stage of a layout; every partial sum is remembered."""

    def __init__(self, cost: CostModel, cluster: Cluster, workload: Workload, contexts: Sequence[StageContext]) -> None:
        self.cost, self.device, self.element_bytes = cost, cluster.device, workload.model.element_bytes
        self.link = shard_link(cluster, contexts[0].layout)
        self.load = comm_load(self.device, self.link)
        self.contexts = tuple(contexts)
        self.layout = layout = contexts[0].layout
        self.thin = tuple(thin_context(c, 1) for c in contexts)
        self.two_layers = thin_context(contexts[0], 2)
        two_stages: Layout = replace(layout, pp=2, layers_per_stage=(1, 1))
        self.edge, self.inner = (replace(contexts[0], layout=two_stages, stage=s) for s in (0, 1))
        self.first_target = {t.task_id: min(map(t.peft.place, t.peft.targets)) for t in workload.tasks}
        # Equal places share what they know, whichever tasks are planned there.
        place, memory = (workload.model, layout, self.device, self.link), memory_of(cost)
        self.op_ns: dict[Op, int] = memory.table(KEPT, "operators", *place)
        self.sums: dict[tuple[tuple[Op, ...], tuple[Op, ...]], int] = memory.table(KEPT, "sums", *place)
        self.frozen: dict[tuple[int, Runs, int, Direction], tuple[int, ...]] = memory.table(KEPT, "frozen", *place)
        self.adapter: dict[tuple[PeftSpec, int, Direction], tuple[TargetCosts, TargetCosts]] = memory.table(
            KEPT, "adapters", *place
        )
        self.chains: dict[tuple[object, ...], Chain] = memory.table(KEPT_CHAINS, "chains", *place)
        self.pefts = {t.task_id: t.peft for t in workload.tasks}
        leads: dict[PeftSpec, str] = {}
        self.equal = {t.task_id: leads.setdefault(t.peft, t.task_id) for t in workload.tasks}
        self.terms: dict[tuple[str, int, Direction], tuple[Terms, Terms]] = {}

    def latency_ns(self, shape: Shape, direction: Direction) -> tuple[int, ...]:
        """Time of a micro-batch on each stage, nothing beside it; a CPU's host time counts as compute."""
        lead = min((task for task, _, _ in shape.parts), key=lambda task: self.first_target[task])
        stages = list(self._frozen_ns(lead, shape.tokens, shape.runs(), direction))
        first_layer: dict[str, list[int]] = {}
        layer: dict[str, list[int]] = {}
        for (task, tokens), times in self._alike(shape).items():
            edge, inner = self._terms(task, tokens, direction)
            # Above the first adapted BaseOp of stage 0 no gradient flows: its adapters have weight gradients only.
            foremost = edge if self.first_target[task] == self.first_target[lead] else inner
            _add_terms(first_layer, foremost, times)
            _add_terms(layer, inner, times)
        first_ns, layer_ns = (
            sum(max(adds_ns, alone_ns) + host_ns for adds_ns, alone_ns, host_ns in x.values())
            for x in (first_layer, layer)
        )
        for stage, layers in enumerate(self.layout.layers_per_stage):
            stages[stage] += layers * layer_ns
        stages[0] += first_ns - layer_ns
        return tuple(stages)

    def _alike(self, shape: Shape) -> dict[tuple[str, int], int]:
        """How often each (task, tokens) occurs; the first task of equal adapters stands for all."""
        found: dict[tuple[str, int], int] = {}
        for task, rows, length in shape.parts:
            place = self.equal[task], rows * length
            found[place] = found.get(place, 0) + 1
        return found

    def _terms(self, task: str, tokens: int, direction: Direction) -> tuple[Terms, Terms]:
        """What a task's adapters put into the grouped operator of each BaseOp (see `grouped`)."""
        key = (task, tokens, direction)
        if key not in self.terms:
            edge, inner = self._adapter_costs(task, tokens, direction)
            self.terms[key] = _terms_of(edge, self.device), _terms_of(inner, self.device)
        return self.terms[key]

    def chain(self, stage: int, shape: Shape, direction: Direction, isolated: bool = False) -> Chain:
        """What a micro-batch launches on a stage, in order: compute subgraphs, each with its collective.

        `isolated`: with adapters as nodes of their own.
        """
        # Stages of one kind and depth, and tasks of equal adapters, launch the same.
        parts = tuple((self.pefts[task], rows, length) for task, rows, length in shape.parts)
        depth = self.layout.layers_per_stage[stage]
        kind = stage_kind(self.contexts[stage])
        key = (kind, depth, parts, shape if shape.rows else None, direction, isolated)
        if key not in self.chains:
            self.chains[key] = self._chain(stage, shape, direction, isolated)
        return self.chains[key]

    def _chain(self, stage: int, shape: Shape, direction: Direction, isolated: bool) -> Chain:
        nodes: list[Node] = []
        groups = priced_groups(self.cost, self.contexts[stage], shape.row_batch(), direction, isolated)
        # Equal layers share their operators: no need to compare them one by one.
        places = {at: tuple(map(id, group)) for at, group in {id(g): g for g in groups}.items()}
        known: dict[tuple[int, ...], tuple[int, int]] = {}
        plain: dict[tuple[tuple[int, ...], bool], Node] = {}
        ended: dict[tuple[int, int], Node] = {}
        subgraphs = launched_subgraphs(self.layout, stage, direction, isolated)
        for subgraph, group in zip(subgraphs, groups, strict=True):
            place = places[id(group)]
            if place not in known:
                ops, collective = (host("launch", direction), *group), subgraph.kind == "collective"
                known[place] = self._sum_ns(ops), 0 if collective else self._sum_ns(ops, self.load)
            alone_ns, shared_ns = known[place]
            if subgraph.kind == "collective":
                end = (id(nodes[-1]), alone_ns)
                if end not in ended:
                    ended[end] = replace(nodes[-1], collective=True, comm_ns=alone_ns)
                nodes[-1] = ended[end]
                continue
            adapts = bool(subgraph.adapters)
            if (place, adapts) not in plain:
                node = Node(compute_ns=alone_ns, shared_ns=shared_ns)
                plain[place, adapts] = self._adapters_node(node, group) if adapts else node
            nodes.append(plain[place, adapts])
        return tuple(nodes)

    def _adapters_node(self, node: Node, ops: Sequence[Op]) -> Node:
        """How the adapters of one BaseOp share a launch with those of other hTasks (`grouped`)."""
        costs = [self.cost.latency(op, self.device) for op in ops]
        adds_ns = sum(round(c.utilisation * c.p50_ns) for c in costs)
        once_ns = node.compute_ns - sum(c.p50_ns for c in costs)
        return replace(node, adapters=True, adds_ns=adds_ns, once_ns=once_ns)

    def _sum_ns(self, ops: tuple[Op, ...], share: tuple[Op, ...] = ()) -> int:
        """Equal layers launch equal operators, which are priced once."""
        key = (ops, share)
        if key not in self.sums:
            priced = prices(self.cost, self.device, ops, link=self.link, share=share)
            self.sums[key] = sum(stream_ns(price, self.device) for _, price in priced)
        return self.sums[key]

    def backbone_ns(self, rows: int, length: int) -> tuple[int, ...]:
        """Forward and backward on each stage of whatever is no adapter: the least for any tasks with these rows."""
        pairs = []
        for lead in {self.first_target[t]: t for t in sorted(self.first_target)}.values():
            ways = [self._frozen_ns(lead, rows * length, ((rows, length, length),), way) for way in DIRECTIONS]
            pairs.append([f + b for f, b in zip(*ways, strict=True)])
        return tuple(map(min, zip(*pairs, strict=True)))

    def adapter_floors(self, task: str, tokens: int) -> dict[str, AdapterFloor]:
        """Floors of a task's adapters on so many tokens, by BaseOp and direction; see `grouped` for how adapters share."""
        found = {}
        for direction in DIRECTIONS:
            for (name, edge), (_, inner) in zip(*self._adapter_costs(task, tokens, direction), strict=True):
                found[f"{direction} {name}"] = AdapterFloor(
                    shared_ns=self._least(edge, inner, lambda c: round(c.utilisation * c.p50_ns)),
                    alone_ns=self._least(edge, inner, lambda c: stream_ns(c, self.device)),
                    once_ns=self._least(edge, inner, lambda c: stream_ns(c, self.device) - c.p50_ns),
                )
        return found

    def _least(self, edge: Cost, inner: Cost, price: Callable[[Cost], int]) -> tuple[int, ...]:
        """A part of the price on each stage: stage 0 has the cheaper first layer, whichever task comes first there."""
        stages = [layers * price(inner) for layers in self.layout.layers_per_stage]
        stages[0] += min(0, price(edge) - price(inner))
        return tuple(stages)

    def _frozen_ns(self, lead: str, tokens: int, runs: Runs, direction: Direction) -> tuple[int, ...]:
        """Backbone, launches and collectives on each stage; `lead` adapts the hTask's earliest BaseOp."""
        key = (tokens, runs, self.first_target[lead], direction)
        if key not in self.frozen:
            kinds = {stage_kind(c): c for c in self.thin}
            one = {kind: self._frozen_sum(c, lead, tokens, runs, direction) for kind, c in kinds.items()}
            layer = self._frozen_sum(self.two_layers, lead, tokens, runs, direction) - one[stage_kind(self.two_layers)]
            counts = zip(self.thin, self.layout.layers_per_stage, strict=True)
            self.frozen[key] = tuple(one[stage_kind(c)] + (layers - 1) * layer for c, layers in counts)
        return self.frozen[key]

    def _frozen_sum(self, context: StageContext, lead: str, tokens: int, runs: Runs, direction: Direction) -> int:
        total = 0
        for op in self._ops(context, lead, tokens, direction):
            if op.family == "attention":
                total += sum(self._op_ns(self._attention(op, *run)) for run in runs)
            elif op.family not in ADAPTERS:
                total += self._op_ns(op)
        return total

    def _adapter_costs(self, task: str, tokens: int, direction: Direction) -> tuple[TargetCosts, TargetCosts]:
        """Cost on each target (in the first layer of stage 0 where it comes first, in any other layer)."""
        peft = self.inner.peft(task)
        key = (peft, tokens, direction)
        if key not in self.adapter:
            targets = sorted(peft.targets, key=TARGETS.index)
            # A backward that runs the layer again first has the forward's adapters, in groups of their own.
            names = (
                [f"{t} again" for t in targets] if direction == "backward" and self.layout.recompute == "full" else []
            )
            names += targets if direction == "forward" else reversed(targets)
            found = []
            for context in (self.edge, self.inner):
                mine = [op for op in self._ops(context, task, tokens, direction) if op.family in ADAPTERS]
                found.append(tuple(self._named_costs(names, mine)))
            self.adapter[key] = (found[0], found[1])
        return self.adapter[key]

    def _named_costs(self, names: Sequence[str], mine: Sequence[Op]) -> Iterator[tuple[str, Cost]]:
        """(BaseOp and family, cost) of one task's adapters in order: adapters of one name may run as one grouped operator.

        A method has one operator on each BaseOp, and one sum over tp ranks on some.
        """
        left = list(names)
        target = ""
        for op in mine:
            if op.family != ops.ADAPTER_SUM:
                target = left.pop(0)
            # A forward sums behind its operator, a backward before it.
            place = target if op.family != ops.ADAPTER_SUM or op.direction == "forward" else left[0]
            yield f"{place} {op.family}", adapter_cost(self.cost, self.device, op, self.link)

    def _ops(self, context: StageContext, task: str, tokens: int, direction: Direction) -> Iterator[Op]:
        context = only(context, (task,))
        yield from batch_ops(context, Batch(htask=0, rows=(planning_row(task, 0, tokens),)), direction, self.cost)

    def _attention(self, op: Op, rows: int, length: int, queries: int) -> Op:
        heads = (op.shape[0], op.shape[1], op.shape[2])
        return ops.attention(rows, length, heads, op.direction, op.dtype, self.element_bytes, queries)

    def _op_ns(self, op: Op) -> int:
        if op not in self.op_ns:
            self.op_ns[op] = self._sum_ns((op,))
        return self.op_ns[op]
