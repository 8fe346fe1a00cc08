"""Type checking sees across floors: a wrong argument from one floor to another is found (docs/house.md)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PLANTED = """
from muxtune.spec.align import spread_slots
from muxtune.spec.units import format_ns

count: int = spread_slots(samples="three", microbatches=2)
text: str = format_ns(1)
"""


def test_a_type_error_across_two_floors_is_found(tmp_path: Path) -> None:
    if shutil.which("mypy", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("mypy is not installed")
    floors = tmp_path / "typed" / "muxtune"
    floors.mkdir(parents=True)
    (floors / "spec").symlink_to(ROOT / "spec")
    (floors / "policies").mkdir()
    planted = floors / "policies" / "planted.py"
    planted.write_text(PLANTED)
    command = [sys.executable, "-m", "mypy", "--explicit-package-bases", "--config-file", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "cache"), str(planted)],
        env={"MYPYPATH": str(tmp_path / "typed"), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if "planted.py" in line and ": error:" in line]
    assert done.returncode == 1, done.stdout + done.stderr
    assert any('Argument "samples"' in e and '"str"; expected "int"' in e for e in errors), done.stdout
    assert any("Incompatible types in assignment" in e for e in errors), done.stdout
    assert len(errors) == 2
