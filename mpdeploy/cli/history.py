"""`mpdeploy history DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpdeploy.cli.common import Json, console, emit, number, table, verdict_markup


def history(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of run directories.")], as_json: Json = False
) -> None:
    """List the runs in a folder with their verdicts, oldest first."""
    from mpdeploy.run_history import runs_in

    runs = runs_in(folder)
    if as_json:
        emit({"runs": runs})
        return
    rows = table("run", "updated", "verdict", "score", "worst drift", "chosen engine", right=("score", "worst drift"))
    for item in runs:
        rows.add_row(
            item["run"], item["updated"], verdict_markup(item["verdict"] or "unfinished"), number(item["score"], 3),
            number(item["worst_rel_l2"]), item["chosen_engine"] or "-",
        )  # fmt: skip
    console(stderr=False).print(rows)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("history")(history)
