"""A policy of the user's own: the documented example, `check-policy`, an installed entry point."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from muxtune.experiments.laws import LAWS
from muxtune.experiments.main import main
from muxtune.policies.base import make_policy
from muxtune.sim.cost.roofline import Roofline

GUIDE = (Path(__file__).parents[1] / "docs" / "writing-a-policy.md").read_text(encoding="utf-8")


def example() -> str:
    """The file that the guide shows."""
    found = re.search(r"<!-- example: mine\.py -->\n```python\n(.*?)```", GUIDE, re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(example())
    return "./mine.py:LikeLengths"


def test_the_example_is_as_short_as_promised_and_keeps_every_law(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len([line for line in example().splitlines() if line.strip()]) <= 25
    assert main(["check-policy", mine]) == 0
    out = capsys.readouterr().out
    assert f"{len(LAWS)} of {len(LAWS)} laws hold" in out
    assert "FAIL" not in out


def test_the_example_batches_what_is_alike(mine: str, tiny_workload: Any, tiny_state: Any) -> None:
    workload = tiny_workload(4, datasets=("sst2", "rte"))
    lengths = {t.task_id: t.billed_len_tokens for t in workload.tasks}
    assert lengths["t0"] * 2 < lengths["t1"]
    plan = make_policy(mine, Roofline()).plan(tiny_state(workload))
    assert [h.tasks for h in plan.instances[0].htasks] == [("t0", "t2"), ("t1", "t3")]
    plan = make_policy(f"{mine}:ratio=100", Roofline()).plan(tiny_state(workload))
    assert [h.tasks for h in plan.instances[0].htasks] == [("t0", "t2", "t1", "t3")]


def test_the_guide_names_every_law() -> None:
    for law in LAWS:
        assert f"| {law.name} |" in GUIDE


def test_a_broken_law_is_exit_1_with_its_counterexample(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(example().replace("require_feasible(make_plan", "(make_plan"))
    assert main(["check-policy", mine, "--json"]) == 1
    body = json.loads(capsys.readouterr().out)
    assert not body["ok"]
    assert [law["law"] for law in body["laws"] if not law["ok"]] == ["refuses"]
    assert main(["check-policy", mine]) == 1
    assert "refuses: on devices of 1 MiB a plan came back" in capsys.readouterr().out


def test_wrong_references_are_exit_2(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    for reference in ("./gone.py:A", "./mine.py:Other", "nothing", f"{mine}:width=1"):
        assert main(["check-policy", reference]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_an_installed_entry_point_is_a_policy(tmp_path: Path) -> None:
    """A package on the path that names an entry point, as pip would have installed it."""
    (tmp_path / "their_package.py").write_text(example())
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[muxtune.policies]\nlike-lengths = their_package:LikeLengths\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = "import sys; from muxtune.experiments.main import main; sys.exit(main(sys.argv[1:]))"
    for arguments, told in ((["list", "policies"], "like-lengths"), (["check-policy", "like-lengths"], "laws hold")):
        run = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=environment
        )
        assert run.returncode == 0, run.stderr
        assert told in run.stdout
