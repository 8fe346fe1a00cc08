"""Candidates of the search: what it may change about a plan of one shared instance, and the plan that a candidate stands for."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Literal

from muxtune.policies.base import Policy, SystemState
from muxtune.policies.build import make_instance, make_plan
from muxtune.policies.launches import launch_lists
from muxtune.policies.surrogate import Surrogate
from muxtune.policies.template import eager_template
from muxtune.spec.align import Alignment
from muxtune.spec.layout import LayoutChoice
from muxtune.spec.noun import noun
from muxtune.spec.order import Template, round_robin
from muxtune.spec.plan import Bucket, Instance, MadeBy, Plan

Order = Literal["eager", "1f1b", "round-robin"]
ORDERS: tuple[Order, ...] = ("eager", "1f1b", "round-robin")
HTaskIds = tuple[str, ...]


@noun
class Candidate:
    """hTasks of each bucket (task ids), buckets in the order in which they enter; `order` is how stages run them.

    `chunk_tokens` is the chunk size of alignment `chunk`; 0 is the paper's rule, hTask by hTask.
    Two candidates that only list tasks of an hTask, or hTasks of a bucket, in another order are equal after `canonical`.
    """

    choice: LayoutChoice
    alignment: Alignment
    order: Order
    buckets: tuple[tuple[HTaskIds, ...], ...]
    chunk_tokens: int = 0

    def canonical(self) -> Candidate:
        """Tasks and hTasks sorted, buckets left where they are."""
        buckets = tuple(tuple(sorted(tuple(sorted(h)) for h in bucket)) for bucket in self.buckets)
        return replace(self, buckets=buckets)


def candidate_of(plan: Plan) -> Candidate | None:
    """The candidate that a plan of one shared instance amounts to; None if samples are placed otherwise than evenly."""
    if len(plan.instances) != 1 or plan.instances[0].steps != 1:
        return None
    instance = plan.instances[0]
    alignments = {h.alignment for h in instance.htasks}
    if len(alignments) != 1:
        return None
    buckets = tuple(tuple(instance.htasks[h].tasks for h in b.htasks) for b in instance.buckets)
    order: Order = "eager" if instance.order == "explicit" else "1f1b"
    if instance.feed and instance.feed == round_robin(instance.buckets):
        order = "round-robin"
    choice = LayoutChoice(layout=instance.layout, microbatches=instance.microbatches)
    found = Candidate(choice=choice, alignment=instance.htasks[0].alignment, order=order, buckets=buckets)
    state = SystemState(
        workload=plan.workload, cluster=plan.cluster, layout=choice.layout, microbatches=choice.microbatches
    )
    for chunk_tokens in dict.fromkeys((0, instance.htasks[0].chunk_tokens)):
        cut = replace(found, chunk_tokens=chunk_tokens)
        if _content(_instance(state, cut)) == _content(instance):
            return cut.canonical()
    return None


def _content(instance: Instance) -> object:
    """What an instance computes, whatever its order: hTasks with their chunks, and the samples of each unit."""
    htasks = {(frozenset(h.tasks), h.alignment, h.chunk_tokens) for h in instance.htasks}
    return htasks, [[{(p.task, p.slots) for p in unit.parts} for unit in b.units] for b in instance.buckets]


@noun
class Draft:
    """A candidate that can be built, and its eager template: its makespan is a cheap guess, communication left out."""

    candidate: Candidate
    template: Template


@noun
class Built:
    """A candidate's plan, and the time of its eager template: a cheap guess of the iteration, communication left out."""

    plan: Plan
    makespan_ns: int


class Builder:
    """Turns candidates of one state into plans; latencies and bytes are shared by all of one layout, C and alignment."""

    def __init__(self, policy: Policy, key: str, state: SystemState) -> None:
        self.policy, self.key, self.state = policy, key, state
        self.surrogates: dict[tuple[LayoutChoice, Alignment, int], Surrogate] = {}

    def build(self, candidate: Candidate, template: Template | None = None) -> Built | None:
        """The plan at once; `template` is its eager order, where that is known."""
        draft = self.draft(candidate, template)
        return None if draft is None else Built(plan=self.plan(draft), makespan_ns=draft.template.makespan_ns)

    def draft(self, candidate: Candidate, template: Template | None = None) -> Draft | None:
        """None if a unit alone does not fit, or a shape lies outside what the cost model answers for."""
        surrogate = self.surrogate(self._state(candidate), candidate)
        groups = tuple(h for bucket in candidate.buckets for h in bucket)
        if not all(surrogate.admits(h) for h in groups):
            return None
        template = template or eager_template(surrogate, groups, _numbered(candidate))
        return None if template is None else Draft(candidate=candidate, template=template)

    def plan(self, draft: Draft) -> Plan:
        """The plan that a draft stands for."""
        candidate, surrogate = draft.candidate, self.surrogate(self._state(draft.candidate), draft.candidate)
        instance = _instance(self._state(candidate), candidate)
        if candidate.order == "round-robin":
            instance = replace(instance, feed=round_robin(instance.buckets))
        elif candidate.order == "eager":
            instance = replace(instance, order="explicit", orders=draft.template.orders)
        buckets = tuple(_launched(surrogate, instance, bucket) for bucket in instance.buckets)
        return make_plan(self.policy, self.key, self.state, [replace(instance, buckets=buckets)])

    def signature(self) -> MadeBy:
        """Who made the plans."""
        return make_plan(self.policy, self.key, self.state, []).made_by

    def _state(self, candidate: Candidate) -> SystemState:
        choice = candidate.choice
        return replace(self.state, layout=choice.layout, microbatches=choice.microbatches)

    def surrogate(self, state: SystemState, candidate: Candidate) -> Surrogate:
        """Latencies and bytes under a candidate's layout, C and alignment."""
        key = (candidate.choice, candidate.alignment, candidate.chunk_tokens)
        if key not in self.surrogates:
            self.surrogates[key] = Surrogate(self.policy.cost, state, candidate.alignment, candidate.chunk_tokens)
        return self.surrogates[key]


def _instance(state: SystemState, candidate: Candidate) -> Instance:
    groups = [h for bucket in candidate.buckets for h in bucket]
    return make_instance(state, "shared", groups, _numbered(candidate), candidate.alignment, candidate.chunk_tokens)


def _numbered(candidate: Candidate) -> tuple[tuple[int, ...], ...]:
    """hTasks of each bucket by their place among all."""
    ends = [*accumulate(len(bucket) for bucket in candidate.buckets)]
    return tuple(tuple(range(end - len(b), end)) for b, end in zip(candidate.buckets, ends, strict=True))


def _launched(surrogate: Surrogate, instance: Instance, bucket: Bucket) -> Bucket:
    """The bucket with Algorithm 1's launch lists, where an order inside the clock makes a difference."""
    if len(bucket.htasks) == 1 or not surrogate.overlaps:
        return bucket
    groups = [instance.htasks[h].tasks for h in bucket.htasks]
    return replace(bucket, launches=tuple(launch_lists(surrogate, bucket.htasks, groups)))
