"""ilp: set partitioning over feasible hTasks, min W + Σ_Q 2C·max_s L^s(Q)·x_Q, not restricted to neighbours in any order.

Tasks of one type are interchangeable, so that columns are patterns. Few patterns are listed; under `pad` more are found by
pricing (policies/knapsack.py) with a bound over all of them. Otherwise the columns are those that the DP and greedy merging
price, and nothing is said of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal, get_args

from muxtune.policies.arrange import arrange
from muxtune.policies.base import Evaluate, Policy, SystemState
from muxtune.policies.build import make_plan, require_alignment, require_feasible
from muxtune.policies.columns import Column, Columns, Priced, columns_of, total_ns
from muxtune.policies.fusion import exact_partition, greedy_partition
from muxtune.policies.knapsack import Knapsack
from muxtune.policies.master import Limits, Listed, Master, Pricer
from muxtune.policies.objectives.base import THROUGHPUT
from muxtune.policies.solver import SEED, Backend, usual_backend
from muxtune.policies.surrogate import Surrogate
from muxtune.policies.thresholds import close
from muxtune.spec.align import Alignment
from muxtune.spec.check import check
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan, SolverRecord

LIMITS = Limits()
Solver = Literal["auto", "highs", "cbc"]
#: Patterns that are listed: with pricing, and where there is none.
LISTED, LISTED_ALONE = 512, 8192
#: The DP is asked for up to so many tasks: beyond, pricing its groups takes longer than the rest.
DP_TASKS = 64


@noun
class IlpConfig:
    """Alignment, chunk size and `orchestration` as for `muxtune`, from which it differs in fusion alone.

    `solver`: HiGHS where it is there, otherwise CBC; or one of them. `nodes`, `columns` and `steps` limit the proof (see
    `Limits`); `seconds` is a wall-clock limit, with which the plan depends on the machine.
    """

    alignment: Alignment = "pad"
    chunk: int = 0
    orchestration: bool = True
    solver: Solver = "auto"
    nodes: int = LIMITS.nodes
    columns: int = LIMITS.columns
    steps: int = LIMITS.steps
    seconds: float | None = None

    def __post_init__(self) -> None:
        require_alignment(self.alignment, self.chunk)
        if self.solver not in get_args(Solver):
            raise ValueError(f"solver={self.solver!r}: known are {list(get_args(Solver))}")
        for field in ("nodes", "columns", "steps"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.seconds is not None and self.seconds <= 0:
            raise ValueError(f"seconds={self.seconds}: must be above 0")

    @property
    def backend(self) -> Backend:
        """The solver that is asked."""
        return usual_backend() if self.solver == "auto" else self.solver

    @property
    def limits(self) -> Limits:
        """When to give up a proof."""
        return Limits(nodes=self.nodes, columns=self.columns, steps=self.steps, seconds=self.seconds)


class Ilp(Policy):
    """The best partition that column generation and branch and bound find, and what they prove of it."""

    Config = IlpConfig

    def plan(self, state: SystemState) -> Plan:
        """One shared instance, arranged as `muxtune` does; the record says what was proven.

        Raises:
            InfeasibleError: a task alone does not fit, or (orchestration off) the units in flight do not.
            ExtrapolationError: the cost model does not answer for a task alone.
        """
        surrogate = Surrogate(self.cost, state, self.config.alignment, self.config.chunk)
        surrogate.require_single_tasks()
        columns = columns_of(surrogate)
        starts = starting_partitions(columns)
        master, bound_ns = solve(columns, surrogate, starts, self.config.backend, self.config.limits)
        record = SolverRecord(
            name=f"set-partitioning/{master.backend}",
            status="optimal" if bound_ns == master.value_ns else "feasible",
            bound_ns=bound_ns,
            gap=None if bound_ns is None else (master.value_ns - bound_ns) / master.value_ns,
            value_ns=master.value_ns,
            evaluations=surrogate.priced,
            deterministic=self.config.seconds is None,
            nodes=master.nodes,
            columns=len(columns.found),
            seed=SEED,
            dp_value_ns=total_ns(starts["dp"]) if "dp" in starts else None,
            greedy_value_ns=total_ns(starts["greedy"]),
        )
        plan = require_feasible(self._plan(surrogate, columns, master.best, record))
        if state.evaluate is None:
            return plan
        others = [(total_ns(p), self._plan(surrogate, columns, p, record)) for n, p in starts.items() if n != "alone"]
        return _judged(state, state.evaluate, plan, others)

    def _plan(self, surrogate: Surrogate, columns: Columns, partition: Sequence[Column], record: SolverRecord) -> Plan:
        instance, gap = arrange(surrogate, columns.groups(partition), orchestration=self.config.orchestration)
        return make_plan(self, "ilp", surrogate.state, [instance], replace(record, balance_gap=gap))


def _judged(state: SystemState, evaluate: Evaluate, plan: Plan, others: Sequence[tuple[int, Plan]]) -> Plan:
    """The plan with its simulated value and the inversions among it and others, which are (value, plan).

    Where the state asks for more than throughput, the one that its goal ranks first takes the plan's place.
    """
    record = plan.made_by.solver
    assert record is not None
    assert record.value_ns is not None
    executable = [(value_ns, other) for value_ns, other in others if not check(other)]
    simulated = [(value_ns, evaluate(x), x) for value_ns, x in ((record.value_ns, plan), *executable)]
    pairs = combinations([(value_ns, found.iteration_ns) for value_ns, found, _ in simulated], 2)
    inversions = sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs)
    value_ns, found, best = simulated[0] if state.goal == THROUGHPUT else min(simulated, key=lambda x: state.rank(x[1]))
    record = best.made_by.solver or record
    bound_ns = record.bound_ns
    record = replace(
        record,
        status="optimal" if bound_ns == value_ns else "feasible",
        gap=None if bound_ns is None else (value_ns - bound_ns) / value_ns,
        value_ns=value_ns,
        simulated_ns=found.iteration_ns,
        inversions=inversions,
    )
    return replace(best, made_by=replace(best.made_by, solver=record))


def starting_partitions(columns: Columns) -> dict[str, tuple[Column, ...]]:
    """What is known before: every task alone, greedy merging, and the DP with the exact charge where it is asked."""
    order, priced = tuple(columns.type_of), Priced(columns)
    found = {"alone": tuple((t,) for t in order), "greedy": greedy_partition(priced, order)}
    if len(order) <= DP_TASKS:
        found["dp"] = exact_partition(priced, order)
    return {name: columns.of(groups) for name, groups in found.items()}


def solve(
    columns: Columns,
    surrogate: Surrogate,
    starts: dict[str, tuple[Column, ...]],
    backend: Backend,
    limits: Limits,
) -> tuple[Master, int | None]:
    """The solved problem and a bound over all columns, equal to its value if that is proven; None if nothing is known."""
    whole = columns.patterns <= (LISTED if surrogate.alignment == "pad" else LISTED_ALONE)
    pricer: Pricer
    if whole:
        pricer = Listed(columns.every())
    elif surrogate.alignment == "pad":
        pricer = Knapsack(columns, surrogate)
    else:
        pricer = Listed([c for c in columns.found.values() if c is not None])
    master = Master(columns, pricer, backend, limits, starts.values())
    bound_ns = close(master)
    return master, bound_ns if whole or isinstance(pricer, Knapsack) else None
