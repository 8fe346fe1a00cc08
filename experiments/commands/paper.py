"""paper: what MuxTune states and what laws give, computed here and held against their expected ranges."""

from __future__ import annotations

from typing import Any

from muxtune.experiments.commands.inputs import Progress, silent
from muxtune.experiments.console import render, table
from muxtune.experiments.recipes.base import make_recipe, recipes
from muxtune.spec.noun import plain

VERDICTS = {True: "yes", False: "MISSED", None: "not checked"}


def run(recipe: str | None = None, progress: Progress = silent) -> dict[str, Any]:
    """Every recipe, or one of them.

    Raises:
        UnknownKeyError: there is none of this name.
    """
    names = [recipe] if recipe else sorted(recipes())
    body: dict[str, Any] = {"recipes": {}}
    for done, name in enumerate(names):
        progress("paper", done, len(names))
        made = make_recipe(name)
        checks = [{**plain(c), "met": c.met if c.checked else None} for c in made.checks()]
        body["recipes"][name] = {
            "kind": made.KIND,
            "source": made.SOURCE,
            "assumes": list(made.ASSUMES),
            "calibrated": made.CALIBRATED,
            "misses": dict(made.MISSES),
            "checks": checks,
        }
    progress("paper", len(names), len(names))
    found = [c for r in body["recipes"].values() for c in r["checks"]]
    checked = [c for c in found if c["checked"]]
    missed = sum(not c["met"] for c in checked)
    return {**body, "checks": len(checked), "missed": missed, "unchecked": len(found) - len(checked)}


def show(body: dict[str, Any]) -> str:
    """A table a recipe, with its source and what it assumes."""
    parts: list[Any] = []
    for name, recipe in body["recipes"].items():
        rows = [[c["what"], c["expected"], f"{c['found']:.4g}", VERDICTS[c["met"]]] for c in recipe["checks"]]
        measured = {None: "", False: ", UNCALIBRATED", True: ", measured"}[recipe["calibrated"]]
        parts.append(table(["check", "expected", "found", "met"], rows, title=f"{name} ({recipe['kind']}{measured})"))
        parts += [f"  source: {recipe['source']}", *(f"  assumes: {text}" for text in recipe["assumes"])]
        parts += [*(f"  missed: {what}: {cause}" for what, cause in recipe["misses"].items()), ""]
    beside = f"; {body['unchecked']} figures not checked" if body["unchecked"] else ""
    return render(*parts, f"{body['checks'] - body['missed']} of {body['checks']} checks met{beside}")
