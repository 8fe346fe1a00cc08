"""`make bench`: speeds as ratios within one run, with the machine's name. Nothing here is a test; nothing here can fail."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from muxtune.executor.reference import reference_ns
from muxtune.experiments.commands import suite as command
from muxtune.experiments.commands.problem import Options
from muxtune.kernels import grouped_lora
from muxtune.policies.base import SystemState, make_policy
from muxtune.profiler.provenance import birth
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.task import Task, Workload
from tests import bench_cluster, bench_online, bench_planners, bench_search, bench_traces, bench_training
from tests.bench_sim import simulating

ROUNDS = 7
DATASETS = ("sst2", "openbookqa", "rte")


def say(line: str) -> None:
    """One line on standard output."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def middle_s(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(ROUNDS):
        start_s = clock()
        call()
        times.append(clock() - start_s)
    return statistics.median(times)


def workload(tasks: int) -> Workload:
    """LoRA tasks on LLaMA2-7B over three data sets."""
    made = tuple(
        Task(
            task_id=f"t{i:02d}",
            peft=LoRA(rank=8 << i % 3),
            dataset=DATASETS[i % 3],
            billed_len_tokens=embedded_length(DATASETS[i % 3]).covered_length(),
            global_batch_samples=8 * (1 + i % 4),
        )
        for i in range(tasks)
    )
    return Workload(
        name="bench",
        model=model_preset("llama2-7b"),
        datasets=tuple(embedded_length(d) for d in DATASETS),
        tasks=made,
    )


def help_time() -> str:
    """`muxtune --help` against an empty interpreter (target: under 0.6 s)."""
    command = os.path.join(os.path.dirname(sys.executable), "muxtune")
    shown = middle_s(lambda: subprocess.run([command, "--help"], capture_output=True, check=True))
    empty = middle_s(lambda: subprocess.run([sys.executable, "-c", ""], check=True))
    return f"muxtune --help: {shown:.2f} s, {shown / empty:.1f} x an empty interpreter (target < 0.6 s)"


def planning() -> Iterator[str]:
    """Planning time of each policy on 32 tasks, as multiples of hf-peft."""
    made = workload(32)
    layout = even_layout(made.model, pp=4)
    state = SystemState(workload=made, cluster=parse_cluster("4xH200"), layout=layout, microbatches=8)
    base = 0.0
    for name in ("hf-peft", "sl-peft", "temporal", "greedy", "muxtune", "muxtune:charge=exact"):
        start_s = time.process_time()
        plan = make_policy(name, Roofline()).plan(state)
        seconds = time.process_time() - start_s
        base = base or seconds
        count = len(plan.instances[0].htasks)
        yield f"plan 32 tasks, 4 stages, {name}: {seconds:.2f} s CPU, {seconds / base:.1f} x hf-peft ({count} hTasks)"


def adapters() -> str:
    """Grouped LoRA of eight tasks against eight separate calls and against one adapter of the same tokens."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 192, generator=generator)
    base = torch.zeros(512, 512)
    weights = [torch.randn(*s, generator=generator) for _ in range(8) for s in ((8, 192), (512, 8))]
    groups = tuple(grouped_lora.Group(start=64 * i, end=64 * (i + 1), scale=2.0) for i in range(8))
    whole = (grouped_lora.Group(start=0, end=512, scale=2.0),)
    grouped = middle_s(lambda: grouped_lora.forward(base, x, groups, weights))
    reference = middle_s(lambda: grouped_lora.reference(base, x, groups, weights))
    single = middle_s(lambda: grouped_lora.forward(base, x, whole, weights[:2]))
    return (
        f"grouped LoRA, 8 tasks x 64 tokens, rank 8, 192 to 512: {grouped / single:.2f} x one task of 512 tokens, "
        f"{reference / grouped:.2f} x faster than the plain reference"
    )


def suite() -> str:
    """The planners' suite on two processes, as `muxtune suite --jobs 2` prints it; a killed bench goes on with it."""
    start_s = time.perf_counter()
    body = command.run(jobs=2, out=Path("out/bench-suite"), options=Options(draws=2))
    return f"suite of {len(body['cases'])} cases: {time.perf_counter() - start_s:.0f} s\n{command.show(body)}"


def main() -> None:
    """Print every figure."""
    born = birth("cpu")
    say(
        f"{born.device}, {born.cores} cores, {born.driver}, revision {born.revision}, "
        f"reference GEMM {reference_ns() / 1e3:.0f} us"
    )
    say(help_time())
    for line in planning():
        say(line)
    for line in simulating(workload(8)):
        say(line)
    for line in bench_planners.lines():
        say(line)
    for line in bench_online.lines():
        say(line)
    for line in bench_search.lines():
        say(line)
    for line in bench_cluster.lines():
        say(line)
    for line in bench_traces.lines():
        say(line)
    say(adapters())
    for line in bench_training.lines():
        say(line)
    say(suite())


if __name__ == "__main__":
    main()
