"""Jobs, the work rule, and what a trace says about itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.spec.errors import InputError
from muxtune.spec.files import validate
from muxtune.spec.jobs import Job, TraceHeader, job_steps, job_task
from muxtune.spec.noun import plain
from muxtune.spec.peft.lora import LoRA

JOB = Job(
    job_id="a",
    arrival_ns=5,
    model="llama2-7b",
    peft=LoRA(rank=8),
    dataset="rte",
    billed_len_tokens=256,
    global_batch_samples=16,
    duration_ns=600,
    gpus_milli=2000,
)


def test_steps_are_duration_over_the_solo_step_time() -> None:
    assert job_steps(JOB, 100) == 6
    assert job_steps(JOB, 400) == 2  # 1.5 goes to the even 2
    assert job_steps(JOB, 240) == 2  # 2.5 too
    assert job_steps(JOB, 10_000) == 1  # a job does at least one step
    assert job_steps(replace(JOB, steps=7, duration_ns=None), 100) == 7


def test_the_gpu_count_scales_only_where_it_is_asked_to() -> None:
    assert job_steps(JOB, 100, "scale", reference_gpus=4) == 3  # 600 ns on 2 of 4 GPUs
    assert job_steps(replace(JOB, gpus_milli=None), 100, "scale", reference_gpus=4) == 6


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 10**16), st.integers(1, 10**12))
def test_steps_times_step_time_is_the_duration_within_half_a_step(duration_ns: int, step_ns: int) -> None:
    steps = job_steps(replace(JOB, duration_ns=duration_ns), step_ns)
    assert abs(steps * step_ns - duration_ns) * 2 <= step_ns or (steps == 1 and duration_ns < step_ns)


def test_a_job_is_a_task() -> None:
    task = job_task(JOB, 6)
    assert (task.task_id, task.steps, task.arrival_ns, task.peft) == ("a", 6, 5, LoRA(rank=8))


def test_a_job_reads_back_from_its_file() -> None:
    assert validate(Job, plain(JOB), "here") == JOB


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 3}, "either steps or duration_ns"),
        ({"duration_ns": None}, "either steps or duration_ns"),
        ({"arrival_ns": -1}, "arrival_ns=-1: must be at least 0"),
        ({"duration_ns": 2**70}, "duration_ns=1180591620717411303424: must be at most 9223372036854775807"),
        ({"deadline_ns": 4}, "deadline_ns=4: must be at least 5"),
        ({"cancel_ns": 4}, "cancel_ns=4: must be at least 5"),
        ({"tenant": ""}, "tenant is empty"),
        ({"weight": 0.0}, "weight=0.0: must be above 0"),
        ({"global_batch_samples": 0}, "global_batch_samples=0"),
    ],
)
def test_a_wrong_job_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        validate(Job, {**plain(JOB), **wrong}, "here")


def test_a_trace_states_its_invented_columns_and_both_rules() -> None:
    about = TraceHeader(name="t", source="x.csv", invented=("peft", "dataset"), seed=3, gpu_rule="scale")
    invented, work, gpus = about.statements()
    assert invented == "invented columns (seed 3): peft, dataset"
    assert "duration × the solo step rate of hf-peft" in work
    assert "GPU count over the GPUs of the reference instance" in gpus
    with pytest.raises(ValueError, match="rank is no column"):
        TraceHeader(name="t", source="x", invented=("rank",))
