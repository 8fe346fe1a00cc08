"""appendix-a: the exact schedule that MuxTune's Appendix A calls intractable, as an oracle of buckets and order in tiny cases.

hTasks come from the DP with the exact charge. Every partition of few hTasks into buckets is scheduled by an integer program
(policies/flow_model.py): min makespan on the latencies that the eager template uses, communication between stages left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from muxtune.policies.arrange import ordered
from muxtune.policies.balance import Buckets
from muxtune.policies.base import Policy, SystemState
from muxtune.policies.build import make_plan, require_feasible
from muxtune.policies.flow import Job, Sequences, fits, least_ns, makespan_ns
from muxtune.policies.fusion import exact_partition
from muxtune.policies.solver import SEED, best_order, usual_backend
from muxtune.policies.surrogate import Surrogate
from muxtune.policies.template import Units, eager_order, priced_units, schedule
from muxtune.spec.noun import noun
from muxtune.spec.plan import Action, Plan, SolverRecord, StageOrder

#: Four hTasks have 15 partitions into buckets; of more, only the buckets of Eq. 7 are scheduled.
MOST_HTASKS = 4


@noun
class AppendixAConfig:
    """`units` are micro-batches of buckets that an integer program still schedules, `nodes` its branch-and-bound limit."""

    units: int = 6
    nodes: int = 2000

    def __post_init__(self) -> None:
        for field in ("units", "nodes"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")


@noun
class _Found:
    """A schedule and what is proven: no schedule of these buckets is shorter than `bound_ns`."""

    value_ns: int
    bound_ns: int
    buckets: Buckets
    orders: tuple[StageOrder, ...]
    nodes: int = 0


class AppendixA(Policy):
    """Never worse than the buckets and the eager order of `muxtune:charge=exact`, on their own measure."""

    Config = AppendixAConfig

    def plan(self, state: SystemState) -> Plan:
        """One shared instance, `pad`; beyond the limits the eager order, with a bound that any schedule of its buckets obeys.

        Raises:
            InfeasibleError: a task alone does not fit.
            ExtrapolationError: the cost model does not answer for a task alone.
        """
        surrogate = Surrogate(self.cost, state, "pad")
        surrogate.require_single_tasks()
        groups = exact_partition(surrogate, surrogate.sorted_tasks())
        eager = schedule(surrogate, groups)
        whole = len(groups) <= MOST_HTASKS
        found: list[_Found] = []
        for buckets in (eager.buckets, *(_partitions(len(groups)) if whole else ())):
            units = priced_units(surrogate, groups, buckets)
            if units is not None:
                known_ns = min((f.value_ns for f in found), default=None)
                found.append(self._scheduled(surrogate, buckets, units, known_ns))
        best = min(found, key=lambda f: f.value_ns)
        bound_ns = min(f.bound_ns for f in found)
        proven = bound_ns >= best.value_ns
        scope = "every partition into buckets" if whole else "the buckets of Eq. 7 alone"
        record = SolverRecord(
            name="flow-shop",
            status="optimal" if proven and whole else f"feasible; bound over {scope}",
            bound_ns=min(bound_ns, best.value_ns) if whole else None,
            gap=max(0.0, 1 - bound_ns / best.value_ns) if whole else None,
            value_ns=best.value_ns,
            evaluations=len(found),
            nodes=sum(f.nodes for f in found),
            seed=SEED,
        )
        instance = ordered(surrogate, groups, best.buckets, best.orders)
        return require_feasible(make_plan(self, "appendix-a", state, [instance], record))

    def _scheduled(self, surrogate: Surrogate, buckets: Buckets, units: Units, known_ns: int | None) -> _Found:
        """The best schedule of some buckets; the eager one where a bound already rules out one shorter than known."""
        replicas, stages = surrogate.state.layout.dp, surrogate.stages
        template = eager_order(units, stages, replicas)
        jobs = _jobs(units, stages)
        eager = _Found(value_ns=template.makespan_ns, bound_ns=least_ns(jobs), buckets=buckets, orders=template.orders)
        enough_ns = template.makespan_ns if known_ns is None else min(known_ns, template.makespan_ns)
        if replicas > 1 or eager.bound_ns >= enough_ns or len(jobs) > self.config.units:
            bound_ns = 0 if replicas > 1 else eager.bound_ns
            return _Found(value_ns=eager.value_ns, bound_ns=bound_ns, buckets=buckets, orders=eager.orders)
        answer = best_order(jobs, units.budget_bytes, template.makespan_ns, usual_backend(), self.config.nodes)
        bound_ns = max(eager.bound_ns, answer.bound_ns or 0)
        value_ns, orders = eager.value_ns, eager.orders
        if answer.sequences is not None and fits(jobs, answer.sequences, units.budget_bytes):
            exact_ns = makespan_ns(jobs, answer.sequences)
            if exact_ns is not None and exact_ns < value_ns:
                value_ns, orders = exact_ns, _orders(units, answer.sequences)
        return _Found(value_ns=value_ns, bound_ns=bound_ns, buckets=buckets, orders=orders, nodes=answer.nodes)


def _jobs(units: Units, stages: int) -> list[Job]:
    """A job for each unit; those of one bucket that are equal in all share their kind."""
    kinds: dict[tuple[object, ...], int] = {}
    jobs = []
    for key in units.keys:
        forward = tuple(units.latency_ns[s, key, "forward"] for s in range(stages))
        backward = tuple(units.latency_ns[s, key, "backward"] for s in range(stages))
        held = tuple(units.held_bytes[s, key] for s in range(stages))
        kind = kinds.setdefault((forward, backward, held), len(kinds))
        jobs.append(Job(kind=kind, forward_ns=forward, backward_ns=backward, held_bytes=held))
    return jobs


def _orders(units: Units, sequences: Sequences) -> tuple[StageOrder, ...]:
    return tuple(
        StageOrder(
            stage=s,
            actions=tuple(Action(op=way, bucket=units.keys[u][0], unit=units.keys[u][1]) for way, u in sequence),
        )
        for s, sequence in enumerate(sequences)
    )


def _partitions(count: int) -> Iterator[Buckets]:
    """Every partition of so many hTasks into buckets, in a fixed order."""

    def grown(buckets: tuple[tuple[int, ...], ...], item: int) -> Iterator[Buckets]:
        if item == count:
            yield buckets
            return
        for place, bucket in enumerate(buckets):
            yield from grown((*buckets[:place], (*bucket, item), *buckets[place + 1 :]), item + 1)
        yield from grown((*buckets, (item,)), item + 1)

    yield from grown((), 0)
