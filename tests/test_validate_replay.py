"""validate --replay: a few jobs really come and go; structure and conservation, not accuracy; the arithmetic of its costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from muxtune.experiments.commands.validate_replay import RESULT, run, show
from muxtune.experiments.live import Change, Lived, Pass
from muxtune.experiments.replay_study import measured_costs
from muxtune.sim.cost.table import FittedTable
from muxtune.spec.files import read_noun
from muxtune.spec.fleet import FREE
from tests.fleets import S, by_count, job, replayed, trace_of


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("replay")
    return run(out, jobs=4, seconds=1.0, rounds=2, tasks_per_instance=2, model="tiny-test"), out


@pytest.mark.dist
def test_every_job_takes_its_steps_and_is_compared_once(ran: tuple[dict[str, Any], Path]) -> None:
    body, out = ran
    asked = {row["job_id"]: row["steps"] for row in map(json.loads, (out / "trace.jsonl").read_text().splitlines()[1:])}
    assert {row["job_id"]: row["steps"] for row in body["rows"]} == asked
    assert len(body["rows"]) == 4
    for row in body["rows"]:
        assert row["measured_s"] > 0
        assert row["error"] == pytest.approx(row["predicted_s"] / row["measured_s"] - 1)
    ends = [row["arrival_s"] + row["measured_s"] for row in body["rows"]]
    assert body["makespan"]["measured_s"] == pytest.approx(max(ends))


@pytest.mark.dist
def test_time_and_changes_add_up(ran: tuple[dict[str, Any], Path]) -> None:
    body, out = ran
    time, replans = body["time"], body["replans"]
    assert time["iterations_s"] + time["between_s"] + time["changes_s"] <= body["makespan"]["measured_s"]
    # The first change loads the backbone and is no re-plan; the last tasks leave with the run.
    assert replans["joined"] == 4 - _first_joined(body)
    assert replans["left"] <= replans["joined"] + _first_joined(body)
    assert body["iterations"] >= max(row["steps"] for row in body["rows"])
    assert read_noun(FittedTable, out / "costs.json").device == "cpu"
    assert json.loads((out / RESULT).read_text())["rows"] == body["rows"]
    assert "job-3" in show(body)


def _first_joined(body: dict[str, Any]) -> int:
    return sum(row["arrival_s"] == 0 for row in body["rows"])


def test_costs_of_changes_are_the_line_through_what_was_seen() -> None:
    seen = [(1, 0), (2, 0), (0, 1), (1, 1), (2, 2), (0, 2)]
    changes = [Change(joined=a, left=b, seconds=0.5 + 0.2 * a + 0.1 * b, report=None) for a, b in [(2, 0), *seen]]
    passes = [Pass(tasks=n, span_s=1.0, between_s=0.01 + 0.002 * n) for n in (1, 2, 3, 4)]
    found = measured_costs([Lived(lives=(), changes=tuple(changes), passes=tuple(passes), reference_ns=(1.0,))])
    assert [found.replan_s, found.join_s, found.leave_s] == pytest.approx([0.5, 0.2, 0.1])
    assert [found.between_s, found.between_task_s] == pytest.approx([0.01, 0.002])
    assert found.start_s == pytest.approx(0.9)
    # The first change follows the start: together they take what the first one took.
    assert found.fleet().start_ns == pytest.approx(0.2 * S)


def test_host_time_between_iterations_lengthens_each_by_its_tasks() -> None:
    # Two jobs of ten steps together: ten iterations of 1 s + 0.1 s + 2 · 0.05 s.
    slower = replace(FREE, between_ns=S // 10, between_task_ns=S // 20)
    jobs = trace_of([job(0, 0, 10), job(1, 0, 10)])
    ends = [replayed(jobs, "fcfs", by_count(S), tasks_per_instance=2, costs=c).tally.last_ns for c in (FREE, slower)]
    assert ends[0] == 10 * S
    assert ends[1] == 12 * S
