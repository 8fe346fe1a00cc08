"""The one door of PuLP: set partitioning (linear and integer) and schedules on HiGHS, or on CBC where HiGHS is not there.

min Σ_p c_p·x_p + Σ_j d_j·z_j with Σ_p p_k·x_p = n_k for each type k, x_p > 0 only if z_j = 1 for the level j of p, z falling.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import pulp

from muxtune.policies.columns import Pattern
from muxtune.policies.flow import Job, Sequences
from muxtune.policies.flow_model import FlowModel
from muxtune.spec.noun import noun

Backend = Literal["highs", "cbc"]
SEED = 0
#: A column that is used less than this in a linear optimum is not used.
USED = 1e-6
#: A schedule is this many units of time long, so that the solver's tolerances stay far below one.
GRAINS = 100_000


@noun
class Levels:
    """Steps d_j that are paid up to the highest level in use; `of` is each column's level, 0 for none."""

    steps: tuple[int, ...] = ()
    of: tuple[int, ...] = ()


@noun
class Answer:
    """What a solver returned.

    `proven`: `counts` (how often each column is used) is an optimum. Otherwise it is the best that was found within the
    limits, or empty. `bound` is below every solution of these columns; None if the solver tells none.
    """

    proven: bool
    counts: tuple[int, ...]
    bound: int | None
    nodes: int


@cache
def usual_backend() -> Backend:
    """HiGHS if it solves a first model here, otherwise CBC."""
    try:
        _start_highs()
    except Exception:
        return "cbc"
    return "highs"


@cache
def _start_highs() -> None:
    """HiGHS prints its name when it first runs in a process, whatever it is told: to nowhere."""
    problem, _ = _model([1], [(1,)], (1,), Levels(), integer=False)
    with _no_standard_output():
        problem.solve(_highs({}))


@noun
class Linear:
    """The linear optimum: prices of the types, rounded down, and (column, how often) of those in use."""

    prices: tuple[int, ...]
    used: tuple[tuple[int, float], ...]


def linear_partition(costs: Sequence[int], patterns: Sequence[Pattern], counts: Pattern, backend: Backend) -> Linear:
    """Each column as often as pays, in fractions; the columns must be able to cover the counts."""
    problem, columns = _model(costs, patterns, counts, Levels(), integer=False)
    problem.solve(_solver(backend, {}))
    return Linear(
        prices=tuple(math.floor(c.pi) for c in problem.constraints()[: len(counts)]),
        used=tuple((i, x.varValue) for i, x in enumerate(columns) if x.varValue > USED),
    )


def best_partition(
    costs: Sequence[int],
    patterns: Sequence[Pattern],
    counts: Pattern,
    levels: Levels,
    backend: Backend,
    most_nodes: int,
    seconds: float | None = None,
) -> Answer:
    """The integer optimum; a wall-clock limit makes the answer depend on the machine's speed."""
    problem, columns = _model(costs, patterns, counts, levels, integer=True)
    _run(problem, _solver(backend, {"nodes": most_nodes, "seconds": seconds}))
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Answer(proven=False, counts=(), bound=None, nodes=0)
    used = tuple(round(x.varValue or 0) for x in columns)
    covers = all(sum(p[k] * n for p, n in zip(patterns, used, strict=True)) == count for k, count in enumerate(counts))
    proven = problem.sol_status == pulp.LpSolutionOptimal and covers
    bound, nodes = _told(problem) if backend == "highs" else (None, 0)
    return Answer(proven=proven, counts=used if covers else (), bound=bound, nodes=nodes)


@noun
class Order:
    """What a solver found of a flow problem: `sequences` within the limits (None: nothing), and a bound on every schedule."""

    sequences: Sequences | None
    bound_ns: int | None
    nodes: int


