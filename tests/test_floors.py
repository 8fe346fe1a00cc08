"""The house: imports only go down, each third-party library has its door, files are short and say what they are."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 500


@dataclass(frozen=True)
class Floor:
    """What a floor may import: prefixes of muxtune (its own included) and third-party libraries; None is everything."""

    muxtune: tuple[str, ...] | None
    libraries: tuple[str, ...] | None


DATA = ("numpy", "scipy", "pandas", "pyarrow")
#: DESIGN §2. The longest prefix of a module's path decides which row holds for it.
FLOORS = {
    "spec": Floor(muxtune=("spec",), libraries=("numpy", "pydantic", "yaml")),
    "kernels": Floor(muxtune=("kernels",), libraries=("torch", "triton")),
    "sim/cost": Floor(muxtune=("spec", "sim.cost"), libraries=DATA),
    # Texts are turned into tokens by the tokenizers library where a workload names a tokenizer file.
    "sim/traces": Floor(muxtune=("spec", "sim.traces"), libraries=(*DATA, "tokenizers")),
    "sim": Floor(muxtune=("spec", "sim"), libraries=("simpy", "numpy")),
    "policies": Floor(muxtune=("spec", "sim.cost.base", "policies"), libraries=("numpy", "pulp")),
    "executor": Floor(
        muxtune=("spec", "kernels", "executor"),
        # The last four are optional: Transformer Engine, and import and export in Hugging Face's formats (DESIGN §8).
        libraries=("torch", "numpy", "megatron", "transformer_engine", "safetensors", "transformers", "peft"),
    ),
    "profiler": Floor(
        muxtune=("spec", "kernels", "sim.cost", "executor", "profiler"), libraries=("torch", "pynvml", *DATA)
    ),
    "experiments": Floor(muxtune=None, libraries=None),
}
TOP = sorted({folder.partition("/")[0] for folder in FLOORS})
#: Libraries that one file in the house may import.
DOORS = {
    "simpy": "sim/des.py",
    "pydantic": "spec/files.py",
    "yaml": "spec/files.py",
    "megatron": "executor/megatron.py",
    "pulp": "policies/solver.py",
}


def sources(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def inside(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in prefixes)


def floor_of(place: str) -> Floor:
    return FLOORS[max((f for f in FLOORS if place.startswith(f"{f}/")), key=len)]


def wrong_imports(root: Path) -> Iterator[str]:
    """Imports that go up, that use a library the floor does not have, or that name a floor without `muxtune`."""
    for path in sources(root, *TOP):
        place = path.relative_to(root).as_posix()
        floor = floor_of(place)
        for line, name in imports(path):
            top = name.partition(".")[0]
            if not top or top in TOP:
                yield f"{place}:{line}: imports {name}: write muxtune.<floor>"
            elif top == "muxtune":
                if floor.muxtune is not None and not inside(name.removeprefix("muxtune."), floor.muxtune):
                    yield f"{place}:{line}: imports {name}, which is not below it"
            elif top not in sys.stdlib_module_names and floor.libraries is not None and top not in floor.libraries:
                yield f"{place}:{line}: imports {top}, which its floor does not have"


def wrong_doors(root: Path) -> Iterator[str]:
    """Libraries that are imported elsewhere than at their door."""
    for path in sources(root, *TOP):
        place = path.relative_to(root).as_posix()
        for line, name in imports(path):
            top = name.partition(".")[0]
            if DOORS.get(top, place) != place:
                yield f"{place}:{line}: imports {top}, whose one door is {DOORS[top]}"


def wrong_files(root: Path) -> Iterator[str]:
    """Files that are too long, silent modules, and an __init__.py that would shadow a package of that name."""
    for path in sources(root, *TOP, "tests"):
        place = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > MAX_LINES:
            yield f"{place}: {lines} lines, more than {MAX_LINES}"
        if not place.startswith("tests/") and not ast.get_docstring(ast.parse(text)):
            yield f"{place}: has no module docstring"
        if path.name == "__init__.py" and path.parent.parent == root:
            yield f"{place}: a floor has no __init__.py of its own"


def wrong_tests(root: Path) -> Iterator[str]:
    """Tests that import a second copy of a module."""
    for path in sources(root, "tests"):
        for line, name in imports(path):
            if name.partition(".")[0] in TOP:
                yield f"{path.relative_to(root).as_posix()}:{line}: imports {name}: write muxtune.<floor>"


RULES = (wrong_imports, wrong_doors, wrong_files, wrong_tests)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_the_house_is_in_order(rule: object) -> None:
    assert list(rule(ROOT)) == []  # type: ignore[operator]


def test_the_walk_sees_the_house() -> None:
    """An empty walk would find everything in order."""
    seen = {p.relative_to(ROOT).as_posix() for p in sources(ROOT, *TOP)}
    assert {"spec/plan.py", "policies/muxtune.py", "sim/cost/base.py", "spec/peft/lora.py"} <= seen
    assert {name for _, name in imports(ROOT / "spec/files.py")} >= {"yaml", "pydantic.TypeAdapter", "json"}


@pytest.mark.parametrize(
    ("place", "line", "complaint"),
    [
        (
            "spec/x.py",
            "from muxtune.sim.cost.base import Cost",
            "spec/x.py:2: imports muxtune.sim.cost.base.Cost, which",
        ),
        ("spec/x.py", "def f():\n    import torch", "spec/x.py:3: imports torch, which its floor does not have"),
        ("spec/x.py", "import yaml", "spec/x.py:2: imports yaml, whose one door is spec/files.py"),
        (
            "sim/cost/x.py",
            "import muxtune.sim.stage",
            "sim/cost/x.py:2: imports muxtune.sim.stage, which is not below it",
        ),
        ("sim/x.py", "import simpy", "sim/x.py:2: imports simpy, whose one door is sim/des.py"),
        ("sim/x.py", "from muxtune.policies.base import Policy", "which is not below it"),
        ("policies/x.py", "from muxtune.sim.cost.roofline import Roofline", "which is not below it"),
        ("policies/x.py", "from muxtune.sim import simulate", "which is not below it"),
        ("policies/x.py", "import scipy", "policies/x.py:2: imports scipy, which its floor does not have"),
        (
            "policies/x.py",
            "from pulp import LpProblem",
            "policies/x.py:2: imports pulp, whose one door is policies/solver.py",
        ),
        ("kernels/x.py", "from muxtune.spec.align import Batch", "which is not below it"),
        ("executor/x.py", "from megatron.core import parallel_state", "whose one door is executor/megatron.py"),
        ("executor/x.py", "import pandas", "which its floor does not have"),
        ("profiler/x.py", "from muxtune.policies.base import Policy", "which is not below it"),
        ("experiments/x.py", "import simpy", "whose one door is sim/des.py"),
        (
            "experiments/x.py",
            "from spec.plan import Plan",
            "experiments/x.py:2: imports spec.plan.Plan: write muxtune.",
        ),
        ("experiments/x.py", "import kernels", "imports kernels: write muxtune.<floor>"),
        ("experiments/x.py", "from . import y", "imports ..y: write muxtune.<floor>"),
        ("tests/test_x.py", "import sim.stage", "tests/test_x.py:2: imports sim.stage: write muxtune.<floor>"),
        ("spec/__init__.py", "", "spec/__init__.py: a floor has no __init__.py of its own"),
    ],
)
def test_a_planted_violation_is_found(place: str, line: str, complaint: str, tmp_path: Path) -> None:
    plant(tmp_path, place, f'"""A module."""\n{line}\n')
    found = [sentence for rule in RULES for sentence in rule(tmp_path)]
    assert any(complaint in sentence for sentence in found), found


@pytest.mark.parametrize("place", ["spec/x.py", "tests/test_x.py"])
def test_a_long_file_is_found(place: str, tmp_path: Path) -> None:
    plant(tmp_path, place, '"""A module."""\n' + "x = 1\n" * 499)
    assert list(wrong_files(tmp_path)) == []
    plant(tmp_path, place, '"""A module."""\n' + "x = 1\n" * 500)
    assert list(wrong_files(tmp_path)) == [f"{place}: 501 lines, more than 500"]


def test_a_silent_module_is_found(tmp_path: Path) -> None:
    plant(tmp_path, "sim/x.py", "import math\n")
    assert list(wrong_files(tmp_path)) == ["sim/x.py: has no module docstring"]


def test_what_is_allowed_is_not_found(tmp_path: Path) -> None:
    for place, text in (
        ("spec/files.py", "import yaml\nfrom pydantic import TypeAdapter\nfrom muxtune.spec.noun import noun\n"),
        ("sim/des.py", "import simpy\nfrom muxtune.sim.cost.base import Cost\n"),
        ("policies/x.py", "import numpy as np\nfrom muxtune.sim.cost.base import CostModel\n"),
        ("policies/solver.py", "import pulp\n"),
        ("executor/megatron.py", "from megatron.core import parallel_state\n"),
        ("experiments/x.py", "import rich\nfrom muxtune.executor.group import Group\n"),
    ):
        plant(tmp_path, place, f'"""A module."""\n{text}')
    assert [sentence for rule in RULES for sentence in rule(tmp_path)] == []


def plant(root: Path, place: str, text: str) -> None:
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
