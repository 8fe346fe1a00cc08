"""`muxtune suite`: policies over a folder of cases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muxtune.experiments import options as opt
from muxtune.experiments.answer import Answer, example

suite_app = typer.Typer()


@suite_app.command(epilog=example("suite --policies hf-peft,muxtune,ilp --policy ./mine.py:MyPolicy --jobs 2"))
def suite(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="Folder of cases (docs/files.md).  [default: the suite that comes along]"),
    ] = None,
    policies: Annotated[
        str,
        typer.Option(
            "--policies", metavar="A,B,...", help="Policies separated by commas.  [default: thirteen of them]"
        ),
    ] = "",
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="POLICY", help="One more policy, with its options; may be repeated."),
    ] = None,
    cost: opt.Cost = "roofline",
    allow_extrapolation: opt.Extrapolate = False,
    draws: opt.Draws = 2,
    jobs: opt.Jobs = 1,
    seed: opt.Seed = 0,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for the result; cases that are done are kept there.")
    ] = Path("out/suite"),
    as_json: opt.AsJson = False,
) -> Answer:
    """Let policies plan a whole folder of cases; a killed run goes on."""
    from muxtune.experiments.commands import suite as command
    from muxtune.experiments.commands.compare import split_policies
    from muxtune.experiments.commands.problem import Options
    from muxtune.experiments.console import Progress

    options = Options(cost=cost, allow_extrapolation=allow_extrapolation, draws=draws, seed=seed)
    references = (*split_policies(policies), *(policy or ()))
    with Progress() as progress:
        body = command.run(folder, references, options, jobs=jobs, out=out, progress=progress)
    return Answer(body=body, show=command.show, as_json=as_json)
