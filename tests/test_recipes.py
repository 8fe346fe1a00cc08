"""Every figure of `muxtune paper` lies where the paper or the law puts it."""

from __future__ import annotations

import pytest

from muxtune.experiments.commands.paper import run, show
from muxtune.experiments.recipes.base import Check, make_recipe, recipes
from muxtune.spec.errors import UnknownKeyError


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipe(name: str) -> None:
    recipe = make_recipe(name)
    checks = recipe.checks()
    assert checks
    assert recipe.SOURCE
    missed = {c.what: f"expected {c.expected}, found {c.found:.4g}" for c in checks if not c.met}
    assert set(missed) == set(recipe.MISSES), missed
    assert recipe.checks() == checks
    assert (recipe.CALIBRATED is None) == (recipe.KIND != "calibrated")


def test_a_check_is_met_within_its_range() -> None:
    made = [Check(what="x", expected="1", low=0.9, high=1.1, found=f) for f in (0.89, 0.9, 1.0, 1.1, 1.11)]
    assert [c.met for c in made] == [False, True, True, True, False]


def test_the_command_counts_and_shows() -> None:
    body = run("interleaving-gain")
    assert (body["checks"], body["missed"]) == (6, 0)
    text = show(body)
    assert "S=4, C=8, N=8: gain" in text
    assert "6 of 6 checks met" in text


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(UnknownKeyError, match=r"unknown recipe 'nothing': known are .*interleaving-gain"):
        run("nothing")
