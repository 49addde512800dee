"""`mpdeploy gate RUN`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mpdeploy.cli.common import Json, RunPath, console, emit, plain, verdict_markup


def gate(
    run: RunPath,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="FILE", help="Also compare with a promoted baseline.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Inconclusive exits 11.")] = False,
    as_json: Json = False,
) -> None:
    """Decide a run again from its evidence: no model, no engine, no GPU needed."""
    from mpdeploy.report.github import tell_github
    from mpdeploy.train_and_export import error_of
    from mpdeploy.train_and_export import gate as decide

    document, verdicts = decide(run, baseline=baseline)
    tell_github(document, sys.stderr if as_json else sys.stdout)
    if as_json:
        emit(document)
    else:
        out = console(stderr=False)
        for verdict in verdicts:
            note = " (advisory)" if verdict.advisory else ""
            out.print(f"{verdict_markup(verdict.verdict)}  ", end="")
            out.print(f"{verdict.message}{note}", markup=False)
        out.print(f"\n{plain(run)}: {verdict_markup(document['verdict'])}")
    error = error_of(document["verdict"], verdicts, run, strict=strict)
    if error is not None:
        raise error


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("gate")(gate)
