"""Alignment and token counts; Table 2 of the paper."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.policies.base import SystemState, make_policy
from muxtune.spec.align import Batch, Row, aligned_length, count_tokens, spread_slots, truncate
from muxtune.spec.bind import bind
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.draw import Sample, align_sample
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.task import Task, Workload

#: Table 2: data set and batch of tasks #1..#8 (one micro-batch each).
WL_A = ("sst2", "openbookqa", "openbookqa", "sst2", "sst2", "sst2", "openbookqa", "openbookqa")
WL_B = ("rte", "sst2", "rte", "sst2", "sst2", "rte", "rte", "rte")
BATCHES = (4, 2, 4, 4, 8, 2, 4, 4)
BILLED = {"sst2": 64, "openbookqa": 128, "rte": 256}


def test_spread_by_hand() -> None:
    assert spread_slots(5, 3) == ((0, 1), (2, 3), (4,))
    assert spread_slots(2, 4) == ((0,), (1,), (), ())
    assert spread_slots(4, 1) == ((0, 1, 2, 3),)


@given(st.integers(1, 200), st.integers(1, 40))
def test_spread_is_even_and_complete(samples: int, microbatches: int) -> None:
    spread = spread_slots(samples, microbatches)
    sizes = [len(s) for s in spread]
    assert [slot for part in spread for slot in part] == list(range(samples))
    assert len(spread) == microbatches
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_truncation_cuts_the_prompt_from_the_left() -> None:
    assert truncate(50, 10, 64) == (50, 10)
    assert truncate(60, 10, 64) == (54, 10)
    assert truncate(60, 64, 64) == (0, 64)
    assert truncate(5, 100, 64) == (0, 64)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 256))
def test_truncation_keeps_the_response(prompt: int, response: int, billed: int) -> None:
    kept_prompt, kept_response = truncate(prompt, response, billed)
    assert kept_response == min(response, billed)
    assert kept_prompt + kept_response == min(prompt + response, billed)
    assert 0 <= kept_prompt <= prompt


def test_pad_and_varlen_lengths() -> None:
    assert aligned_length("pad", 17, 128) == 128
    assert aligned_length("varlen", 17, 128) == 17


def row(task: str, length: int, raw: int | None = None) -> Row:
    own = length if raw is None else raw
    return Row(task=task, slot=0, sample=0, prompt_tokens=own - 1, response_tokens=1, length_tokens=length)


def test_segments_and_runs_by_hand() -> None:
    batch = Batch(htask=0, rows=(row("a", 8), row("a", 8), row("b", 8), row("b", 4)))
    assert batch.segments() == (("a", 0, 16), ("b", 16, 28))
    assert batch.runs() == ((3, 8), (1, 4))
    assert batch.tokens == 28


def test_three_counts_by_hand() -> None:
    # Two rows of 5 and 7 raw tokens; tasks bill 8 and 16; both are computed at 16.
    batch = Batch(htask=0, rows=(row("a", 16, 5), row("b", 16, 7)))
    assert count_tokens([batch], [("a", 8), ("b", 16)]) == (12, 24, 32)


def test_a_sample_longer_than_billed_is_truncated(tiny_workload: Any) -> None:
    task = tiny_workload(1).tasks[0]
    found = align_sample(task, 3, Sample(sample=9, prompt_tokens=100, response_tokens=4), "varlen", 256)
    assert (found.prompt_tokens, found.response_tokens, found.length_tokens) == (60, 4, 64)
    assert (found.task, found.slot, found.sample) == ("t0", 3, 9)


def table2(datasets: tuple[str, ...], count: int) -> Any:
    """The state with the first `count` tasks of Table 2 and one micro-batch."""
    tasks = tuple(
        Task(
            task_id=f"#{i + 1}",
            peft=LoRA(),
            dataset=name,
            billed_len_tokens=BILLED[name],
            global_batch_samples=BATCHES[i],
        )
        for i, name in enumerate(datasets[:count])
    )
    used = tuple(embedded_length(name) for name in sorted({t.dataset for t in tasks}))
    model = model_preset("tiny-llama")
    return SystemState(
        workload=Workload(name="table 2", model=model, datasets=used, tasks=tasks),
        cluster=parse_cluster("cpu"),
        layout=even_layout(model),
        microbatches=1,
    )


@pytest.mark.parametrize(
    ("datasets", "count", "effective", "zero_padded"),
    [
        (WL_A, 4, 1280, 1792),
        (WL_A, 5, 1792, 2816),
        (WL_A, 6, 1920, 3072),
        (WL_A, 8, 2944, 4096),
        (WL_B, 4, 2432, 3584),
        (WL_B, 5, 2944, 5632),
        (WL_B, 6, 3456, 6144),
        (WL_B, 8, 5504, 8192),
    ],
)
def test_table_2(datasets: tuple[str, ...], count: int, effective: int, zero_padded: int, fake_cost: Any) -> None:
    state = table2(datasets, count)
    billed_len = [(t.task_id, t.billed_len_tokens) for t in state.workload.tasks]
    for policy, processed in (("sl-peft", zero_padded), ("temporal", effective)):
        plan = make_policy(policy, fake_cost()).plan(state)
        batches = [b for w in bind(plan, seed=0).program.units for b in w.batches]
        raw, billed, computed = count_tokens(batches, billed_len)
        assert (billed, computed) == (effective, processed)
        assert raw < billed


@given(seed=st.integers(0, 50), alignment=st.sampled_from(["pad", "varlen"]))
def test_counts_are_ordered(seed: int, alignment: Any, tiny_state: Any, hand_plan: Any) -> None:
    """raw ≤ billed ≤ processed under pad; processed = raw under varlen."""
    state = tiny_state()
    plan = hand_plan(state, [["t0", "t1"], ["t2", "t3"]], None, alignment)
    batches = [b for w in bind(plan, seed=seed).program.units for b in w.batches]
    raw, billed, processed = count_tokens(batches, [(t.task_id, t.billed_len_tokens) for t in state.workload.tasks])
    assert raw <= billed
    assert processed == raw if alignment == "varlen" else processed >= billed
