"""Laws of the cluster engine: conservation under random failures, queues against closed forms, SRTF, equal shares, the cache."""

from __future__ import annotations

import random
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.sim.cluster.engine import Replay
from muxtune.sim.cluster.figures import figures
from muxtune.sim.cluster.random_faults import FaultRates, random_faults
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.fleet import FleetCosts
from muxtune.spec.noun import canonical_bytes
from tests.fleets import S, by_count, job, poisson, replayed, trace_of

POLICIES = (
    *("fcfs", "srtf", "priority", "multiplexing-aware", "slo-aware", "budget:gpu_hours=0.01", "energy-aware:idle_s=5"),
    *("fcfs:grow=true", "las:first_s=10,round_s=20", "max-min-fairness:round_s=15"),
)


def random_case(seed: int, **more: Any) -> tuple[list[Any], dict[str, Any]]:
    """Jobs of two tenants and two backbones on two pools, with failures, stragglers and cancellations."""
    chance = random.Random(seed)
    now_ns, jobs = 0, []
    for index in range(chance.randrange(5, 50)):
        now_ns += chance.randrange(0, 20) * S
        cancel_ns = now_ns + chance.randrange(0, 200) * S if chance.random() < 0.2 else None
        deadline_ns = now_ns + chance.randrange(10, 300) * S if chance.random() < 0.5 else None
        jobs.append(
            job(
                index,
                now_ns,
                chance.randrange(1, 30_000),
                model=chance.choice(["gpt2", "llama2-7b"]),
                tenant=chance.choice("ab"),
                weight=chance.choice([1.0, 2.0]),
                global_batch_samples=chance.choice([4, 8, 16, 48]),
                cancel_ns=cancel_ns,
                deadline_ns=deadline_ns,
            )
        )
    names = "2x2xA40 3xH100"
    rates = FaultRates(
        gpu_mtbf_h=chance.choice([0.1, 0.5]),
        node_mtbf_h=chance.choice([0, 0.2]),
        repair_h=0.01,
        straggler_mtbf_h=0.2,
        straggler_h=0.02,
    )
    costs = FleetCosts(checkpoint_ns=chance.choice([1, 10, 600]) * S, replan_ns=chance.randrange(0, S))
    setup = {
        "cluster": names,
        "pp": 2,
        "tasks_per_instance": chance.choice([1, 3, 8]),
        "costs": costs,
        "faults": random_faults([parse_cluster(n) for n in names.split()], rates, seed),
        "until_ns": None if chance.random() < 0.7 else 100 * S,
        "max_restarts": chance.choice([None, 1]),
        **more,
    }
    return jobs, setup


def tokens_under_way(replay: Replay) -> int:
    """Billed tokens of the steps that jobs still in the system have done."""
    done = 0
    for member in replay.present.values():
        runs = member.instance
        inside = runs is not None and member.index in runs.members
        left = member.done_at - runs.count if inside else member.left
        done += (member.steps - left) * member.tokens
    return done


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
def test_nothing_is_lost_or_counted_twice(policy: str, seed: int) -> None:
    """Over all policies this is more than 100 random failure schedules."""
    jobs, setup = random_case(seed)
    replay = replayed(trace_of(jobs), policy, by_count(S // 1000, S // 2000, most_samples=40), **setup)
    tally, books = replay.tally, replay.fleet.books
    assert sum(tally.ends.values()) + len(replay.present) == tally.jobs
    if replay.setup.until_ns is None:
        assert tally.jobs == len(jobs)
        assert not replay.present
    assert sum(books.gpu_ns.values()) == replay.fleet.capacity * replay.env.now
    assert books.tokens == tally.asked_tokens + tally.partial_tokens + tokens_under_way(replay)


@pytest.mark.parametrize("policy", ["fcfs", "srtf", "max-min-fairness:round_s=15"])
def test_cached_and_uncached_replays_are_equal(policy: str) -> None:
    for seed in range(4):
        told = []
        for cached in (True, False):
            jobs, setup = random_case(seed, cached=cached)
            replay = replayed(trace_of(jobs), policy, by_count(S // 1000, S // 2000, most_samples=40), **setup)
            body = figures(replay)
            planned = body.pop("prices")["planned"]
            told.append((planned, canonical_bytes(body)))
        assert told[0][1] == told[1][1]
        assert told[0][0] < told[1][0]


def exponential(mean: float) -> Any:
    return lambda chance: chance.expovariate(1 / mean)


def two_point(chance: random.Random) -> float:
    """0.5 or 2.5 seconds, four to one: mean 0.9, second moment 1.45."""
    return 0.5 if chance.random() < 0.8 else 2.5


def test_mm1_queue() -> None:
    """Load 0.5: mean time in the system is 1 / (μ − λ) = 2."""
    replay = replayed(poisson(400_000, 0.5, exponential(1.0)), pricer=by_count(S // 1000))
    assert statistics.fmean(replay.tally.jct_ns) / S == pytest.approx(2.0, rel=0.02)


def test_mg1_queue() -> None:
    """Pollaczek-Khinchine: W = λ E[S²] / (2 (1 − ρ)) + E[S], here ρ = 0.5."""
    rate = 0.5 / 0.9
    replay = replayed(poisson(400_000, rate, two_point), pricer=by_count(S // 1000))
    expected = rate * 1.45 / (2 * 0.5) + 0.9
    assert statistics.fmean(replay.tally.jct_ns) / S == pytest.approx(expected, rel=0.02)


def test_srtf_is_never_worse_than_fcfs() -> None:
    """Mean JCT on one server with free preemption, 50 random traces."""
    better = 0
    for seed in range(50):
        trace = poisson(60, 0.9, exponential(1.0), seed)
        fcfs, srtf = (replayed(trace, p, by_count(S // 1000)).tally.jct_ns for p in ("fcfs", "srtf"))
        assert sum(srtf) <= sum(fcfs)
        better += sum(srtf) < sum(fcfs)
    assert better > 40


def test_equal_tenants_have_equal_shares() -> None:
    """Three tenants with more work than the cluster can do: all the first is ahead is what it had before the first round."""
    jobs = [job(i, 0, 100_000, tenant="abc"[i // 100]) for i in range(300)]
    replay = replayed(trace_of(jobs), "max-min-fairness", by_count(S), cluster="6xA40", until_ns=50_000 * S)
    fleet = replay.fleet
    had: dict[str, int] = {}
    for member in replay.present.values():
        had[member.tenant] = had.get(member.tenant, 0) + fleet.attained_ns(member)
    assert [fleet.running(t) for t in "abc"] == [2, 2, 2]
    assert max(had.values()) - min(had.values()) <= 6 * 360 * S < 0.03 * min(had.values())


def test_the_first_tenant_gives_places_back() -> None:
    """A tenant that came first has all places until another comes; then both have half."""
    jobs = [job(i, 0, 10_000_000, tenant="a") for i in range(8)]
    jobs += [job(8 + i, 1000 * S, 10_000_000, tenant="b") for i in range(8)]
    replay = replayed(trace_of(jobs), "max-min-fairness:round_s=100", by_count(S), cluster="4xA40", until_ns=5000 * S)
    assert [replay.fleet.running(t) for t in "ab"] == [2, 2]
    assert replay.preemptions == 2
