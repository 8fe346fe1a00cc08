"""Speeds of the cluster engine, part of `make bench`: the cases of the trace-replay targets, CPU seconds, one process."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.trace import Given
from muxtune.experiments.replay_cell import Cell
from muxtune.experiments.replay_run import run_cell
from muxtune.sim.cluster.engine import Replay
from tests.fleets import S, by_count, job, replayed, trace_of

#: Beside the checkout, or beside the folder that holds it.
PHILLY = next(
    (p for root in Path(__file__).parents[2:4] if (p := root / "shared/data/traces/philly_2017.parquet").is_file()),
    Path("shared/data/traces/philly_2017.parquet"),
)
WEEK = Given(source="paper")
HOUR_NS = 3600 * S


def cpu(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of one call, and what it gave."""
    start_s = time.process_time()
    found = call()
    return time.process_time() - start_s, found


def verdict(value: float, target: float) -> str:
    """The target and whether it was met."""
    return f"(target <= {target:g}: {'met' if value <= target else 'MISSED'})"


def jobs_over(count: int, hours: float, gpus: int, load: float, seed: int = 0) -> Any:
    """Poisson arrivals over some hours, exponential work such that so many one-GPU servers have this load."""
    mean_steps = 1000 * load * gpus * hours * 3600 / count

    def opened() -> Iterator[Any]:
        chance = random.Random(seed)
        now_s = 0.0
        for index in range(count):
            now_s += chance.expovariate(count / hours / 3600)
            steps = max(1, round(chance.expovariate(1 / mean_steps)))
            yield job(index, round(now_s * S), steps, tenant="abcd"[index % 4])

    return trace_of(opened, "bench")


def small(count: int, hours: float, gpus: int, policy: str, load: float = 0.9) -> tuple[float, Replay]:
    """A replay on single-GPU servers, one job each, prices by formula: the engine and the policy alone."""
    trace = jobs_over(count, hours, gpus, load)
    return cpu(lambda: replayed(trace, policy, by_count(S // 1000), cluster=f"{gpus}x1xA40"))


def week(
    policy: str, tasks: int, microbatches: int = 8, merge: bool = False, incremental: bool = False
) -> tuple[float, dict[str, Any]]:
    """The paper's week: Poisson arrivals, nine task classes, LLaMA2-7B on 128 A40 in instances of four."""
    cell = Cell(
        given=WEEK,
        clusters=("32x4xA40",),
        policy=policy,
        gpus_per_instance=4,
        microbatches=(microbatches,),
        tasks_per_instance=tasks,
        until_days=7.0,
        merge_types=merge,
        incremental=incremental,
    )
    return cpu(lambda: run_cell(cell))


def philly() -> tuple[float, dict[str, Any]]:
    """Philly on 1,024 GPUs: instances of four, three classes by data set, one global batch."""
    given = Given(source=str(PHILLY), mapping=(("batches", "16"),))
    cell = Cell(given=given, clusters=("128x8xA40",), policy="muxtune", gpus_per_instance=4, microbatches=(8,))
    return cpu(lambda: run_cell(cell))


def philly_alone() -> str:
    """Philly in a process of its own, whose peak memory is its own."""
    code = (
        "import resource; from tests.bench_cluster import philly; s, b = philly(); "
        "print(s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, b['jobs'], b['completed'], "
        "b['simulated_s'] / 86400, b['prices']['planned'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if run.returncode:
        return f"replay philly: failed: {run.stderr.splitlines()[-1]}"
    cpu_s, gib, jobs, done, days, planned = map(float, run.stdout.split())
    return (
        f"replay philly_2017, 1024 GPUs, muxtune under fcfs: {cpu_s:.1f} s CPU {verdict(cpu_s, 300)}, "
        f"{gib:.2f} GiB {verdict(gib, 2)}; {jobs:,.0f} jobs, {done:,.0f} completed in {days:.1f} days, {planned:.0f} plans"
    )


def growth() -> Iterator[str]:
    """Cost of a job and memory as the number of jobs grows at constant load."""
    each_us: dict[int, float] = {}
    for count in (10_000, 100_000, 1_000_000):
        cpu_s, _ = small(count, count / 100, 108, "fcfs", 0.7)
        each_us[count] = 1e6 * cpu_s / count
    rows = ", ".join(f"{n:,}: {us:.0f} us ({us / each_us[10_000]:.2f} x)" for n, us in each_us.items())
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    yield f"  per job at constant load, drawing the trace included (target: flat): {rows}; peak {peak_mib:.0f} MiB"


def lines() -> Iterator[str]:
    """Every target of trace replay."""
    cpu_s, _ = small(96, 17, 108, "fcfs")
    yield f"replay 96 jobs, 17 h, 108 GPUs, fcfs: {cpu_s:.3f} s CPU {verdict(cpu_s, 0.25)}"
    cpu_s, found = small(1000, 270, 36, "max-min-fairness")
    yield (
        f"replay 1,000 jobs, 270 h, 36 GPUs, max-min-fairness in rounds of 360 s: {cpu_s:.2f} s CPU {verdict(cpu_s, 3)}, "
        f"{found.preemptions} preemptions"
    )
    yield from growth()
    for policy, tasks, target in (("hf-peft", 1, 60), ("muxtune", 8, 60)):
        cpu_s, body = week(policy, tasks)
        yield (
            f"replay the paper's week, {policy}, at most {tasks} tasks an instance: {cpu_s:.1f} s CPU {verdict(cpu_s, target)}; "
            f"{body['jobs']:,} jobs, {body['completed']:,} completed in 7 days, {body['prices']['planned']:,} plans; engine "
            f"and policy without plans: {1e6 * _engine_s(body, tasks) / body['jobs']:.0f} us a job"
        )
    yield _sampled("merged types", "merge", 8, 60, merge=True)
    yield _sampled("incremental", "incremental", 32, 120, incremental=True)
    yield philly_alone() if PHILLY.is_file() else f"replay philly_2017: {PHILLY} is not here"


def _sampled(label: str, key: str, tasks: int, target: float, **how: bool) -> str:
    """The week with prices that are not exact; one in a hundred is held against the exact one."""
    cpu_s, body = week("muxtune", tasks, **how)
    prices = body["prices"]
    told = "no plan was sampled"
    if prices[f"{key}_sampled"]:
        told = (
            f"error of iteration time {prices[f'{key}_error']:.2%} mean, {prices[f'{key}_bias']:+.2%} bias, "
            f"{prices[f'{key}_worst']:.2%} worst"
        )
    return (
        f"  the week, {label}, at most {tasks} tasks: {cpu_s:.1f} s CPU {verdict(cpu_s, target)}, "
        f"{prices['planned']:,} plans, {told} ({prices[f'{key}_sampled']} sampled, target <= 2 %)"
    )


def _engine_s(body: dict[str, Any], tasks: int) -> float:
    """CPU seconds of the same number of jobs with prices by formula."""
    trace = jobs_over(body["jobs"], 168, 32, 20.0)
    return cpu(
        lambda: replayed(
            trace,
            "fcfs",
            by_count(S // 1000, S // 2000),
            cluster="32x1xA40",
            tasks_per_instance=tasks,
            until_ns=168 * HOUR_NS,
        )
    )[0]


if __name__ == "__main__":
    for line in lines():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
