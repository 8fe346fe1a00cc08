"""Layout and shape search, the same for every policy: tp × pp × dp × C, pruned by shape and memory, judged by `evaluate`.

A policy that chooses layouts itself is handed all of them; any other is planned once for each, and the plan that the goal
ranks first (least iteration time, unless the state says otherwise) is kept; ties: fewer devices, then the earlier choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from muxtune.policies.base import Policy, SystemState, require_evaluate
from muxtune.policies.build import stage_contexts
from muxtune.spec.cluster import Cluster
from muxtune.spec.errors import InfeasibleError, NoAnswerError
from muxtune.spec.layout import Layout, LayoutChoice, Recompute, even_layout
from muxtune.spec.noun import noun
from muxtune.spec.plan import LayoutSearch, Plan
from muxtune.spec.task import Workload
from muxtune.spec.tensors import backbone_bytes
from muxtune.spec.units import format_bytes


@noun
class Choices:
    """Layouts worth planning for, how many were left out and why, and a sentence on the one that was closest to fit."""

    kept: tuple[LayoutChoice, ...]
    pruned_shape: int
    pruned_memory: int
    closest: str = ""


def microbatch_counts(workload: Workload) -> tuple[int, ...]:
    """C = 1, 2, 4, … up to the largest global batch: what `auto` tries."""
    largest = max(t.global_batch_samples for t in workload.tasks)
    return tuple(1 << k for k in range(largest.bit_length()))


def layout_choices(
    workload: Workload,
    cluster: Cluster,
    microbatches: Sequence[int],
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
) -> Choices:
    """Every layout on a number of devices that divides the cluster, tensor parallelism inside a node (MuxTune §5.1).

    With `sequence_parallel` each layout of tp > 1 comes with and without it. The backbone alone is what memory is pruned
    by, because no policy can do with less.
    """
    kept: list[LayoutChoice] = []
    pruned_shape, too_big = 0, []
    for layout in _layouts(workload, cluster, sequence_parallel, recompute):
        if layout is None:
            pruned_shape += len(microbatches)
            continue
        short_bytes, sentence = _backbone_shortage(workload, cluster, layout)
        for count in microbatches:
            if count < layout.dp:
                pruned_shape += 1
            elif short_bytes > 0:
                too_big.append((short_bytes, sentence))
            else:
                kept.append(LayoutChoice(layout=layout, microbatches=count))
    closest = min(too_big, key=lambda x: x[0])[1] if too_big else ""
    return Choices(kept=tuple(kept), pruned_shape=pruned_shape, pruned_memory=len(too_big), closest=closest)


def _layouts(
    workload: Workload, cluster: Cluster, sequence_parallel: bool, recompute: Recompute
) -> Iterator[Layout | None]:
    """Layouts in a fixed order; None for one that the model's dimensions rule out."""
    model = workload.model
    for tp, pp, dp in _degrees(cluster):
        divides = all(n % tp == 0 for n in (model.heads, model.kv_heads, model.ffn_hidden, model.vocab))
        largest = max(t.global_batch_samples for t in workload.tasks)
        if not divides or pp > model.layers or dp > largest:
            yield None
            continue
        for cut in (False, True) if sequence_parallel and tp > 1 else (False,):
            layout = even_layout(model, tp=tp, pp=pp, dp=dp, sequence_parallel=cut)
            yield replace(layout, recompute=recompute)


def _degrees(cluster: Cluster) -> Iterator[tuple[int, int, int]]:
    """(tp, pp, dp) whose product divides the number of devices; tp divides every node, so that no group crosses nodes."""
    size = cluster.size
    for ranks in (n for n in range(1, size + 1) if size % n == 0):
        for tp in (n for n in range(1, ranks + 1) if ranks % n == 0):
            if all(node.gpus % tp == 0 for node in cluster.nodes):
                for dp in (n for n in range(1, ranks // tp + 1) if ranks // tp % n == 0):
                    yield tp, ranks // tp // dp, dp


def _backbone_shortage(workload: Workload, cluster: Cluster, layout: Layout) -> tuple[int, str]:
    """(bytes that the fullest rank lacks for the backbone alone, a sentence that says so)."""
    shards = [backbone_bytes(context) for context in stage_contexts(workload, layout)]
    stage = shards.index(max(shards))
    sentence = (
        f"rank {stage * layout.tp} needs {format_bytes(shards[stage])} for the backbone alone ({layout.name}), "
        f"{cluster.device.name} has {format_bytes(cluster.device.memory_bytes)}"
    )
    return shards[stage] - cluster.device.memory_bytes, sentence


def require_choices(key: str, choices: Choices) -> tuple[LayoutChoice, ...]:
    """The kept choices.

    Raises:
        InfeasibleError: there is none; names the layout that comes closest.
    """
    if not choices.kept:
        reason = choices.closest or "no degree divides the model's dimensions"
        raise InfeasibleError(f"policy {key}: no layout fits: {reason}")
    return choices.kept


def plan_over(policy: Policy, key: str, state: SystemState, choices: Choices) -> Plan:
    """The best plan of a policy over some choices; `made_by.layouts` says what was searched.

    Raises:
        InfeasibleError: no choice gives a plan; names the last choice (the most devices) and its reason.
    """
    kept = require_choices(key, choices)
    if policy.chooses_layout:
        first = replace(state, layout=kept[0].layout, microbatches=kept[0].microbatches, choices=kept)
        plan = policy.plan(first)
        evaluations = plan.made_by.solver.evaluations if plan.made_by.solver else 0
        return _signed(plan, choices, 0, evaluations)
    evaluate = require_evaluate(key, state)
    found: list[tuple[tuple[float, ...], int, int, Plan]] = []
    reason = ""
    for index, choice in enumerate(kept):
        try:
            plan = policy.plan(replace(state, layout=choice.layout, microbatches=choice.microbatches))
            found.append((state.rank(evaluate(plan)), choice.layout.ranks, index, plan))
        except NoAnswerError as error:
            reason = f"{choice.name}: {error}"
    if not found:
        raise InfeasibleError(f"no plan under any of {len(kept)} layouts; {reason}")
    return _signed(min(found, key=lambda x: x[:3])[3], choices, len(kept) - len(found), len(found))


def _signed(plan: Plan, choices: Choices, infeasible: int, evaluations: int) -> Plan:
    searched = LayoutSearch(
        candidates=len(choices.kept),
        infeasible=infeasible,
        pruned_shape=choices.pruned_shape,
        pruned_memory=choices.pruned_memory,
        evaluations=evaluations,
    )
    return replace(plan, made_by=replace(plan.made_by, layouts=searched))
