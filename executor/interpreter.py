"""The interpreter of a Program on one rank: it runs instructions as listed and records when each ran."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from muxtune.executor.channels import Channels
from muxtune.executor.data import BatchTensors, batch_tensors, response_counts
from muxtune.executor.megatron import DTYPES
from muxtune.executor.stage import Passage, StageModel
from muxtune.executor.tasks import TaskState, step_task
from muxtune.spec.layout import Layout
from muxtune.spec.plan import Launch
from muxtune.spec.program import Bound, Instruction, UnitKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """When an instruction (subgraph −1) or one launch inside it ran on this rank, by the machine's monotonic clock."""

    index: int
    subgraph: int
    htask: int
    start_ns: int
    end_ns: int


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
    ) -> None:
        self.bound, self.rank, self.stages, self.tasks, self.groups, self.device = (
            bound,
            rank,
            stages,
            tasks,
            groups,
            device,
        )
        self.instructions = next(r.instructions for r in bound.program.ranks if r.rank == rank)
        self.launches = _launches_here(bound, rank)
        self.denominators = response_counts(bound.program)
        vocab = bound.plan.workload.model.vocab
        mine = {x.key for x in self.instructions if x.op == "forward"}
        self.tensors: dict[UnitKey, dict[int, BatchTensors]] = {
            w.key: {b.htask: batch_tensors(b, vocab, device) for b in w.batches}
            for w in bound.program.units
            if w.key in mine
        }
        self.run_op: dict[str, Callable[[Instruction, int], None]] = {
            "recv": self._recv,
            "forward": self._forward,
            "send": self._send,
            "backward": self._backward,
            "step": self._step,
        }

    def layout(self, instance: int) -> Layout:
        """Layout of an instance."""
        return self.bound.plan.instances[instance].layout

    def run(self, steps: bool = True) -> list[Mark]:
        """Execute every instruction once; the adapters' state moves on by the Program's optimizer steps.

        `steps=False` leaves the optimizer steps out, so that the accumulated gradients can be read.
        """
        self.with_steps = steps
        model = self.bound.plan.workload.model
        self.marks: list[Mark] = []
        self.passages: dict[UnitKey, dict[int, Passage]] = {}
        self.inbox: dict[tuple[UnitKey, str], Tensor] = {}
        self.losses: dict[tuple[str, int], Tensor] = {}
        self.channels = Channels(self.instructions, self.groups, model.hidden, DTYPES[model.dtype], self.device)
        clock = time.perf_counter_ns
        for index, instruction in enumerate(self.instructions):
            start_ns = clock()
            self.run_op[instruction.op](instruction, index)
            self.marks.append(Mark(index=index, subgraph=-1, htask=-1, start_ns=start_ns, end_ns=clock()))
        self.channels.finish()
        for (task, _), loss in sorted(self.losses.items()):
            self.tasks[task].losses.append(float(loss))
        return self.marks

    def _recv(self, x: Instruction, index: int) -> None:
        assert x.payload is not None
        self.inbox[x.key, x.payload] = self.channels.receive(x)

    def _forward(self, x: Instruction, index: int) -> None:
        stage = self.stages[x.key.instance]
        received = self._split(x.key, self.inbox.pop((x.key, "activation"), None))
        passages = {h: stage.begin(t, received.get(h)) for h, t in self.tensors[x.key].items()}
        self.passages[x.key] = passages
        step = x.key.step
        counts = {task: self.denominators[task, step] for t in self.tensors[x.key].values() for task, _ in t.targets}
        for launch in self.launches[x.key.instance, x.key.bucket, "forward"]:
            if launch.htask in passages:
                self.launch(index, launch, partial(stage.forward, passages[launch.htask], launch.subgraph, counts))
        for passage in passages.values():
            for task, loss in passage.losses.items():
                at = (task, step)
                self.losses[at] = self.losses[at] + loss if at in self.losses else loss

    def _backward(self, x: Instruction, index: int) -> None:
        stage = self.stages[x.key.instance]
        passages = self.passages[x.key]
        for h, gradient in self._split(x.key, self.inbox.pop((x.key, "gradient"), None)).items():
            passages[h].gradient = gradient
        for launch in self.launches[x.key.instance, x.key.bucket, "backward"]:
            if launch.htask in passages:
                self.launch(index, launch, partial(stage.backward, passages[launch.htask], launch.subgraph))
        if not stage.layout.is_first(stage.stage):
            self.inbox[x.key, "outgoing"] = self._join([p.gradient for p in passages.values()])
        del self.passages[x.key]

    def launch(self, index: int, launch: Launch, node: Callable[[], None]) -> None:
        """Run one launched subgraph and mark when it ran inside instruction `index`."""
        start_ns = time.perf_counter_ns()
        node()
        self.marks.append(
            Mark(
                index=index,
                subgraph=launch.subgraph,
                htask=launch.htask,
                start_ns=start_ns,
                end_ns=time.perf_counter_ns(),
            )
        )

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
        tensors = self.tensors[key]
        parts = torch.split(message, [t.batch.tokens for t in tensors.values()])
        return dict(zip(tensors, parts, strict=True))

    def _join(self, parts: list[Tensor | None]) -> Tensor:
        there = [p for p in parts if p is not None]
        assert len(there) == len(parts)
        return there[0] if len(there) == 1 else torch.cat(there)

    def _step(self, x: Instruction, index: int) -> None:
        assert x.task is not None
        if not self.with_steps:
            return
        layout = self.layout(x.key.instance)
        group = self.groups["instance"] if layout.ranks > 1 else None
        step_task(self.tasks[x.task], layout.tp, group)


def _launches_here(bound: Bound, rank: int) -> dict[tuple[int, int, str], tuple[Launch, ...]]:
    """(instance, bucket, direction) → launch list of this rank's stage."""
    found: dict[tuple[int, int, str], tuple[Launch, ...]] = {}
    for listing in bound.program.launches:
        instance = bound.plan.instances[listing.instance]
        if rank in instance.devices and instance.layout.stage_of(instance.devices.index(rank)) == listing.stage:
            found[listing.instance, listing.bucket, listing.direction] = listing.launches
    return found
