"""The interpreter of a Program on one rank: it runs instructions as listed and records when each ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muxtune.executor.channels import Channels, connect
from muxtune.executor.comm import Pending, make_comm
from muxtune.executor.data import TokenSource, response_counts, token_source
from muxtune.executor.megatron import DTYPES
from muxtune.executor.passage import Passage, PastChunks
from muxtune.executor.peers import sum_gradients
from muxtune.executor.reports import Mark
from muxtune.executor.stage import StageModel
from muxtune.executor.tasks import TaskState, step_task
from muxtune.executor.units import unit_tensors
from muxtune.spec.catalogue import Way
from muxtune.spec.plan import Launch
from muxtune.spec.program import Bound, Instruction, UnitKey


class RankRun:
    """A Program loaded on one rank: its tensors are built once, `run` executes it and can be called again."""

    def __init__(
        self,
        bound: Bound,
        rank: int,
        stages: dict[int, StageModel],
        tasks: dict[str, TaskState],
        groups: dict[str, Any],
        device: torch.device,
        tokens: TokenSource | None = None,
    ) -> None:
        self.bound, self.rank, self.stages, self.tasks, self.groups, self.device = (
            bound,
            rank,
            stages,
            tasks,
            groups,
            device,
        )
        self.instructions = next((r.instructions for r in bound.program.ranks if r.rank == rank), ())
        self.launches = _launches_here(bound, rank)
        self.denominators = response_counts(bound.program)
        mine = {x.key for x in self.instructions if x.op == "forward"}
        self.tensors = unit_tensors(bound, mine, device, tokens or token_source(bound.plan.workload))
        connect(bound.program, rank, groups, device)
        self.clock = next((stage.comm for stage in stages.values()), make_comm(device))
        self.run_op: dict[str, Callable[[Instruction, int], None]] = {
            "recv": self._recv,
            "forward": self._forward,
            "send": self._send,
            "backward": self._backward,
            "step": self._step,
        }

    def run(self, steps: bool = True) -> list[Mark]:
        """Execute every instruction once; the adapters' state moves on by the Program's optimizer steps.

        `steps=False` leaves the optimizer steps out, so that the accumulated gradients, summed over the ranks that share
        them, can be read.
        """
        self.with_steps = steps
        model = self.bound.plan.workload.model
        self.stamps: list[tuple[int, int, int, Any, Any]] = []
        self.passages: dict[UnitKey, dict[int, Passage]] = {}
        self.pasts: dict[tuple[UnitKey, int], PastChunks] = {}
        self.inbox: dict[tuple[UnitKey, str], Tensor] = {}
        self.losses: dict[tuple[str, int], Tensor] = {}
        self.channels = Channels(
            self.instructions, self.groups, model.hidden, DTYPES[model.dtype], self.device, self.clock.jitter
        )
        self.clock.begin()
        for index, instruction in enumerate(self.instructions):
            start = self.clock.stamp()
            self.run_op[instruction.op](instruction, index)
            self.stamps.append((index, -1, -1, start, self.clock.stamp()))
        self.channels.finish()
        if not steps:
            for task in sorted(self.tasks):
                self._sum_gradients(task)
        self._record_losses()
        self.marks = self._marks()
        return self.marks

    def _marks(self) -> list[Mark]:
        """When everything ran, once it has: stamps become times."""
        times = self.clock.resolve
        return [
            Mark(index=index, subgraph=subgraph, htask=htask, start_ns=times(start), end_ns=times(end))
            for index, subgraph, htask, start, end in self.stamps
        ]

    def _record_losses(self) -> None:
        """Losses of every step, on the last stage only; replicas add up what each computed."""
        for index, stage in self.stages.items():
            instance = self.bound.plan.instances[index]
            mine = [(t, s) for t, s in sorted(self.denominators) if t in instance.tasks]
            if not stage.layout.is_last(stage.stage) or not mine:
                continue
            zero = torch.zeros((), device=self.device)
            total = torch.stack([self.losses.get(at, zero).float() for at in mine])
            if stage.peers.dp is not None:
                dist.all_reduce(total, group=stage.peers.dp)
            for (task, _), loss in zip(mine, total.tolist(), strict=True):
                self.tasks[task].add_loss(loss)

    def _recv(self, x: Instruction, index: int) -> None:
        assert x.payload is not None
        self.inbox[x.key, x.payload] = self.channels.receive(x)

    def _forward(self, x: Instruction, index: int) -> None:
        stage = self.stages[x.key.instance]
        received = self._split(x.key, self.inbox.pop((x.key, "activation"), None))
        passages = {h: stage.begin(t, received.get(h), self._past(x.key, h)) for h, t in self.tensors[x.key].items()}
        for passage in passages.values():
            passage.scales = {task: self.tasks[task].loss_scale for task, _ in passage.tensors.targets}
        self.passages[x.key] = passages
        step = x.key.step
        counts = {task: self.denominators[task, step] for t in self.tensors[x.key].values() for task, _ in t.targets}
        self._clock(x, index, "forward", lambda passage, subgraph: stage.forward(passage, subgraph, counts))
        for passage in passages.values():
            for task, loss in passage.losses.items():
                at = (task, step)
                self.losses[at] = self.losses[at] + loss if at in self.losses else loss

    def _past(self, key: UnitKey, htask: int) -> PastChunks | None:
        """What the chunks of a unit share, from the first one's forward to the first one's backward; None for whole units."""
        instance = self.bound.plan.instances[key.instance]
        if instance.buckets[key.bucket].units[key.unit].chunks == 1 or instance.htasks[htask].alignment != "chunk":
            return None
        return self.pasts.setdefault((replace(key, chunk=0), htask), PastChunks())

    def _backward(self, x: Instruction, index: int) -> None:
        stage = self.stages[x.key.instance]
        passages = self.passages[x.key]
        for h, gradient in self._split(x.key, self.inbox.pop((x.key, "gradient"), None)).items():
            passages[h].gradient = gradient
        self._clock(x, index, "backward", stage.backward)
        if not stage.layout.is_first(stage.stage):
            self.inbox[x.key, "outgoing"] = self._join([p.gradient for p in passages.values()])
        del self.passages[x.key]
        if x.key.chunk == 0:
            for htask in passages:
                self.pasts.pop((x.key, htask), None)

    def _clock(self, x: Instruction, index: int, way: Way, node: Callable[[Passage, int], None]) -> None:
        """Run the launches of a clock in the plan's order; collectives run on beside the compute of other hTasks.

        A subgraph waits for the collective of its own hTask before it, and its span begins after that wait.
        """
        stage, passages = self.stages[x.key.instance], self.passages[x.key]
        started: list[tuple[Launch, Pending]] = []
        for launch in self.launches[x.key.instance, x.key.bucket, way]:
            passage = passages.get(launch.htask)
            if passage is None:
                continue
            passage.settle()
            if launch.stream == "compute":
                self.launch(index, launch, partial(node, passage, launch.subgraph))
            elif (exchange := stage.exchange(passage, way, launch.subgraph)) is not None:
                passage.on_its_way = stage.comm.start(exchange, stage.peers)
                started.append((launch, passage.on_its_way))
        for passage in passages.values():
            passage.settle()
        self.stamps += [(index, x.subgraph, x.htask, pending.start, pending.end) for x, pending in started]

    def launch(self, index: int, launch: Launch, node: Callable[[], None]) -> None:
        """Run one launched subgraph and mark when it ran inside instruction `index`."""
        start = self.clock.stamp()
        node()
        self.stamps.append((index, launch.subgraph, launch.htask, start, self.clock.stamp()))

    def _send(self, x: Instruction, index: int) -> None:
        if x.payload == "activation":
            passages = self.passages[x.key].values()
            message = self._join([p.stream for p in passages])
            for passage in passages:
                passage.stream = None
        else:
            message = self.inbox.pop((x.key, "outgoing"))
        self.channels.send(x, message)

    def _split(self, key: UnitKey, message: Tensor | None) -> dict[int, Tensor]:
        """One message carries all hTasks of a unit, one after the other on the token axis."""
        if message is None:
            return {}
        tensors, layout = self.tensors[key], self.stages[key.instance].layout
        parts = torch.split(message, [layout.shard_tokens(t.batch.tokens) for t in tensors.values()])
        return dict(zip(tensors, parts, strict=True))

    def _join(self, parts: list[Tensor | None]) -> Tensor:
        there = [p for p in parts if p is not None]
        assert len(there) == len(parts)
        return there[0] if len(there) == 1 else torch.cat(there)

    def _step(self, x: Instruction, index: int) -> None:
        assert x.task is not None
        if not self.with_steps:
            return
        stage = self.stages[x.key.instance]
        self._sum_gradients(x.task)
        self.clock.jitter()
        step_task(self.tasks[x.task], stage.layout.tp, stage.peers.replica)

    def _sum_gradients(self, task: str) -> None:
        holders = (s for i, s in self.stages.items() if task in self.bound.plan.instances[i].tasks)
        state = self.tasks[task]
        self.clock.jitter()
        sum_gradients(next(holders).peers, state.parameters, state.replicated)


def _launches_here(bound: Bound, rank: int) -> dict[tuple[int, int, str], tuple[Launch, ...]]:
    """(instance, bucket, direction) → launch list of this rank's stage."""
    found: dict[tuple[int, int, str], tuple[Launch, ...]] = {}
    for listing in bound.program.launches:
        instance = bound.plan.instances[listing.instance]
        if rank in instance.devices and instance.layout.stage_of(instance.devices.index(rank)) == listing.stage:
            found[listing.instance, listing.bucket, listing.direction] = listing.launches
    return found
