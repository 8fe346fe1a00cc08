"""Learning-rate schedules: goldens that a reader can check, and laws."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.spec.peft.lora import LoRA
from muxtune.spec.schedule import Schedule, learning_rate
from muxtune.spec.task import Task

KINDS = st.sampled_from(["constant", "linear", "cosine"])


@pytest.mark.parametrize(
    ("schedule", "steps", "rates"),
    [
        (Schedule(), 3, [1.0, 1.0, 1.0]),
        (Schedule(warmup_steps=2), 4, [0.5, 1.0, 1.0, 1.0]),
        (Schedule(kind="linear"), 5, [1.0, 0.75, 0.5, 0.25, 0.0]),
        (Schedule(kind="linear", warmup_steps=2, final_share=0.5), 5, [0.5, 1.0, 1.0, 0.75, 0.5]),
        (Schedule(kind="cosine"), 3, [1.0, 0.5, 0.0]),
        (Schedule(kind="cosine", warmup_steps=1, final_share=0.2), 4, [1.0, 1.0, 0.6, 0.2]),
        (Schedule(kind="cosine"), 1, [1.0]),
    ],
)
def test_rates_by_hand(schedule: Schedule, steps: int, rates: list[float]) -> None:
    assert [learning_rate(schedule, 1.0, s, steps) for s in range(steps)] == pytest.approx(rates, abs=1e-12)


@given(KINDS, st.integers(1, 40), st.data())
def test_a_rate_rises_to_its_peak_and_never_after(kind: Any, steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    share = 0.0 if kind == "constant" else data.draw(st.floats(0, 1))
    schedule = Schedule(kind=kind, warmup_steps=warmup, final_share=share)
    rates = [learning_rate(schedule, 2.0, s, steps) for s in range(steps + 3)]
    assert max(rates) == 2.0
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert min(rates[warmup:]) >= 2.0 * share * (1 - 1e-12)
    if kind != "constant" and steps - warmup > 1:
        assert rates[steps - 1 :] == pytest.approx([2.0 * share] * 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"warmup_steps": -1}, "warmup_steps=-1: must not be negative"),
        ({"kind": "linear", "final_share": 1.5}, r"final_share=1.5: must be in \[0, 1\]"),
        ({"final_share": 0.5}, "with kind=constant"),
    ],
)
def test_wrong_schedules_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Schedule(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": 5, "schedule": Schedule(warmup_steps=5)}, "schedule.warmup_steps=5: must be below steps=5"),
        ({"loss_scale": 3.0}, "loss_scale=3.0: must be a power of two"),
        ({"loss_scale": 0.0}, "loss_scale=0.0"),
        ({"loss_scale": -2.0}, "loss_scale=-2.0"),
        ({"loss_scale_growth_steps": -1}, "loss_scale_growth_steps=-1"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Task(task_id="a", peft=LoRA(), dataset="sst2", billed_len_tokens=8, global_batch_samples=1, **changes)
