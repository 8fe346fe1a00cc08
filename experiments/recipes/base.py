"""Recipe: computes figures that the paper states or a law gives, and holds each against its expected range."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from muxtune.spec.errors import UnknownKeyError
from muxtune.spec.noun import noun
from muxtune.spec.registry import plugins


@noun
class Check:
    """One figure. It is met if low ≤ found ≤ high; `expected` says in words what the paper or the law states.

    Not `checked`: it is shown beside what is expected, and nothing is claimed of it.
    """

    what: str
    expected: str
    low: float
    high: float
    found: float
    checked: bool = True

    @property
    def met(self) -> bool:
        """Whether the figure lies in its range; one that is not checked has none to miss."""
        return not self.checked or self.low <= self.found <= self.high


class Recipe:
    """One figure, table or law. A subclass states its source and what it assumes, and computes its checks.

    `KIND` (DESIGN §13): a law is exact; derived follows from shapes or published lengths; calibrated rests on a chosen
    constant, so it proves a shape and not a truth. `CALIBRATED` says whether its cost model was measured (None: no cost
    model of a device enters). `MISSES` has the cause of each check, by what it says, that is known not to be met.
    """

    SOURCE = ""
    KIND: Literal["law", "derived", "calibrated"] = "law"
    ASSUMES: tuple[str, ...] = ()
    CALIBRATED: bool | None = None
    MISSES: Mapping[str, str] = MappingProxyType({})

    def checks(self) -> tuple[Check, ...]:
        """Run it; deterministic, seconds at most."""
        raise NotImplementedError


def recipes() -> dict[str, type[Any]]:
    """Every recipe by key: the files of this folder."""
    return plugins("recipes", Path(__file__).parent, "muxtune.experiments.recipes", Recipe)


def make_recipe(key: str) -> Recipe:
    """One recipe.

    Raises:
        UnknownKeyError: there is none of this name.
    """
    found = recipes()
    if key not in found:
        raise UnknownKeyError("recipe", key, found)
    made: Recipe = found[key]()
    return made
