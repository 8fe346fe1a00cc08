"""Useful flops: tiny backbones by formula, what is not counted, and that plans do not change them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.policies.base import make_policy, policies
from muxtune.sim.cost.roofline import COMPUTE_FRACTION, Roofline
from muxtune.sim.simulate import estimate
from muxtune.spec.bind import bind
from muxtune.spec.flops import sample_flops, useful_flops
from muxtune.spec.model import model_preset, model_presets
from muxtune.spec.peft.lora import LoRA


def linear_flops(model: Any) -> int:
    """2 · in · out of the four linears of one layer."""
    return sum(2 * i * o for i, o in map(model.linear_shape, ("qkv", "proj", "fc1", "fc2")))


@given(st.sampled_from(sorted(model_presets())), st.integers(1, 64), st.integers(1, 500))
def test_a_sample_by_formula(name: str, rank: int, tokens: int) -> None:
    """Forward and input gradients of every linear but the first qkv, adapters three times but the first dx."""
    model = model_preset(name)
    head = 2 * model.hidden * model.vocab
    first_in, first_out = model.linear_shape("qkv")
    linears = 2 * (model.layers * linear_flops(model) + head) - 2 * first_in * first_out
    shapes = [model.linear_shape(t) for t in ("qkv", "proj", "fc1", "fc2")]
    adapters = 3 * model.layers * sum(2 * rank * (i + o) for i, o in shapes) - 2 * rank * first_in
    # Causal: half of 4 · n² · heads · head_dim forward, twice that backward.
    square = 3 * model.layers * 2 * model.heads * model.head_dim
    found = sample_flops(model, LoRA(rank=rank))
    assert found.of(tokens) == (linears + adapters) * tokens + square * tokens * tokens


def test_nothing_below_the_first_adapter_is_turned() -> None:
    """An adapter on fc2 alone: the first layer's attention has no backward, nor have its qkv, proj and fc1."""
    model = model_preset("tiny-llama")
    every, last = (sample_flops(model, LoRA(rank=4, targets=t)) for t in (("qkv", "fc2"), ("fc2",)))
    attention = 2 * model.heads * model.head_dim
    assert every.per_square - last.per_square == 2 * attention


def test_two_thirds_of_pretraining() -> None:
    """A large backbone without attention: PEFT has 4 flops a parameter and token, pretraining 6."""
    model = model_preset("llama2-70b")
    found = sample_flops(model, LoRA(rank=8)).per_token / (model.parameters - model.vocab * model.hidden)
    assert found == pytest.approx(4, rel=0.02)


def test_plans_do_not_change_useful_flops(tiny_state: Any) -> None:
    state = tiny_state(pp=2, cluster="2xA40")
    seen = set()
    for key in sorted(policies()):
        plan = make_policy(key, Roofline()).plan(state)
        program = bind(plan, seed=3).program
        batches = [b for w in program.units if w.key.step == 0 for b in w.batches]
        raw, billed = (useful_flops(state.workload, batches, tokens) for tokens in ("raw", "billed"))
        assert raw <= billed
        seen.add((raw, billed))
    assert len(seen) == 1


def test_mfu_is_below_what_the_roofline_attains(tiny_state: Any, hand_plan: Any) -> None:
    state = tiny_state(cluster="1xA40")
    found = estimate(hand_plan(state, [["t0", "t1"], ["t2", "t3"]]), Roofline(), seed=0)
    assert found.mfu is not None
    assert 0 < found.mfu <= COMPUTE_FRACTION
