"""The laws of every cluster policy: each is asked of a reference, and answers with a one-line counterexample or None."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from muxtune.experiments.laws import Law
from muxtune.policies.cluster.base import ClusterPolicy, make_cluster_policy
from muxtune.sim.cluster.engine import Replay
from muxtune.sim.cluster.figures import figures
from muxtune.sim.cluster.prices import Prices, Shelf
from muxtune.sim.cluster.random_faults import FaultRates, random_faults
from muxtune.sim.cluster.setup import Setup
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.errors import InfeasibleError, InputError
from muxtune.spec.estimate import Estimate, formula_estimate
from muxtune.spec.fleet import FleetCosts, InstanceShape, TaskType
from muxtune.spec.jobs import Job, Trace, TraceHeader
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.noun import digest
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.units import NS_PER_S

SECOND = NS_PER_S
MOST_SAMPLES = 40
ELSEWHERE = """
import json, sys
from muxtune.experiments.cluster_laws import outcome
print(json.dumps({name: outcome(name) for name in sys.argv[1:]}))
"""


def price(types: Sequence[TaskType], shape: InstanceShape) -> Estimate:
    """A millisecond and half of one a task; more than 40 samples do not fit; a lower clock is slower in proportion."""
    if sum(t.global_batch_samples for t in types) > MOST_SAMPLES:
        raise InfeasibleError(f"more than {MOST_SAMPLES} samples do not fit")
    tokens = sum(t.step_tokens for t in types)
    reference = shape.slice.device.frequency_mhz[0] if shape.slice.device.frequency_mhz else 1
    scale = reference / (shape.frequency_mhz or reference)
    iteration_ns = round(scale * (SECOND // 1000 + SECOND // 2000 * len(types)))
    return formula_estimate("law", iteration_ns, tokens, energy_j=float(tokens), utilisation=0.5, peak_bytes=(0,))


def law_jobs(count: int) -> list[Job]:
    """Jobs of three tenants and two backbones, with weights, deadlines and cancellations, all by arithmetic."""
    return [
        Job(
            job_id=f"j{i}",
            arrival_ns=i * i % 97 * SECOND // 4 + i * SECOND,
            model=("gpt2", "llama2-7b")[i % 5 == 0],
            peft=LoRA(),
            dataset="sst2",
            billed_len_tokens=64,
            global_batch_samples=(4, 8, 16)[i % 3],
            tenant="abc"[i % 3],
            steps=1 + i * 7919 % 9000,
            weight=(1.0, 2.0)[i % 2],
            deadline_ns=(i * i % 97 + i + 60) * SECOND if i % 3 else None,
            cancel_ns=(i * i % 97 + i + 9) * SECOND if i % 11 == 0 else None,
        )
        for i in range(count)
    ]


def replay_of(reference: str, count: int = 60, faults: bool = True, rules: ClusterPolicy | None = None) -> Replay:
    """A finished replay of the law jobs on two pools."""
    jobs = sorted(law_jobs(count), key=lambda j: j.arrival_ns)
    clusters = (parse_cluster("2x2xA40"), parse_cluster("1x3xH100"))
    rates = FaultRates(gpu_mtbf_h=0.3, repair_h=0.01, straggler_mtbf_h=0.3, straggler_h=0.02)
    setup = Setup(
        clusters=clusters,
        layout_of=lambda model: even_layout(model, pp=2),
        tasks_per_instance=3,
        costs=FleetCosts(replan_ns=SECOND // 10, join_ns=0, leave_ns=0, start_ns=SECOND, checkpoint_ns=10 * SECOND),
        faults=random_faults(clusters, rates, 7) if faults else (),
    )
    about = TraceHeader(name="laws", source="laws")
    shelf = Shelf(price)
    trace = Trace(about=about, open_jobs=lambda: iter(jobs), lengths=embedded_length)
    replay = Replay(trace, rules or make_cluster_policy(reference), setup, Prices(shelf, shelf), timed=False)
    replay.run()
    return replay


def outcome(reference: str) -> str:
    """A digest of everything that a replay says."""
    return digest(figures(replay_of(reference)))


def _ends(reference: str) -> str | None:
    for count in (1, 60):
        replay = replay_of(reference, count)
        ends = sum(replay.tally.ends.values())
        if ends != count or replay.present:
            return f"{count} jobs: {ends} ended, {len(replay.present)} never left: some job is never placed"
    return None


def _conserves(reference: str) -> str | None:
    replay = replay_of(reference)
    books = replay.fleet.books
    if sum(books.gpu_ns.values()) != replay.fleet.capacity * replay.env.now:
        return f"GPU time by kind is {books.gpu_ns}, capacity x time {replay.fleet.capacity * replay.env.now}"
    if books.tokens != replay.tally.asked_tokens + replay.tally.partial_tokens:
        return f"{books.tokens} tokens trained, {replay.tally.asked_tokens} asked for"
    return None


def _pure(reference: str) -> str | None:
    rules = make_cluster_policy(reference)
    first, second = (digest(figures(replay_of(reference, rules=rules))) for _ in range(2))
    return None if first == second else "two replays differ: it keeps state, draws or reads a clock"


def _capped(reference: str) -> str | None:
    """Watched at every change of an instance."""
    worst = 0

    class Watched(type(make_cluster_policy(reference))):  # type: ignore[misc]
        def clock_mhz(self, instance: Any, fleet: Any) -> int:
            nonlocal worst
            worst = max(worst, len(instance.members))
            return int(super().clock_mhz(instance, fleet))

    jobs = sorted(law_jobs(60), key=lambda j: j.arrival_ns)
    shelf = Shelf(price)
    setup = Setup(clusters=(parse_cluster("2x2xA40"),), layout_of=lambda m: even_layout(m, pp=2), tasks_per_instance=2)
    trace = Trace(about=TraceHeader(name="laws", source="laws"), open_jobs=lambda: iter(jobs), lengths=embedded_length)
    rules: Any = Watched(make_cluster_policy(reference).config)
    Replay(trace, rules, setup, Prices(shelf, shelf), timed=False).run()
    return f"{worst} tasks on an instance with room for 2" if worst > 2 else None


def _works(reference: str) -> str | None:
    """A job that comes to an empty cluster starts at once."""
    replay = replay_of(reference, 1, faults=False)
    queue_ns = list(replay.tally.queue_ns)
    most_ns = 3 * SECOND + replay.fleet.served.weights_bytes("llama2-7b")
    if not queue_ns and not replay.tally.ends["rejected"]:
        return "the only job of an empty cluster was not run"
    return f"the only job of an empty cluster waited {queue_ns[0]} ns" if queue_ns and queue_ns[0] > most_ns else None


def outcomes_elsewhere(references: Sequence[str], hash_seed: int) -> dict[str, str]:
    """Digests of the replays in a process with another hash seed.

    Raises:
        InputError: that process failed; its last line says why.
    """
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-c", ELSEWHERE, *references]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode:
        raise InputError(f"another process failed: {(run.stderr.splitlines() or ['no message'])[-1]}")
    found: dict[str, str] = json.loads(run.stdout)
    return found


_law = partial(Law, require=make_cluster_policy)
CLUSTER_LAWS = (
    _law(name="ends", says="every job completes, is refused, cancelled or given up, once", ask=_ends),
    _law(name="conserves", says="GPU time adds up, tokens trained are tokens asked for", ask=_conserves),
    _law(name="pure", says="equal traces give equal replays", ask=_pure),
    _law(name="capped", says="no instance has more tasks than its cap", ask=_capped),
    _law(name="works", says="a job that comes to an empty cluster starts at once", ask=_works),
)
