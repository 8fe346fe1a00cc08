"""Small fleets for tests of the cluster engine: prices by formula, traces by hand or by chance."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from muxtune.policies.cluster.base import make_cluster_policy
from muxtune.sim.cluster.engine import Replay
from muxtune.sim.cluster.prices import Prices, Shelf
from muxtune.sim.cluster.setup import Setup
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.errors import InfeasibleError
from muxtune.spec.estimate import Estimate, formula_estimate
from muxtune.spec.fleet import FREE, InstanceShape, Pricer, TaskType
from muxtune.spec.jobs import Job, Trace, TraceHeader
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.peft.lora import LoRA

S = 1_000_000_000
PEFT = LoRA()


def estimate_of(iteration_ns: int, tokens: int) -> Estimate:
    """An Estimate of which the cluster engine reads only time, tokens and energy (100 J an iteration)."""
    return formula_estimate("formula", iteration_ns, tokens, energy_j=100.0, utilisation=0.5, peak_bytes=(0,))


def by_count(fixed_ns: int = S, each_ns: int = 0, most_samples: int | None = None) -> Pricer:
    """fixed + each · tasks an iteration; more samples than `most_samples` do not fit."""

    def price(types: Sequence[TaskType], shape: InstanceShape) -> Estimate:
        if most_samples is not None and sum(t.global_batch_samples for t in types) > most_samples:
            raise InfeasibleError(f"more than {most_samples} samples do not fit")
        return estimate_of(fixed_ns + each_ns * len(types), sum(t.step_tokens for t in types))

    return price


def job(index: int, arrival_ns: int, steps: int, **more: Any) -> Job:
    """A job of `gpt2` on SST-2, eight samples of 64 tokens a step."""
    given = {"model": "gpt2", "global_batch_samples": 8, "billed_len_tokens": 64, **more}
    return Job(
        job_id=f"j{index}",
        arrival_ns=arrival_ns,
        steps=steps,
        peft=PEFT,
        dataset="sst2",
        **given,
    )


def trace_of(jobs: Iterable[Job] | Callable[[], Iterator[Job]], name: str = "hand") -> Trace:
    """A trace of these jobs."""
    opened = jobs if callable(jobs) else (lambda kept=tuple(jobs): iter(kept))
    return Trace(about=TraceHeader(name=name, source="test"), open_jobs=opened, lengths=embedded_length)


def poisson(count: int, rate: float, service: Callable[[random.Random], float], seed: int = 0) -> Trace:
    """Arrivals at `rate` a second; `service` draws a job's steps, of which a thousand take a second alone."""

    def jobs() -> Iterator[Job]:
        chance = random.Random(seed)
        now_s = 0.0
        for index in range(count):
            now_s += chance.expovariate(rate)
            yield job(index, round(now_s * S), max(1, round(1000 * service(chance))))

    return trace_of(jobs, "poisson")


def replayed(trace: Trace, policy: str = "fcfs", pricer: Pricer | None = None, **setup: Any) -> Replay:
    """A finished replay; by default on one GPU, one task an instance, changes free."""
    cluster = setup.pop("cluster", "1xA40")
    pp = setup.pop("pp", 1)
    cached = setup.pop("cached", True)
    solo = setup.pop("solo", None)
    given = {"tasks_per_instance": 1, "costs": FREE, **setup}
    made = Setup(
        clusters=tuple(parse_cluster(name) for name in cluster.split()),
        layout_of=lambda model: even_layout(model, pp=pp),
        **given,
    )
    shelf = Shelf(pricer or by_count())
    prices = Prices(shelf, Shelf(solo) if solo else shelf, cached=cached)
    replay = Replay(trace, make_cluster_policy(policy), made, prices, timed=False)
    replay.run()
    return replay
