"""A small real study: profile, fit, plan, simulate, execute and compare on tiny-test, and the arithmetic of its rankings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from muxtune.experiments.commands.study import write_study
from muxtune.experiments.ranking import rank
from muxtune.experiments.result import Pair, PlanRow, StudyResult
from muxtune.experiments.study import Study, StudyConfig
from muxtune.experiments.suites import demo_study, suite_study
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.errors import NoAnswerError, UnknownKeyError
from muxtune.spec.files import read_noun
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Plan
from muxtune.spec.task import Task, Workload

POLICIES = ("hf-peft", "muxtune", "greedy:alignment=varlen", "muxtune:alignment=chunk")
MODEL = replace(model_preset("tiny-test"), max_positions=128)
LAYOUTS = (even_layout(MODEL), even_layout(MODEL, pp=2), even_layout(MODEL, tp=2), even_layout(MODEL, dp=2))


def _config() -> StudyConfig:
    tasks = tuple(
        Task(task_id=name, peft=LoRA(rank=rank_), dataset="sst2", billed_len_tokens=length, global_batch_samples=batch)
        for name, rank_, length, batch in (("a", 4, 16, 3), ("b", 2, 128, 2), ("c", 4, 16, 1))
    )
    workload = Workload(name="w", model=MODEL, datasets=(embedded_length("sst2"),), tasks=tasks)
    return StudyConfig(
        name="t",
        workloads=(workload,),
        cluster=parse_cluster("2xcpu"),
        layouts=LAYOUTS,
        policies=POLICIES,
        microbatches=2,
        rounds=2,
        profile_rounds=2,
        shrinks=True,
        repeats=True,
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyResult, list[Pair], list[bool], Path]:
    out = tmp_path_factory.mktemp("study")
    partials: list[bool] = []

    def partial(result: StudyResult, pairs: list[Pair]) -> None:
        partials.append(result.complete)
        write_study(result, pairs, out)

    result, pairs = Study(_config(), out, lambda label, done, total: None).run(partial)
    return result, pairs, partials, out


pytestmark = pytest.mark.dist


def test_every_plan_is_predicted_and_measured(study: tuple[StudyResult, list[Pair], list[bool], Path]) -> None:
    result, pairs, partials, _ = study
    assert partials == [False, False, True]
    assert len(result.rows) == len(pairs) == len(LAYOUTS) * len(POLICIES)
    assert len(result.repeats) == len(LAYOUTS)
    assert {r.layout for r in result.rows} == {"1 rank", "pp=2", "tp=2", "dp=2"}
    for row in result.rows:
        assert row.predicted_ns > 0
        assert row.measured_ns > 0
        assert row.rounds == 2
        assert row.error == pytest.approx(row.predicted_ns / row.measured_ns - 1)
        assert row.extrapolated_fraction == 0
        assert min(row.measured_peak_bytes) > 0
        assert len(row.measured_peak_bytes) == len(row.predicted_peak_bytes) == (1 if row.layout == "1 rank" else 2)


def test_both_timelines_are_of_one_program(study: tuple[StudyResult, list[Pair], list[bool], Path]) -> None:
    _, pairs, _, _ = study
    for pair in pairs:
        assert pair.predicted.program_digest == pair.measured.program_digest
        for rank_ in pair.measured.ranks:
            predicted, measured = pair.predicted.instruction_spans(rank_), pair.measured.instruction_spans(rank_)
            assert [(s.op, s.key, s.tasks) for s in predicted] == [(s.op, s.key, s.tasks) for s in measured]


def test_peak_memory_is_predicted(study: tuple[StudyResult, list[Pair], list[bool], Path]) -> None:
    """Allocation is deterministic, so this is no timing: within a quarter even where the whole is a few hundred KiB."""
    result, _, _, _ = study
    for row in result.rows:
        for predicted, measured in zip(row.predicted_peak_bytes, row.measured_peak_bytes, strict=True):
            assert predicted == pytest.approx(measured, rel=0.25), row.policy


def test_files_are_there_and_valid(study: tuple[StudyResult, list[Pair], list[bool], Path]) -> None:
    result, _, _, out = study
    body = json.loads((out / "result.json").read_text())
    assert {"device", "rows", "mape", "worst", "kendall_tau", "fitted_on", "held_out", "repeatability"} <= body.keys()
    assert body["mape"] == pytest.approx(result.mape)
    keys = {"workload", "policy", "plan_digest", "predicted_ns", "measured_ns", "error"}
    assert all(keys <= row.keys() for row in body["rows"])
    trace = json.loads((out / "trace.json").read_text())
    processes = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert {"predicted pp=2 muxtune", "measured pp=2 muxtune"} <= processes
    assert "</html>" in (out / "report.html").read_text()
    assert read_noun(Plan, out / "plan.json").decision_digest() in {row.plan_digest for row in result.rows}
    assert (out / "costs.json").exists()


def test_the_worst_plan_is_cut_down(study: tuple[StudyResult, list[Pair], list[bool], Path]) -> None:
    result, _, _, out = study
    worst = result.worst
    assert worst is not None
    if abs(worst.error) <= worst.noise:
        assert result.shrunk is None
        return
    found = result.shrunk
    assert found is not None
    assert (found.workload, found.layout, found.policy) == (worst.workload, worst.layout, worst.policy)
    assert found.kept <= found.steps
    plan = read_noun(Plan, out / "worst.json")
    assert found.samples == tuple((t.task_id, t.global_batch_samples) for t in plan.workload.tasks)
    assert sum(n for _, n in found.samples) <= 6
    assert "The smallest Program that still shows it" in (out / "report.html").read_text()


def _row(policy: str, predicted_ns: int, measured_ns: int, noise: float = 0.0) -> PlanRow:
    return PlanRow(
        workload="w",
        layout="1 rank",
        policy=policy,
        plan_digest=policy,
        program_digest=policy,
        predicted_ns=predicted_ns,
        measured_ns=measured_ns,
        error=predicted_ns / measured_ns - 1,
        noise=noise,
        relative_error=0.0,
        extrapolated_fraction=0.0,
        rounds=20,
        billed_tokens_per_s=1.0,
        processed_tokens_per_s=1.0,
        predicted_billed_tokens_per_s=1.0,
        predicted_peak_bytes=(1,),
        measured_peak_bytes=(1,),
        predicted_bubble=0.0,
        measured_bubble=0.0,
        plan_seconds=0.0,
        causes=(),
    )


def test_ranking_counts_only_pairs_beyond_noise_as_resolved() -> None:
    rows = [_row("hf-peft", 300, 310), _row("sl-peft", 210, 200), _row("muxtune", 200, 205, noise=0.05)]
    (found,) = rank(rows)
    assert found.winner == "sl-peft"
    assert found.predicted_winner == "muxtune"
    assert found.kendall_tau == pytest.approx(1 / 3)
    assert found.resolved_tau == 1.0  # the pair that is ranked wrong differs by 2.5 %, its noise is 5 %
    assert found.unresolved == pytest.approx(1 / 3)
    assert dict(found.speedup_over) == pytest.approx({"hf-peft": 1.55, "sl-peft": 1.0})


def test_equal_plans_count_once() -> None:
    a, b = _row("muxtune", 100, 100), _row("hf-peft", 200, 150)
    twin = replace(b, policy="temporal")
    result = StudyResult(
        device="cpu",
        complete=True,
        rows=(a, b, twin),
        rankings=tuple(rank([a, b, twin])),
        families=(),
        fitted_on="",
        held_out="",
        reference_ns=1,
        provenance=None,  # type: ignore[arg-type]
        seconds=0.0,
    )
    assert result.mape == pytest.approx((0 + 1 / 3) / 2)
    assert result.rankings[0].kendall_tau == 1.0


def test_suites_are_known_by_name() -> None:
    assert len(suite_study("cpu", 20, 0).policies) * 4 >= 24
    assert len(demo_study(20, 0).policies) >= 5
    with pytest.raises(UnknownKeyError, match="unknown suite 'tpu': known are cpu, gpu"):
        suite_study("tpu", 20, 0)
    with pytest.raises(NoAnswerError, match="pending"):
        suite_study("gpu", 20, 0)
