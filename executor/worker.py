"""One rank as a process: `python -m muxtune.executor.worker ADDRESS RANK` answers the group's messages until it hangs up."""

from __future__ import annotations

import datetime
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Client
from typing import Any

import torch
import torch.distributed as dist

from muxtune.executor import messages
from muxtune.executor.comm import own_device
from muxtune.executor.interpreter import RankRun
from muxtune.executor.memory import allocation_peak, resident_bytes
from muxtune.executor.peers import PeerGroups
from muxtune.executor.randomise import randomise
from muxtune.executor.reference import reference_ns
from muxtune.executor.stage import StageModel
from muxtune.executor.tasks import Array, TaskState, register_task
from muxtune.spec.errors import InputError
from muxtune.spec.program import Bound


@dataclass(slots=True)
class Loaded:
    """A plan on this rank: a backbone copy for each instance, the tasks' states, and the current Program."""

    stages: dict[int, StageModel]
    tasks: dict[str, TaskState]
    run: RankRun


class Worker:
    """State of one rank."""

    def __init__(self, hello: messages.Hello) -> None:
        self.hello = hello
        if hello.core >= 0:
            os.sched_setaffinity(0, {hello.core})
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self.device = own_device(hello.device, hello.rank)
        timeout = datetime.timedelta(seconds=hello.timeout_s)
        backend = "nccl" if hello.device == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=hello.rendezvous, rank=hello.rank, world_size=hello.ranks, timeout=timeout
        )
        self.peers = PeerGroups(timeout=timeout)
        self.groups: dict[str, Any] = {
            name: dist.new_group(timeout=timeout) for name in ("activation", "gradient", "instance")
        }
        self.loaded: dict[str, Loaded] = {}
        self.answers: dict[type, Callable[[Any], Any]] = {
            messages.Load: self.load,
            messages.Rebind: self.rebind,
            messages.Run: self.run,
            messages.Inspect: self.inspect,
            messages.Gradients: self.gradients,
            messages.Poison: self.poison,
            messages.Call: self.call,
            messages.Unload: lambda m: self.loaded.pop(m.name) and None,
        }

    def load(self, message: messages.Load) -> None:
        """Build what a plan needs on this rank."""
        plan = message.bound.plan
        stages: dict[int, StageModel] = {}
        tasks: dict[str, TaskState] = {}
        for index, instance in enumerate(plan.instances):
            peers = self.peers.of(instance, self.hello.rank)
            if self.hello.rank not in instance.devices:
                continue
            rank = instance.devices.index(self.hello.rank)
            layout = instance.layout
            stage = StageModel(
                plan.workload.model, layout, layout.stage_of(rank), rank % layout.tp, self.device, message.seed, peers
            )
            stages[index] = stage
            for task_id in instance.tasks:
                tasks[task_id] = register_task(stage, plan.workload.task(task_id), message.seed)
        if message.random_adapters:
            randomise(tasks, plan.workload.model.gated)
        self.loaded[message.name] = Loaded(stages, tasks, self._rank_run(message.bound, stages, tasks))

    def _rank_run(self, bound: Bound, stages: dict[int, StageModel], tasks: dict[str, TaskState]) -> RankRun:
        return RankRun(bound, self.hello.rank, stages, tasks, self.groups, self.device)

    def rebind(self, message: messages.Rebind) -> None:
        """Swap the Program of a loaded plan."""
        loaded = self.loaded[message.name]
        loaded.run = self._rank_run(message.bound, loaded.stages, loaded.tasks)

    def run(self, message: messages.Run) -> messages.RankResult:
        """Run a Program once after a barrier; the reference is timed before and after, outside the Program."""
        loaded = self.loaded[message.name]
        static_bytes = peak_bytes = None
        before_ns = reference_ns(self.device)
        dist.barrier(group=self.groups["instance"])
        cpu_ns, wall_ns = time.thread_time_ns(), time.perf_counter_ns()
        if message.memory:
            static_bytes = resident_bytes(_resident(loaded))
            peak_bytes = static_bytes + allocation_peak(loaded.run.run, self.device)
        else:
            loaded.run.run()
        cpu_ns, wall_ns = time.thread_time_ns() - cpu_ns, time.perf_counter_ns() - wall_ns
        return messages.RankResult(
            rank=self.hello.rank,
            marks=tuple(loaded.run.marks),
            reference_ns=(before_ns + reference_ns(self.device)) // 2,
            cpu_ns=cpu_ns,
            wall_ns=wall_ns,
            static_bytes=static_bytes,
            peak_bytes=peak_bytes,
        )

    def inspect(self, message: messages.Inspect) -> messages.Inspection:
        """Losses (known on the last stage), gradient norms, skipped steps and, if asked for, parameters."""
        tasks = self.loaded[message.name].tasks
        reports = {
            name: messages.TaskReport(losses=tuple(t.losses), gradient_norms=tuple(t.gradient_norms), skipped=t.skipped)
            for name, t in tasks.items()
        }
        return messages.Inspection(
            reports=reports, state={n: t.state() for n, t in tasks.items()} if message.state else {}
        )

    def gradients(self, message: messages.Gradients) -> dict[str, dict[str, Array]]:
        """Accumulated gradients of one pass, by task and parameter name."""
        loaded = self.loaded[message.name]
        loaded.run.run(steps=False)
        found = {name: task.gradients() for name, task in loaded.tasks.items()}
        for task in loaded.tasks.values():
            task.optimizer.zero_grad(set_to_none=True)
        return found

    def poison(self, message: messages.Poison) -> None:
        """NaN into one task's first adapter parameter, on the ranks that hold the task."""
        if message.task in self.loaded[message.name].tasks:
            self.loaded[message.name].tasks[message.task].parameters[0].fill_(float("nan"))

    def call(self, message: messages.Call) -> Any:
        """Run a function of another module in this process."""
        module, _, function = message.function.partition(":")
        return getattr(importlib.import_module(module), function)(self, *message.arguments)


def _resident(loaded: Loaded) -> list[torch.Tensor]:
    tensors = [p for stage in loaded.stages.values() for p in stage.gpt.parameters()]
    tensors += [p for task in loaded.tasks.values() for p in task.parameters]
    states = (s for task in loaded.tasks.values() for s in task.optimizer.state.values())
    return tensors + [v for state in states for v in state.values() if isinstance(v, torch.Tensor)]


def main(address: str, rank: int) -> None:
    """Connect to the group, say which rank this is, and answer until the connection closes."""
    connection = Client(address, authkey=os.environ["MUXTUNE_AUTHKEY"].encode())
    connection.send(rank)
    worker = Worker(connection.recv())
    while True:
        try:
            message = connection.recv()
        except EOFError:
            break
        try:
            answer = worker.answers[type(message)](message)
        except Exception as error:
            text = f"rank {rank}: {type(error).__name__}: {error}"
            answer = messages.Failure(
                message=text, details=traceback.format_exc(), input_error=isinstance(error, InputError)
            )
        connection.send(answer)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
