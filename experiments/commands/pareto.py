"""Pareto: of a case's rows, those that no other beats in both of two objectives (weakly in one, strictly in the other)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from muxtune.experiments.commands.rows import objective_text
from muxtune.experiments.console import table
from muxtune.policies.objectives.base import objectives, require_objective
from muxtune.spec.errors import InputError
from muxtune.spec.plan import Plan

#: What is minimised; None where a cost is not known.
Point = tuple[float, float] | None


def parse_pareto(text: str) -> tuple[str, ...]:
    """`A,B`: two objectives; an empty text is none.

    Raises:
        InputError: not two different ones. UnknownKeyError: no such objective.
    """
    names = tuple(piece.strip() for piece in text.split(",")) if text else ()
    if (names and len(set(names)) != 2) or len(names) > 2:
        raise InputError(f"--pareto {text}: give two different objectives, A,B; known are {', '.join(objectives())}")
    for name in names:
        require_objective(name)
    return names


def dominates(first: Point, second: Point) -> bool:
    """Whether the first is at least as good in both and better in one."""
    if first is None or second is None:
        return False
    return first != second and first[0] <= second[0] and first[1] <= second[1]


def front(points: Sequence[Point]) -> tuple[tuple[bool, int | None], ...]:
    """For each point: whether it is on the front, else the first point of the front that dominates it.

    A point that is not known is neither.
    """
    best = [p is not None and not any(dominates(q, p) for q in points) for p in points]
    found: list[tuple[bool, int | None]] = []
    for point, marked in zip(points, best, strict=True):
        beaten = None
        if point is not None and not marked:
            beaten = next(i for i, q in enumerate(points) if best[i] and dominates(q, point))
        found.append((marked, beaten))
    return tuple(found)


def mark(case: dict[str, Any], plans: Sequence[Plan | None], names: Sequence[str]) -> None:
    """Add `pareto` and `dominated_by` to each row, and `pareto{objectives, front}` to the case; plans are in row order."""
    rows = case["rows"]
    for row, (marked, beaten) in zip(rows, front([_point(p, names) for p in plans]), strict=True):
        row["pareto"] = marked
        row["dominated_by"] = None if beaten is None else rows[beaten]["policy"]
    case["pareto"] = {"objectives": list(names), "front": [r["policy"] for r in rows if r["pareto"]]}


def _point(plan: Plan | None, names: Sequence[str]) -> Point:
    if plan is None or plan.predicted is None:
        return None
    first, second = (require_objective(n).cost(plan.workload, plan.predicted) for n in names)
    return None if first is None or second is None else (first, second)


def pareto_table(case: dict[str, Any]) -> Any:
    """Feasible rows with both values; what is on the front carries a plus, the others name what beats them."""
    names = case["pareto"]["objectives"]
    rows = [r for r in case["rows"] if r["feasible"]]
    cells = [
        [
            r["policy"] + (" +" if r["pareto"] else ""),
            *(objective_text(n, r["objectives"][n]) for n in names),
            "" if r["pareto"] else r["dominated_by"] or "not known",
        ]
        for r in rows
    ]
    return table(["trade-offs", *names, "dominated by"], cells)
