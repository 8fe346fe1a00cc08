"""Means over seeds with 95 % confidence intervals: mean ± t(0.975, n − 1) · s / √n."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

#: What is averaged, as paths into a body.
FIGURES = (
    *("billed_tokens_per_s", "jct_s.mean", "jct_s.p95", "queue_s.mean", "slowdown.mean", "slo_attainment", "fairness"),
    *("energy_j", "cost_per_million_billed_tokens", "replans", "lost_steps", "gpu_share.busy"),
)
#: What a group of seeds has in common.
GROUP = ("trace", "cluster", "policy", "cluster_policy")


def pick(body: dict[str, Any], path: str) -> Any:
    """The value at `a.b` of a body."""
    for name in path.split("."):
        body = body[name]
    return body


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """n, mean, and the half width of the interval (None for one value)."""
    count, mean = len(values), statistics.fmean(values)
    if count < 2:
        return {"n": count, "mean": mean, "half_width": None}
    from scipy.stats import t

    return {
        "n": count,
        "mean": mean,
        "half_width": float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / count**0.5,
    }


def means(bodies: Sequence[dict[str, Any]], group: Sequence[str] = GROUP) -> list[dict[str, Any]]:
    """One row a group of complete bodies that differ in their seed only, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for body in bodies:
        if body["complete"]:
            groups.setdefault(tuple(body[name] for name in group), []).append(body)
    rows: list[dict[str, Any]] = []
    for names, members in groups.items():
        row: dict[str, Any] = dict(zip(group, names, strict=True)) | {"seeds": [b["seed"] for b in members]}
        for path in FIGURES:
            values = [v for b in members if (v := pick(b, path)) is not None]
            row[path] = interval(values) if values else None
        rows.append(row)
    return rows
