"""The smallest cluster that reaches a goal such as p95_jct<2h: nodes are doubled, then halved between (the goal is monotone)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from muxtune.experiments.replay_cell import Cell
from muxtune.spec.errors import InputError, NoAnswerError
from muxtune.spec.noun import noun

UNITS = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0, "%": 0.01}
TIMES = {"jct": "jct_s", "queue": "queue_s", "slowdown": "slowdown", "unfairness": "finish_time_fairness"}
SHARES = ("slo_attainment", "fairness")


@noun
class Goal:
    """A figure that has to be below (or, for shares, above) a limit."""

    text: str
    name: str
    below: bool
    limit: float

    def value(self, body: dict[str, Any]) -> float | None:
        """The figure in a replay's body; None where there is none (no job completed, no deadline)."""
        statistic, _, column = self.name.partition("_")
        found = body[TIMES[column]][statistic] if column in TIMES else body[self.name]
        return None if found is None else float(found)

    def met(self, body: dict[str, Any]) -> bool:
        """Whether a finished replay reaches it with every job completed that was not refused or cancelled."""
        found = self.value(body)
        if found is None or body["running"] or body["waiting"] or body["failed"]:
            return False
        return found < self.limit if self.below else found > self.limit


def parse_goal(text: str) -> Goal:
    """`p95_jct<2h`, `mean_queue<10min`, `p99_slowdown<3`, `slo_attainment>0.95`.

    Raises:
        InputError: something else.
    """
    match = re.fullmatch(r"\s*(\w+)\s*([<>])\s*([0-9.]+)\s*(s|min|h|d|%)?\s*", text)
    known = [f"{s}_{t}<LIMIT" for s in ("mean", "p50", "p95", "p99") for t in TIMES] + [f"{s}>LIMIT" for s in SHARES]
    if match is None or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", match[3]):
        raise InputError(f"--size-for {text!r}: expected such as p95_jct<2h or slo_attainment>0.95")
    name, sign, number, unit = match.groups()
    if f"{name}{sign}LIMIT" not in known:
        raise InputError(f"--size-for {text!r}: known goals are {', '.join(known)} (units s, min, h, d, %)")
    return Goal(text=text, name=name, below=sign == "<", limit=float(number) * UNITS[unit or ""])


def sized(cluster: str, nodes: int) -> str:
    """The cluster's name with so many nodes."""
    match = re.fullmatch(r"(\d+)x(\d+x.+)", cluster)
    return f"{nodes}x{match[2]}" if match else cluster


def most_nodes(cell: Cell) -> int:
    """Nodes of the cell's cluster, which is the largest that is tried.

    Raises:
        InputError: it is not one cluster of the form NODESxGPUSxDEVICE.
    """
    match = re.fullmatch(r"(\d+)x\d+x[A-Za-z].*", cell.clusters[0])
    if len(cell.clusters) != 1 or match is None:
        raise InputError(
            f"--size-for with --cluster {' '.join(cell.clusters)}: give the largest cluster to try as NODESxGPUSxDEVICE, "
            "such as 32x4xA40"
        )
    return int(match[1])


def smallest(
    cell: Cell, goal: Goal, run: Callable[[Cell], dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the body on the smallest cluster that reaches the goal, what was tried).

    Raises:
        NoAnswerError: the whole cluster does not reach it.
    """
    most = most_nodes(cell)
    tried: dict[int, dict[str, Any]] = {}

    def met(nodes: int) -> bool:
        body = tried[nodes] = run(replace(cell, clusters=(sized(cell.clusters[0], nodes),)))
        return goal.met(body)

    low, high = 0, 1
    while high < most and not met(high):
        low, high = high, min(most, 2 * high)
    if high not in tried and not met(high):
        value = goal.value(tried[high])
        raise NoAnswerError(
            f"no: {goal.text} is not reached on the whole {cell.clusters[0]}: {goal.name} is "
            f"{'not known' if value is None else f'{value:,.4g}'}, limit {goal.limit:,.4g}; give a larger --cluster"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle, high)
    rows = [
        {
            "cluster": sized(cell.clusters[0], n),
            "nodes": n,
            "gpus": b["gpus"],
            "value": goal.value(b),
            "met": goal.met(b),
        }
        for n, b in sorted(tried.items())
    ]
    return tried[high], rows
