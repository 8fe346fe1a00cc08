"""report: a study's page drawn again from its result.json (and, for the pipeline pictures, pairs.json)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import output_file
from muxtune.experiments.console import render
from muxtune.experiments.report import headline, write_report
from muxtune.experiments.result import Pair, StudyResult
from muxtune.spec.errors import InputError
from muxtune.spec.files import read_data, read_noun, validate, write_noun
from muxtune.spec.noun import noun
from muxtune.spec.timeline import Timeline

RESULT, PAIRS = "result.json", "pairs.json"
#: What `StudyResult.as_json` derives from the fields.
DERIVED = frozenset({"mape", "noise", "repeatability", "worst", "kendall_tau"})


@noun
class Pairs:
    """The timelines of a study, as `pairs.json` keeps them."""

    pairs: tuple[Pair, ...]


def write_pairs(pairs: Sequence[Pair], folder: Path) -> None:
    """Keep what the pipeline pictures need: whole instructions, without the subgraphs inside them."""
    kept = (replace(p, predicted=_instructions(p.predicted), measured=_instructions(p.measured)) for p in pairs)
    write_noun(Pairs(pairs=tuple(kept)), folder / PAIRS)


def _instructions(timeline: Timeline) -> Timeline:
    return replace(timeline, spans=tuple(s for s in timeline.spans if s.subgraph < 0), memory=())


def read_study(folder: Path) -> tuple[StudyResult, tuple[Pair, ...]]:
    """Result and (where they were kept) timelines of a study.

    Raises:
        InputError: no study, or not one of this version.
    """
    path = folder / RESULT
    if not path.is_file():
        raise InputError(f"{folder}: holds no {RESULT}: give the --out folder of `muxtune demo` or `muxtune validate`")
    data = read_data(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an object with the fields of a study")
    result = validate(StudyResult, {k: v for k, v in data.items() if k not in DERIVED}, str(path))
    there = (folder / PAIRS).is_file()
    return result, read_noun(Pairs, folder / PAIRS).pairs if there else ()


def run(study: Path, out: Path | None = None) -> dict[str, Any]:
    """Write the page (`study`/report.html unless `out` names another file).

    Raises:
        InputError: no study there, or `out` cannot be written.
    """
    result, pairs = read_study(study)
    path = output_file(out or study / "report.html")
    write_report(result, pairs, path)
    return {
        "out": str(path),
        "plans": len(result.rows),
        "complete": result.complete,
        "pictures": len(pairs),
        "headline": headline(result),
    }


def show(body: dict[str, Any]) -> str:
    """The headline and the file."""
    pictures = "" if body["pictures"] else f" (without pipeline pictures: no {PAIRS})"
    return render(body["headline"], f"wrote {body['out']}{pictures}")
