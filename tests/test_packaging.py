"""The wheel holds what the disk holds: every module and every data file of every floor, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
#: Floor → folder, such as muxtune.spec → spec.
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]


def disk_files() -> set[str]:
    """Modules and data files of the floors, as paths inside the wheel."""
    found = set()
    for floor, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            if (
                path.is_file()
                and "__pycache__" not in inside.parts
                and (path.suffix == ".py" or "data" in inside.parts)
            ):
                found.add((Path(floor.replace(".", "/")) / inside).as_posix())
    return found


def disk_packages() -> set[str]:
    """Folders with Python files, as package names."""
    modules = (Path(p) for p in disk_files() if p.endswith(".py"))
    return {".".join(path.parent.parts) for path in modules}


def copy_project(target: Path) -> None:
    """A copy without build folders: setuptools would put what it finds in an old one into the wheel."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copy_project(source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), "."]
    run = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = out.glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_packages_listed_are_the_folders_with_modules() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(disk_packages())


def test_wheel_holds_what_the_disk_holds(wheel: set[str]) -> None:
    packaged = {name for name in wheel if ".dist-info/" not in name}
    assert packaged == disk_files()


def test_wheel_holds_the_data_that_presets_need(wheel: set[str]) -> None:
    data = {"muxtune/spec/data/models.json", "muxtune/spec/data/devices.json", "muxtune/spec/data/length_quantiles.csv"}
    assert data <= wheel


def test_console_script_points_at_a_function() -> None:
    module, _, function = PROJECT["project"]["scripts"]["muxtune"].partition(":")
    *_, floor, name = module.split(".")
    text = (ROOT / FOLDERS[f"muxtune.{floor}"] / f"{name}.py").read_text(encoding="utf-8")
    assert f"def {function}(" in text


def test_no_floor_is_a_package_of_its_own() -> None:
    """A bare `kernels/__init__.py` would shadow the library of that name."""
    assert [f for f in FOLDERS.values() if (ROOT / f / "__init__.py").exists()] == []
