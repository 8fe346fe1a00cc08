"""compare over several workloads and clusters: cases, means, jobs, layout search, rows with reasons."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from muxtune.experiments.commands.compare import answered, run
from muxtune.experiments.commands.means import geometric_means
from muxtune.experiments.commands.problem import Options, parse_microbatches
from muxtune.experiments.main import main
from muxtune.experiments.plots.compare import bars
from muxtune.spec.errors import InputError

WORKLOADS = {
    "small": "model: gpt2\ntasks:\n- {task_id: a, dataset: sst2, global_batch_samples: 4, peft: {kind: lora, rank: 8}}\n",
    "mixed": "model: gpt2\ntasks:\n"
    "- {task_id: a, dataset: sst2, global_batch_samples: 4, peft: {kind: lora, rank: 8}}\n"
    "- {task_id: b, dataset: rte, global_batch_samples: 2, peft: {kind: lora, rank: 16}}\n",
}
POLICIES = ("hf-peft", "sl-peft", "muxtune", "lorafusion")
BROKEN = """
from muxtune.policies.base import Policy
class Broken(Policy):
    def plan(self, state):
        raise KeyError("oops")
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text(BROKEN)
    for name, text in WORKLOADS.items():
        Path(f"{name}.yaml").write_text(text)
    return [Path(f"{name}.yaml") for name in WORKLOADS]


def untimed(value: Any) -> Any:
    """Without the one wall-clock value of a row."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k != "plan_seconds"}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def test_cases_are_workloads_by_clusters_and_each_is_what_it_is_alone(files: list[Path]) -> None:
    body = run(files, ["1xA40", "2xA40"], POLICIES)
    assert [(c["workload"], c["cluster"]) for c in body["cases"]] == [
        *(("small", "1xA40"), ("small", "2xA40"), ("mixed", "1xA40"), ("mixed", "2xA40"))
    ]
    assert untimed(body["cases"][3]) == untimed(run(files[1:], ["2xA40"], POLICIES))
    assert answered(body)


def test_jobs_change_nothing(files: list[Path]) -> None:
    policies = ("hf-peft", "muxtune", "./broken.py:Broken")
    assert untimed(run(files, ["1xA40"], policies, jobs=2)) == untimed(run(files, ["1xA40"], policies))


def test_means_by_hand() -> None:
    def case(**times: int | None) -> dict[str, Any]:
        return {"rows": [{"policy": p, "feasible": t is not None, "iteration_ns": t} for p, t in times.items()]}

    found = geometric_means([case(muxtune=10, x=5), case(muxtune=10, x=20), case(muxtune=None, x=1)], ["muxtune", "x"])
    assert [m["policy"] for m in found] == ["muxtune", "x"]
    assert found[1]["against"]["muxtune"]["cases"] == 2
    assert math.isclose(found[1]["against"]["muxtune"]["speedup"], math.sqrt(2 * 0.5))
    none = geometric_means([case(muxtune=None, x=1)], ["muxtune", "x"])
    assert none[1]["against"]["muxtune"] == {"speedup": None, "cases": 0}


def test_a_policy_without_a_plan_is_a_row_in_every_case(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "--workload", "small.yaml", "--workload", "mixed.yaml", "--cluster", "1xA40"]
    assert main([*arguments, "--policies", "muxtune", "--policy", "./broken.py:Broken"]) == 0
    out = capsys.readouterr().out
    assert out.count("./broken.py:Broken: no plan: policy Broken failed with KeyError at broken.py:5") == 2
    assert "geometric mean" in out
    assert main([*arguments, "--policy", "./broken.py:Broken"]) == 1
    capsys.readouterr()


def test_files_of_several_cases(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--workload", "small.yaml", "--workload", "mixed.yaml", "--cluster", "1xA40", "--policies", "muxtune"]
    assert main(["compare", *arguments, "--out", "cmp", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert json.loads(Path("cmp/compare.json").read_text()) == body
    assert Path("cmp/2-mixed-1xA40/plan-1-muxtune.json").is_file()
    assert Path("cmp/compare.svg").read_text() == bars(body["cases"])


def test_the_search_is_the_same_for_every_policy_and_says_what_it_did(files: list[Path]) -> None:
    fixed = run(files[1:], ["2xA40"], POLICIES, Options(microbatches=(2,)))
    found = run(files[1:], ["2xA40"], POLICIES, Options(microbatches=(), search_layout=True))
    assert found["layout"] == "searched"
    assert found["microbatches"] == [1, 2, 4]
    before = {r["policy"]: r["iteration_ns"] for r in fixed["rows"]}
    for row in found["rows"]:
        assert row["iteration_ns"] <= before[row["policy"]]
        assert row["layout_search"]["candidates"] == found["layout_choices"]["kept"]
        assert len(row["chosen_layouts"]) == 1


def test_counts_alone_can_be_searched(files: list[Path]) -> None:
    found = run(files[1:], ["2xA40"], ("muxtune",), Options(microbatches=(1, 4)))
    assert (found["layout"], found["microbatches"]) == ("tp=1 pp=2 dp=1", [1, 4])
    assert found["rows"][0]["layout_search"]["candidates"] == 2


def test_plan_searches_too(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--workload", "mixed.yaml", "--cluster", "2xA40", "--policy", "muxtune", "--search-layout"]
    assert main([*arguments, "--microbatches", "1,2"]) == 0
    assert "layout searched, 1, 2 micro-batches (5 choices" in capsys.readouterr().out
    assert json.loads(Path("plan.json").read_text())["made_by"]["layouts"]["candidates"] == 5


def test_wrong_searches(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--workload", "mixed.yaml", "--cluster", "2xA40", "--policy", "muxtune"]
    for more, told in (
        (["--search-layout", "--tp", "2"], "--search-layout with --tp 2"),
        (["--microbatches", "0"], "--microbatches '0'"),
        (["--microbatches", "2,x"], "--microbatches '2,x'"),
        (["--dp", "2", "--microbatches", "1"], "some replicas would have none"),
    ):
        assert main([*arguments, *more]) == 2
        assert told in capsys.readouterr().err
    assert parse_microbatches("4,2,4") == (4, 2)
    with pytest.raises(InputError):
        parse_microbatches("")
