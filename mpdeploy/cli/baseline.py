"""`mpdeploy baseline promote RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpdeploy.cli.common import Json, RunPath, emit

group = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@group.callback()
def baseline() -> None:
    """The numbers that later runs are compared with."""


@group.command("promote")
def promote(
    run: RunPath,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why these numbers are the new normal.")],
    file: Annotated[Path, typer.Option("--file", metavar="FILE", help="The baseline file, to be committed.")] = Path(
        "mpdeploy-baseline.json"
    ),
    as_json: Json = False,
) -> None:
    """Write a run's numbers into the baseline file, keyed by hardware and engine."""
    from mpdeploy.gates.baseline import promote as write
    from mpdeploy.run_dir import RunDir

    document = write(RunDir.open(run), file, reason)
    if as_json:
        emit(document)
    else:
        print(f"{file}: numbers of {run} promoted ({reason})")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.add_typer(group, name="baseline")
