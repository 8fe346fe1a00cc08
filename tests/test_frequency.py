"""Frequency steps: the scaling by hand, its laws, and a whole plan at another clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.experiments.commands.frequencies import frequency_rows, parse_frequencies
from muxtune.sim.cost._frequency import AtFrequency
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import estimate
from muxtune.spec import ops
from muxtune.spec.cluster import device_presets
from muxtune.spec.errors import InputError
from muxtune.spec.frequency import FrequencyStep, frequency_step

A40 = device_presets()["A40"]
RATIO = 1305 / 1740


def test_time_and_power_by_hand() -> None:
    step = FrequencyStep(mhz=1000, reference_mhz=2000)
    assert step.time_scale(compute=8, memory=2) == 2.0
    assert step.time_scale(compute=1, memory=2) == 1.0
    assert step.time_scale(compute=3, memory=4) == 1.5  # memory-bound before, compute-bound after
    assert step.time_scale(compute=0, memory=0) == 1.0
    assert step.power_scale == 0.25
    assert replace(step, exponent=3.0).power_scale == 0.125


WORK = st.floats(0.001, 1000)


@given(st.integers(1, 3000), st.integers(1, 3000), WORK, WORK)
def test_a_slower_clock_is_never_faster_and_never_draws_more(
    low: int, high: int, compute: float, memory: float
) -> None:
    low, high = min(low, high), max(low, high)
    step = FrequencyStep(mhz=low, reference_mhz=high)
    assert 1 <= step.time_scale(compute, memory) <= 1 / step.ratio * (1 + 1e-12)
    assert step.power_scale <= 1


def test_the_reference_clock_changes_nothing() -> None:
    same = AtFrequency(Roofline(), frequency_step(A40, 1740))
    op = ops.linear(512, (4096, 4096), False, "forward", "bf16", 2)
    assert same.latency(op, A40) == Roofline().latency(op, A40)
    assert same.model_id == "roofline"


def test_an_operator_at_another_clock() -> None:
    slow = AtFrequency(Roofline(), frequency_step(A40, 1305))
    dense = ops.linear(4096, (4096, 4096), False, "forward", "bf16", 2)
    thin = ops.pointwise("rmsnorm", 4096, (4096,), 2, 4, "forward", "bf16", 2)
    for op, scale in ((dense, 1 / RATIO), (thin, 1.0)):
        before, after = Roofline().latency(op, A40), slow.latency(op, A40)
        assert after.p50_ns == round(before.p50_ns * scale)
        assert after.joules == pytest.approx(before.joules * RATIO**2 * scale)
        assert after.host_ns == before.host_ns
    launch = ops.host("launch")
    assert slow.latency(launch, A40) == Roofline().latency(launch, A40)
    assert (slow.model_id, slow.calibrated) == ("roofline@1305MHz", False)


def test_a_plan_at_every_step(tiny_state: Any, hand_plan: Any) -> None:
    state = tiny_state(cluster="2xA40", pp=2)
    plan = hand_plan(state, [["t0", "t1"], ["t2", "t3"]])
    fast, slow = frequency_rows(plan, Roofline(), parse_frequencies("all", A40), 0, 1)
    plain = estimate(plan, Roofline(), 0)
    assert (fast["mhz"], fast["iteration_ns"], fast["energy_j"]) == (1740, plain.iteration_ns, plain.energy_j)
    assert fast["iteration_ns"] <= slow["iteration_ns"] <= fast["iteration_ns"] / RATIO + 1e3
    assert slow["energy_dynamic_j"] < fast["energy_dynamic_j"]
    assert slow["power_w"] < fast["power_w"]
    assert fast["power_w"] == pytest.approx(plain.energy_j * 1e9 / plain.iteration_ns)  # type: ignore[operator]
    assert slow["what_if"]
    assert "assumed" in slow["assumption"]


def test_steps_are_named_or_refused() -> None:
    assert [s.mhz for s in parse_frequencies("1305, 1740,1305", A40)] == [1305, 1740]
    assert parse_frequencies("", A40) == ()
    with pytest.raises(InputError, match="1000 MHz: A40 has the steps 1740, 1305 MHz"):
        parse_frequencies("1000", A40)
    with pytest.raises(InputError, match="expected `all`"):
        parse_frequencies("fast", A40)
