"""Figures of a replay, finished or not: times of jobs, use of devices, tenants, curves over time."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from muxtune.sim.cluster.books import KINDS
from muxtune.sim.cluster.engine import Replay
from muxtune.sim.cluster.tally import Tenant
from muxtune.spec.units import NS_PER_S

#: Tenants that a result lists, those with most jobs first.
TENANTS = 50
HOUR_NS = 3600 * NS_PER_S


def figures(replay: Replay, gpu_hour_price: float = 1.0) -> dict[str, Any]:
    """Everything that a result says of one replay, without clocks. Shares of time are of capacity × time."""
    tally, books = replay.tally, replay.fleet.books
    now_ns = max(1, replay.env.now)
    seconds = now_ns / NS_PER_S
    capacity_ns = replay.fleet.capacity * now_ns
    cost = gpu_hour_price * replay.fleet.capacity * now_ns / HOUR_NS
    waiting = sum(map(len, replay.lines.values()))
    energy_j = books.energy_j if replay.fleet.prices.has_energy else None
    return {
        "jobs": tally.jobs,
        "gpus": replay.fleet.capacity,
        **tally.ends,
        "running": tally.jobs - sum(tally.ends.values()) - waiting,
        "waiting": waiting,
        "complete": replay.complete,
        "simulated_s": seconds,
        "makespan_s": tally.last_ns / NS_PER_S,
        "jct_s": _spread(tally.jct_ns),
        "queue_s": _spread(tally.queue_ns),
        "slowdown": _spread(tally.slowdown, 1.0),
        "finish_time_fairness": _spread(tally.unfairness, 1.0),
        "billed_tokens": books.tokens,
        "billed_tokens_per_s": books.tokens / seconds,
        "jobs_per_hour": tally.ends["completed"] / (seconds / 3600),
        "energy_j": energy_j,
        "energy_idle_j": books.idle_joules if energy_j is not None else None,
        "joules_per_billed_token": energy_j / books.tokens if energy_j is not None and books.tokens else None,
        "gpu_hour_price": gpu_hour_price,
        "cost": cost,
        "cost_per_million_billed_tokens": 1e6 * cost / books.tokens if books.tokens else None,
        "slo_attainment": tally.met / tally.deadlines if tally.deadlines else None,
        "deadlines": tally.deadlines,
        "fairness": jain([_speed(t) for t in tally.tenants.values() if t.completed]),
        "gpu_share": {kind: books.gpu_ns[kind] / capacity_ns for kind in KINDS},
        "computing": books.busy_weighted_ns / capacity_ns,
        **_changes(replay),
        "tenants": _tenants(tally.tenants),
        "tenants_listed_of": len(tally.tenants),
        "reasons": dict(sorted(tally.reasons.items(), key=lambda x: (-x[1], x[0]))),
        "series": _series(replay),
    }


def _changes(replay: Replay) -> dict[str, Any]:
    """How often something was changed or went wrong, and what was asked of the planner."""
    tally, prices, faults = replay.tally, replay.fleet.prices, replay.faults
    return {
        "replans": replay.replans,
        "preemptions": replay.preemptions,
        "moves": tally.moves,
        "instance_starts": replay.starts,
        "instance_resizes": replay.resizes,
        "failures": faults.failures,
        "stragglers": faults.stragglers,
        "instances_lost": faults.killed,
        "restarts": tally.restarts,
        "lost_steps": tally.lost_steps,
        "lost_tokens": replay.fleet.books.lost_tokens,
        "events": replay.env.processed,
        "prices": {
            "asked": prices.asked,
            "planned": prices.made,
            "task_types": len(prices.kinds),
            "shapes": len(prices.shapes),
            "relative_error": prices.worst_error,
            "merged": prices.merge is not None,
            **_sampled("merge", prices.errors if prices.quick is None else ()),
            "incremental": prices.quick is not None,
            **_sampled("incremental", prices.errors if prices.quick is not None else ()),
        },
    }


def _sampled(name: str, errors: Sequence[float]) -> dict[str, int | float | None]:
    """How many prices were held against exact ones, and the mean absolute, mean and largest relative error of their times."""
    size = np.abs(np.asarray(errors, dtype=np.float64))
    return {
        f"{name}_sampled": len(errors),
        f"{name}_error": float(size.mean()) if len(errors) else None,
        f"{name}_bias": float(np.mean(errors)) if len(errors) else None,
        f"{name}_worst": float(size.max()) if len(errors) else None,
    }


def _spread(values: Sequence[float] | array[Any], unit: float = NS_PER_S) -> dict[str, float | None]:
    """mean, p50, p95, p99."""
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p95", "p99"))
    column = np.asarray(values, dtype=np.float64) / unit
    p50, p95, p99 = np.percentile(column, (50, 95, 99))
    return {"mean": float(column.mean()), "p50": float(p50), "p95": float(p95), "p99": float(p99)}


def jain(values: Sequence[float]) -> float | None:
    """Jain's index (Σx)² / (n·Σx²): 1 where all are equal, 1/n where one has everything; None without values."""
    squares = sum(x * x for x in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def _speed(tenant: Tenant) -> float:
    """Time its completed jobs would have taken alone over the time they took."""
    return tenant.alone_ns / tenant.jct_ns


def _tenants(tenants: dict[str, Tenant]) -> list[dict[str, Any]]:
    found = sorted(tenants.items(), key=lambda x: (-x[1].jobs, x[0]))[:TENANTS]
    return [
        {
            "tenant": name,
            "jobs": t.jobs,
            "completed": t.completed,
            "jct_s": t.jct_ns / t.completed / NS_PER_S if t.completed else None,
            "queue_s": t.queue_ns / t.completed / NS_PER_S if t.completed else None,
            "slowdown": t.jct_ns / t.alone_ns if t.completed else None,
            "gpu_hours": t.gpu_ns / HOUR_NS,
            "billed_tokens": t.tokens,
            "slo_attainment": t.met / t.deadlines if t.deadlines else None,
        }
        for name, t in found
    ]


def _series(replay: Replay) -> dict[str, Any]:
    """Curves in equal steps of `step_s`: devices that train, jobs, billed tokens per second."""
    series = replay.fleet.books.series
    curves = series.until(max(1, replay.env.now))
    tokens = [x * NS_PER_S for x in curves.pop("billed_tokens")]
    return {"step_s": series.width_ns / NS_PER_S, **curves, "billed_tokens_per_s": tokens}