def best_order(
    jobs: Sequence[Job], budget_bytes: Sequence[int], most_ns: int, backend: Backend, most_nodes: int
) -> Order:
    """The shortest schedule of at most `most_ns`; times are counted in a GRAINS-th of it, or exactly in a divisor of all."""
    shared = math.gcd(*(n for j in jobs for n in (*j.forward_ns, *j.backward_ns)))
    grain_ns = shared if shared * GRAINS >= most_ns else max(1, most_ns // GRAINS)
    model = FlowModel(jobs, budget_bytes, most_ns, grain_ns)
    problem = pulp.LpProblem("flow", pulp.LpMinimize)
    end, *rows = model.rows(
        lambda name, most: problem.add_variable(name, 0, most, pulp.LpContinuous),
        lambda name: problem.add_variable(name, 0, 1, pulp.LpInteger),
    )
    problem += pulp.LpAffineExpression([(end, 1)])
    for row in rows:
        problem += row
    _run(problem, _solver(backend, {"nodes": most_nodes}))
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Order(sequences=None, bound_ns=None, nodes=0)
    bound, nodes = _told(problem) if backend == "highs" else (None, 0)
    if bound is None and problem.sol_status == pulp.LpSolutionOptimal:
        bound = math.ceil(end.varValue - 0.5)
    sequences = model.sequences(lambda x: x if isinstance(x, int) else round(x.varValue))
    return Order(sequences=sequences, bound_ns=None if bound is None else bound * grain_ns, nodes=nodes)


def _model(
    costs: Sequence[int], patterns: Sequence[Pattern], counts: Pattern, levels: Levels, integer: bool
) -> tuple[Any, list[Any]]:
    problem = pulp.LpProblem("partition", pulp.LpMinimize)
    kind = pulp.LpInteger if integer else pulp.LpContinuous
    columns = [
        problem.add_variable(f"x{i}", 0, _most(p, counts) if integer else None, kind) for i, p in enumerate(patterns)
    ]
    steps = [problem.add_variable(f"z{j}", 0, 1, kind) for j in range(len(levels.steps))]
    problem += pulp.LpAffineExpression([*zip(columns, costs, strict=True), *zip(steps, levels.steps, strict=True)])
    for k, count in enumerate(counts):
        row = pulp.LpAffineExpression([(x, p[k]) for x, p in zip(columns, patterns, strict=True) if p[k]])
        problem += (row == count, f"type{k}")
    for j in range(1, len(steps)):
        problem += (steps[j] <= steps[j - 1], f"level{j}")
    for i, level in enumerate(levels.of):
        if level:
            problem += (columns[i] <= _most(patterns[i], counts) * steps[level - 1], f"uses{i}")
    return problem, columns


def _most(pattern: Pattern, counts: Pattern) -> int:
    """How often a pattern can be used at most."""
    return min(count // n for n, count in zip(pattern, counts, strict=True) if n)


def _solver(backend: Backend, limits: dict[str, Any]) -> Any:
    """A solver of one thread and fixed seed. Objectives are integers, so that an absolute gap below 1 proves an optimum."""
    if backend == "highs":
        _start_highs()
        return _highs(limits)
    # PuLP up to 3 brings a CBC of its own; later ones find the system's.
    path = getattr(getattr(pulp, "PULP_CBC_CMD", None), "pulp_cbc_path", None)
    return pulp.COIN_CMD(
        path=path,
        msg=False,
        threads=1,
        gapRel=0,
        gapAbs=0.5,
        timeLimit=limits.get("seconds"),
        maxNodes=limits.get("nodes"),
        options=[f"randomSeed {SEED}"],
    )


def _highs(limits: dict[str, Any]) -> Any:
    # Restarts of the root cost a third of the time here and close no program sooner.
    options: dict[str, Any] = {"random_seed": SEED, "parallel": "off", "mip_allow_restart": False}
    options["mip_feasibility_tolerance"] = 1e-9
    if limits.get("nodes") is not None:
        options["mip_max_nodes"] = limits["nodes"]
    return pulp.HiGHS(msg=False, threads=1, gapRel=0, gapAbs=0.5, timeLimit=limits.get("seconds"), **options)


def _run(problem: Any, solver: Any) -> None:
    """Solve. PuLP 3.3.2 has no name for HiGHS's status at its node limit and raises KeyError after it read the values."""
    try:
        problem.solve(solver)
    except KeyError:
        problem.sol_status = pulp.LpSolutionIntegerFeasible


def _told(problem: Any) -> tuple[int | None, int]:
    """(dual bound rounded up, nodes) of a HiGHS run."""
    told = problem.solverModel.getInfo()
    bound = told.mip_dual_bound
    return (math.ceil(bound - 1e-3) if math.isfinite(bound) else None), max(0, int(told.mip_node_count))


@contextmanager
def _no_standard_output() -> Iterator[None]:
    """What C code writes on file descriptor 1 is dropped."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
