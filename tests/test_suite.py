"""The planners' suite: its files are what the rule says, its reader names what is wrong, its runs go on and count inversions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from muxtune.experiments.cases import SUITE, case_files, read_case
from muxtune.experiments.commands.problem import Options
from muxtune.experiments.commands.suite import inversions, markdown, run
from muxtune.experiments.main import main
from muxtune.spec.errors import InputError
from tests.suite_rule import rule

POLICIES = ("hf-peft", "muxtune", "ilp")
SMALL = ("cpu-01-mixed-skewed-02", "cpu-02-mixed-skewed-04")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "cases"
    found.mkdir()
    for name in SMALL:
        shutil.copy(SUITE / f"{name}.yaml", found)
    return found


def test_the_files_are_what_the_rule_writes() -> None:
    assert {p.name: p.read_text() for p in case_files(SUITE)} == dict(rule())
    assert len(list(rule())) == 40


def test_every_case_is_read_and_they_cover_what_they_should() -> None:
    problems = [read_case(path, Options()) for path in case_files(SUITE)]
    assert {p.cluster.size for p in problems} == {1, 2, 4, 8, 16}
    assert {p.cluster.device.name for p in problems} == {"A40", "H100", "cpu"}
    assert {len(p.workload.tasks) for p in problems} == {2, 4, 8, 16, 32, 64}
    for part in (lambda t: t.dataset, lambda t: t.peft, lambda t: t.global_batch_samples):
        counts = {len({repr(part(t)) for t in p.workload.tasks}) for p in problems}  # type: ignore[no-untyped-call]
        assert 1 in counts
        assert max(counts) > 2


def test_jobs_change_nothing_and_what_is_done_is_kept(folder: Path, tmp_path: Path) -> None:
    first = run(folder, POLICIES, jobs=2, out=tmp_path / "out")
    kept = tmp_path / "out" / "cases" / f"{SMALL[0]}.json"
    marked = kept.read_text().replace('"feasible": true', '"feasible": true, "mark": 1', 1)
    kept.write_text(marked)
    again = run(folder, POLICIES, out=tmp_path / "out")
    assert again["cases"][0]["rows"][0]["mark"] == 1
    assert [untimed(c) for c in again["cases"]][1:] == [untimed(c) for c in first["cases"]][1:]
    # Another question is not answered from what is kept.
    other = run(folder, POLICIES, Options(seed=1), out=tmp_path / "out")
    assert "mark" not in other["cases"][0]["rows"][0]
    assert [min(r["relative"] for r in c["rows"]) for c in first["cases"]] == [1.0, 1.0]
    assert (tmp_path / "out" / "suite.md").read_text().count(SMALL[0]) >= 1


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k != "plan_seconds"}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def row(policy: str, guessed: int | None, simulated: int) -> dict[str, Any]:
    solver = guessed and {"name": "set-partitioning/highs", "value_ns": guessed}
    return {"policy": policy, "feasible": True, "iteration_ns": simulated, "relative": 1.0, "solver": solver}


def test_inversions_by_hand() -> None:
    # b < a < c for the surrogate, a < b < c simulated: one of three pairs; d has no surrogate value.
    rows = [row("a", 20, 100), row("b", 10, 110), row("c", 30, 120), row("d", None, 90)]
    found = inversions([{"case": "x", "rows": rows}])
    assert (found["pairs"], found["inverted"]) == (3, 1)
    assert found["found"] == [{"case": "x", "preferred": "b", "other": "a", "loss": pytest.approx(0.1)}]


def test_a_policy_without_a_plan_is_a_row(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = (folder / f"{SMALL[0]}.yaml").read_text()
    for name in SMALL:
        (folder / f"{name}.yaml").unlink()
    (folder / "tight.yaml").write_text(source.replace("tiny-llama", "llama2-7b"))
    assert main(["suite", str(folder), "--policies", "muxtune", "--out", str(tmp_path / "out"), "--json"]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert not case["rows"][0]["feasible"]
    assert "rank 0 needs" in case["rows"][0]["reason"]
    assert "| tight | - |" in markdown(json.loads((tmp_path / "out" / "suite.json").read_text()))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("count: 1", "count: 0", r"tasks\.0\.count = 0: give a whole number"),
        ("pp: 1, dp: 1", "pp: 2, dp: 1", r"layouts\.0: .* needs 2 devices, the cluster has 1"),
        ("microbatches: 4", "microbatches: 0", "must be at least 1"),
        ("pp: 1, dp: 1", "pp: 9, dp: 1", r"layouts\.0"),
    ],
)
def test_wrong_cases(old: str, new: str, message: str, folder: Path) -> None:
    path = folder / f"{SMALL[0]}.yaml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        read_case(path, Options())


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \*\.yaml"):
        case_files(tmp_path)
