"""`mpdeploy report RUN [OTHER]`."""

from __future__ import annotations

import typer

from mpdeploy.cli.common import Json, RunPath, emit


def report(run: RunPath, as_json: Json = False) -> None:
    """Decide a run from its evidence and write gate.json, junit.xml, summary.md and report.html."""
    from mpdeploy.train_and_export import report as render

    written = render(run)
    if as_json:
        emit({"written": [str(path) for path in written]})
    else:
        print("\n".join(str(path) for path in written))


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("report")(report)
