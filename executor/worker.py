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
from muxtune.executor.checkpoint import Checkpoint, FileRecord
from muxtune.executor.comm import own_device
from muxtune.executor.data import token_source
from muxtune.executor.hf.backbone import HfBackbone
from muxtune.executor.interpreter import RankRun
from muxtune.executor.memory import allocation_peak, backbone_digest, resident_bytes
from muxtune.executor.peers import PeerGroups, Peers
from muxtune.executor.randomise import randomise
from muxtune.executor.reference import reference_ns
from muxtune.executor.reports import Array, StepReport
from muxtune.executor.stage import StageModel
from muxtune.executor.tasks import TaskState, as_array, hang, register_task, take_down
from muxtune.executor.tensor_files import (
    random_tensors,
    read_tensors,
    restore_random,
    restore_task,
    task_tensors,
    write_tensors,
)
from muxtune.spec.errors import InputError
from muxtune.spec.plan import Plan
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
        if hello.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # every buffer is written before it is read
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
        self.food = messages.Feed()
        self.answers: dict[type, Callable[[Any], Any]] = {
            messages.Feed: self.feed,
            messages.Load: self.load,
            messages.Rebind: self.rebind,
            messages.Replan: self.replan,
            messages.Save: self.save,
            messages.Restore: self.restore,
            messages.Run: self.run,
            messages.Inspect: self.inspect,
            messages.Gradients: self.gradients,
            messages.Poison: self.poison,
            messages.Call: self.call,
            messages.Unload: lambda m: self.loaded.pop(m.name) and None,
        }

    def feed(self, message: messages.Feed) -> None:
        """Remember weights and texts for plans that are loaded later."""
        self.food = message

    def load(self, message: messages.Load) -> None:
        """Build what a plan needs on this rank."""
        plan = message.bound.plan
        stages: dict[int, StageModel] = {}
        tasks: dict[str, TaskState] = {}
        for index, instance in enumerate(plan.instances):
            peers = self.peers.of(instance, self.hello.rank)
            if self.hello.rank not in instance.devices:
                continue
            stage = stages[index] = self._stage(plan, index, message.seed, peers)
            for task_id in instance.tasks:
                tasks[task_id] = register_task(stage, plan.workload.task(task_id), message.seed)
        if message.random_adapters:
            randomise(tasks, plan.workload.model.gated)
        if message.ending:
            for state in tasks.values():
                state.last_step = state.task.steps
        self.loaded[message.name] = Loaded(stages, tasks, self._rank_run(message.bound, stages, tasks))

    def _stage(self, plan: Plan, index: int, seed: int, peers: Peers) -> StageModel:
        instance = plan.instances[index]
        layout, rank = instance.layout, instance.devices.index(self.hello.rank)
        model, folder = plan.workload.model, self.food.backbone
        weights = None if folder is None else HfBackbone(folder, model)
        return StageModel(model, layout, layout.stage_of(rank), rank % layout.tp, self.device, seed, peers, weights)

    def _rank_run(self, bound: Bound, stages: dict[int, StageModel], tasks: dict[str, TaskState]) -> RankRun:
        tokens = token_source(bound.plan.workload, self.food.texts)
        return RankRun(bound, self.hello.rank, stages, tasks, self.groups, self.device, tokens)

    def rebind(self, message: messages.Rebind) -> None:
        """Swap the Program of a loaded plan."""
        loaded = self.loaded[message.name]
        loaded.run = self._rank_run(message.bound, loaded.stages, loaded.tasks)

    def replan(self, message: messages.Replan) -> None:
        """Tasks leave and join; those that stay keep their adapters, even where they move to another backbone copy."""
        loaded, plan = self.loaded[message.name], message.bound.plan
        kept = matching_instances(loaded.run.bound.plan, plan)
        stages: dict[int, StageModel] = {}
        tasks: dict[str, TaskState] = {}
        for task_id in loaded.tasks:
            take_down(task_id, loaded.stages.values())
        for index, instance in enumerate(plan.instances):
            peers = self.peers.of(instance, self.hello.rank)
            if self.hello.rank not in instance.devices:
                continue
            here = loaded.stages.get(kept.get(index, -1))
            stages[index] = stage = here if here is not None else self._stage(plan, index, message.seed, peers)
            for task_id in instance.tasks:
                state = loaded.tasks.get(task_id)
                if state is None:
                    state = register_task(stage, plan.workload.task(task_id), message.seed)
                    state.last_step = state.task.steps
                    if task_id in message.saved:
                        restore_saved(state, message.saved[task_id])
                else:
                    hang(state, stage)
                tasks[task_id] = state
        self.loaded[message.name] = Loaded(stages, tasks, self._rank_run(message.bound, stages, tasks))

    def save(self, message: messages.Save) -> tuple[FileRecord, ...]:
        """Write this rank's part of a checkpoint."""
        loaded, rank = self.loaded[message.name], self.hello.rank
        wanted = [t for t in loaded.tasks if message.tasks is None or t in message.tasks]
        contents = {task: task_tensors(loaded.tasks[task]) for task in wanted}
        if message.tasks is None:
            contents[""] = random_tensors(self.device)
        shards = {t: a.place for t, state in loaded.tasks.items() for a in state.adapters.values()}
        return tuple(
            write_tensors(message.folder, t, x, rank, (shards[t].tp_rank, shards[t].tp) if t in shards else (0, 1))
            for t, x in contents.items()
        )

    def restore(self, message: messages.Restore) -> tuple[StepReport, ...]:
        """Read this rank's part of a checkpoint, and swap in the Program that comes next."""
        loaded, rank = self.loaded[message.name], self.hello.rank
        for state in loaded.tasks.values():
            restore_saved(state, message.checkpoint)
        generators = [f.name for f in message.checkpoint.manifest.files if (f.task, f.rank) == ("", rank)]
        restore_random(read_tensors(message.checkpoint.folder / name for name in generators), self.device)
        loaded.run = self._rank_run(message.bound, loaded.stages, loaded.tasks)
        return tuple(r for state in loaded.tasks.values() for r in state.reports(0))

    def run(self, message: messages.Run) -> messages.RankResult:
        """Run a Program once after a barrier; the reference is timed before and after, outside the Program."""
        loaded = self.loaded[message.name]
        static_bytes = peak_bytes = kinds = None
        first = {name: state.steps for name, state in loaded.tasks.items()}
        before_ns = reference_ns(self.device) if message.reference else 0
        dist.barrier(group=self.groups["instance"])
        cpu_ns, wall_ns = time.thread_time_ns(), time.perf_counter_ns()
        if message.memory:
            static_bytes = sum(_resident(loaded))
            peak_bytes = static_bytes + allocation_peak(loaded.run.run, self.device)
            kinds = _resident(loaded)
        else:
            loaded.run.run()
        cpu_ns, wall_ns = time.thread_time_ns() - cpu_ns, time.perf_counter_ns() - wall_ns
        return messages.RankResult(
            rank=self.hello.rank,
            marks=tuple(loaded.run.marks),
            reference_ns=(before_ns + reference_ns(self.device)) // 2 if message.reference else 0,
            cpu_ns=cpu_ns,
            wall_ns=wall_ns,
            static_bytes=static_bytes,
            peak_bytes=peak_bytes,
            kinds=kinds,
            steps=tuple(r for name, state in loaded.tasks.items() for r in state.reports(first[name])),
        )

    def inspect(self, message: messages.Inspect) -> messages.Inspection:
        """Losses (known on the last stage), gradient norms, skipped steps and, if asked for, parameters."""
        loaded = self.loaded[message.name]
        tasks = loaded.tasks if message.state else {}
        reports = {
            name: messages.TaskReport(
                losses=tuple(t.losses), gradient_norms=tuple(t.gradient_norms), skipped=len(t.skips)
            )
            for name, t in loaded.tasks.items()
        }
        return messages.Inspection(
            reports=reports,
            state={n: t.state() for n, t in tasks.items()},
            optimizer={n: {k: as_array(v) for k, v in t.moments().items()} for n, t in tasks.items()},
            backbones=tuple(backbone_digest(s) for s in loaded.stages.values()) if message.backbone else (),
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


def restore_saved(state: TaskState, checkpoint: Checkpoint) -> None:
    """Put a task back where a checkpoint left it; every pipeline stage's file is looked through."""
    tp_rank = next((a.place.tp_rank for a in state.adapters.values()), 0)
    restore_task(state, read_tensors(checkpoint.paths(state.task.task_id, tp_rank)))


def matching_instances(old: Plan, new: Plan) -> dict[int, int]:
    """New instance → old instance whose backbone it takes over: same layout and devices, tasks in common first, each once."""
    found: dict[int, int] = {}
    for common in (True, False):
        for n, instance in enumerate(new.instances):
            for o, before in enumerate(old.instances):
                if (
                    n in found
                    or o in found.values()
                    or (before.layout, before.devices) != (instance.layout, instance.devices)
                ):
                    continue
                if not common or set(before.tasks) & set(instance.tasks):
                    found[n] = o
    return found


def _resident(loaded: Loaded) -> tuple[int, int, int]:
    """Bytes of the backbones, the adapters and the optimizer states."""
    weights = (p for stage in loaded.stages.values() for p in stage.gpt.parameters())
    adapters = (p for task in loaded.tasks.values() for p in task.parameters)
    moments = (v for task in loaded.tasks.values() for v in task.moments().values())
    return resident_bytes(weights), resident_bytes(adapters), resident_bytes(moments)


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
