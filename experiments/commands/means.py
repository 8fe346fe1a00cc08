"""Geometric means of speed-ups over cases: iteration time of a baseline over that of a policy, where both have a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from muxtune.experiments.console import table

BASELINES = ("hf-peft", "nemo", "sl-peft", "muxtune")


def geometric_means(cases: Sequence[dict[str, Any]], policies: Sequence[str]) -> list[dict[str, Any]]:
    """For each policy, against each baseline that was compared: {speedup, cases}; speedup is None without a common case."""
    times = [{r["policy"]: r["iteration_ns"] for r in case["rows"] if r["feasible"]} for case in cases]
    baselines = [b for b in BASELINES if b in policies]
    return [{"policy": p, "against": {b: _mean(times, b, p) for b in baselines}} for p in policies]


def _mean(times: Sequence[dict[str, int]], baseline: str, policy: str) -> dict[str, Any]:
    logs = [math.log(t[baseline] / t[policy]) for t in times if baseline in t and policy in t]
    return {"speedup": math.exp(math.fsum(logs) / len(logs)) if logs else None, "cases": len(logs)}


def means_table(means: Sequence[dict[str, Any]], cases: int) -> Any:
    """Policies by baselines; where a mean is over fewer than all cases, their number stands with it."""
    baselines = list(means[0]["against"]) if means else []
    rows = [[m["policy"], *(_cell(m["against"][b], cases) for b in baselines)] for m in means]
    return table(["policy", *(f"vs {b}" for b in baselines)], rows)


def _cell(mean: dict[str, Any], cases: int) -> str:
    if mean["speedup"] is None:
        return "-"
    return f"{mean['speedup']:.2f}x" + (f" ({mean['cases']}/{cases})" if mean["cases"] < cases else "")
