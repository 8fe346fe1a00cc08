"""What each policy is: how many instances, hTasks and buckets, in which order."""

from __future__ import annotations

from typing import Any

import pytest

from muxtune.policies.base import make_policy
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.bind import bind
from muxtune.spec.errors import InfeasibleError


@pytest.fixture
def state(tiny_state: Any) -> Any:
    """Four tasks of 2, 3, 4, 2 samples; billed lengths 64, 128, 256, 64; two stages."""
    return tiny_state(pp=2)


def plan(reference: str, state: Any) -> Any:
    return make_policy(reference, Roofline()).plan(state)


def test_hf_peft_has_one_backbone_a_task(state: Any) -> None:
    found = plan("hf-peft", state)
    assert [i.tasks for i in found.instances] == [("t0",), ("t1",), ("t2",), ("t3",)]
    assert {i.devices for i in found.instances} == {(0, 1)}
    assert {i.order for i in found.instances} == {"1f1b"}
    assert (found.sharing, found.residency) == ("sequence", "resident")


def test_sl_peft_pads_everything_to_the_global_maximum(state: Any) -> None:
    found = plan("sl-peft", state)
    (instance,) = found.instances
    assert [h.tasks for h in instance.htasks] == [("t0", "t1", "t2", "t3")]
    assert len(instance.buckets) == 1
    lengths = {r.length_tokens for w in bind(found, seed=0).program.units for b in w.batches for r in b.rows}
    assert lengths == {256}


def test_temporal_interleaves_microbatches(state: Any) -> None:
    (instance,) = plan("temporal", state).instances
    assert [h.tasks for h in instance.htasks] == [("t0",), ("t1",), ("t2",), ("t3",)]
    assert instance.feed == ((0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (3, 1))
    assert instance.order == "1f1b"


def test_muxtune_sorts_by_tokens_and_freezes_its_order(state: Any) -> None:
    (instance,) = plan("muxtune:fusion=false", state).instances
    # Tokens per micro-batch at C=2: t0 and t3 1·64, t1 2·128, t2 2·256.
    assert [h.tasks for h in instance.htasks] == [("t0",), ("t3",), ("t1",), ("t2",)]
    assert instance.order == "explicit"
    assert [o.stage for o in instance.orders] == [0, 1]


def test_muxtune_without_orchestration(state: Any) -> None:
    (instance,) = plan("muxtune:fusion=false,orchestration=false", state).instances
    assert [b.htasks for b in instance.buckets] == [(0,), (1,), (2,), (3,)]
    assert instance.order == "1f1b"
    assert instance.orders == ()


def test_alignment_reaches_the_htasks(state: Any) -> None:
    for reference in ("muxtune:alignment=varlen", "greedy:alignment=varlen"):
        assert {h.alignment for h in plan(reference, state).instances[0].htasks} == {"varlen"}
    assert {h.alignment for h in plan("muxtune", state).instances[0].htasks} == {"pad"}


def test_greedy_runs_the_largest_bucket_first(state: Any) -> None:
    (instance,) = plan("greedy", state).instances
    tokens = []
    for bucket in instance.buckets:
        (htask,) = bucket.htasks
        members = [state.workload.task(t) for t in instance.htasks[htask].tasks]
        longest = max(t.billed_len_tokens for t in members)
        tokens.append(longest * sum(-(-t.global_batch_samples // 2) for t in members))
    assert tokens == sorted(tokens, reverse=True)


def test_solver_records(state: Any) -> None:
    statuses = {
        r: plan(r, state).made_by.solver.status for r in ("muxtune", "muxtune:charge=exact", "greedy", "random")
    }
    assert statuses == {
        "muxtune": "exact for its recurrence (charge paper)",
        "muxtune:charge=exact": "exact for its recurrence (charge exact)",
        "greedy": "no merge of two hTasks improves",
        "random": "drawn with seed 0",
    }


def test_backbones_side_by_side_run_out_of_memory_first(tiny_state: Any) -> None:
    shared = plan("temporal", tiny_state())
    from_one = tiny_state(memory_bytes=55 * 2**20)
    assert plan("temporal", from_one).instances == shared.instances
    with pytest.raises(InfeasibleError, match="policy hf-peft: rank 0 does not fit: needs"):
        plan("hf-peft", from_one)


def test_a_layout_that_the_cluster_does_not_have(tiny_state: Any) -> None:
    with pytest.raises(InfeasibleError, match="device 2 is not in cluster 2xcpu of 2"):
        plan("muxtune", tiny_state(pp=4, cluster="2xcpu"))
