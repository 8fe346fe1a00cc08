"""Benches of training: what recording the Timeline costs a rank, what saving and a change of plan cost a run."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from muxtune.executor import messages
from muxtune.executor.group import WorkerGroup
from muxtune.executor.session import NAME, Session
from muxtune.policies.base import SystemState, make_policy
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Plan
from muxtune.spec.restrict import without_tasks
from muxtune.spec.task import Task, Workload

ROUNDS = 15


def compare_recording(worker: Any, name: str) -> tuple[float, int, float]:
    """(CPU time with recording over without, marks of an iteration, CPU ns of an iteration), iterations in turn."""
    from muxtune.executor.comm import HostComm  # noqa: PLC0415
    from muxtune.executor.interpreter import RankRun  # noqa: PLC0415

    run = worker.loaded[name].run
    spent: dict[bool, list[int]] = {True: [], False: []}
    for number in range(2 * ROUNDS + 2):
        recorded = number % 2 == 0
        with ExitStack() as stack:
            if not recorded:
                stack.enter_context(patch.object(HostComm, "stamp", lambda self: 0))
                stack.enter_context(patch.object(RankRun, "_marks", lambda self: []))
            start_ns = time.thread_time_ns()
            run.run()
            spent[recorded].append(time.thread_time_ns() - start_ns)
    run.run()
    ratios = [a / b for a, b in zip(spent[True][1:], spent[False][1:], strict=True)]
    return statistics.median(ratios), len(run.marks), statistics.median(spent[True])


def mark_ns(worker: Any) -> float:
    """CPU ns of one mark: two stamps, the note of them, and the record that is made of it after the run."""
    from muxtune.executor.comm import HostComm, Jitter  # noqa: PLC0415
    from muxtune.executor.reports import Mark  # noqa: PLC0415

    clock, count = HostComm(Jitter()), 20_000
    start_ns = time.thread_time_ns()
    stamps = [(index, 0, 0, clock.stamp(), clock.stamp()) for index in range(count)]
    kept = [
        Mark(index=i, subgraph=s, htask=h, start_ns=clock.resolve(a), end_ns=clock.resolve(b))
        for i, s, h, a, b in stamps
    ]
    return (time.thread_time_ns() - start_ns) / len(kept)


def plan_of(model: str, tasks: int) -> Plan:
    """A plan of the paper's policy for LoRA tasks on one rank."""
    made = tuple(
        Task(task_id=f"t{i}", peft=LoRA(rank=8), dataset="sst2", billed_len_tokens=64, global_batch_samples=8)
        for i in range(tasks)
    )
    workload = Workload(name="b", model=model_preset(model), datasets=(embedded_length("sst2"),), tasks=made)
    layout, cluster = even_layout(workload.model), parse_cluster("1xcpu")
    state = SystemState(workload=workload, cluster=cluster, layout=layout, microbatches=4)
    return make_policy("muxtune", Roofline()).plan(state)


def lines() -> Iterator[str]:
    """The figures, on one rank of this CPU."""
    plan = plan_of("tiny-llama", 4)
    with WorkerGroup(even_layout(plan.workload.model)) as group, tempfile.TemporaryDirectory() as folder:
        (each_ns,) = group.ask(messages.Call(function="tests.bench_training:mark_ns"))
        session = Session(group, plan, checkpoint=Path(folder))
        call = messages.Call(function="tests.bench_training:compare_recording", arguments=(NAME,))
        ((ratio, marks, iteration_ns),) = group.ask(call)
        share = marks * each_ns / iteration_ns
        yield (
            f"Timeline always recorded, tiny-llama, 4 tasks: {ratio:.3f} x the CPU time of an iteration without (target < "
            f"1.02; {marks} marks of {each_ns:.0f} ns in {iteration_ns / 1e6:.0f} ms are {100 * share:.2f} %)"
        )
        yield from _saving(session)


def _saving(session: Session) -> Iterator[str]:
    done = [session.iterate() for _ in range(3)][-1]
    start_s = time.perf_counter()
    session.save()
    saved_s = time.perf_counter() - start_s
    gone = session.plan.workload.tasks[0].task_id
    less, whole = without_tasks(session.plan, [gone]), session.plan
    left = session.replan(less)
    joined = session.replan(_renamed(whole, gone))
    iteration_s = done.iteration_ns / 1e9
    costs = (saved_s, *(r.check_seconds + r.save_seconds + r.apply_seconds for r in (left, joined)))
    names = ("saving 4 tasks", "a task leaving", "a task joining")
    shown = ", ".join(f"{n} {c / iteration_s:.2f} x" for n, c in zip(names, costs, strict=True))
    yield f"one iteration of {iteration_s * 1e3:.0f} ms is the unit: {shown}"


def _renamed(plan: Plan, task_id: str) -> Plan:
    """The plan with one task under another name (a task that left cannot come back under its own)."""
    from muxtune.spec.files import validate  # noqa: PLC0415
    from muxtune.spec.noun import plain  # noqa: PLC0415

    def rename(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: rename(v) for k, v in value.items()}
        if isinstance(value, list):
            return [rename(v) for v in value]
        return f"{task_id}-new" if value == task_id else value

    return validate(Plan, rename(plain(plan)), "bench")
