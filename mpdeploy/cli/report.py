"""`mpdeploy report RUN [OTHER]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpdeploy.cli.common import Json, RunPath, emit


def report(
    run: RunPath,
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER]", help="A later run: one page that compares the two.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Decide a run from its evidence and write gate.json, junit.xml, summary.md and report.html; or compare two runs."""
    from mpdeploy.train_and_export import report as render
    from mpdeploy.train_and_export import report_pair

    written = render(run) if other is None else [report_pair(run, other)]
    if as_json:
        emit({"written": [str(path) for path in written]})
    else:
        print("\n".join(str(path) for path in written))


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("report")(report)
