"""`mpdeploy history DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpdeploy.cli.common import Json, console, emit, number, plain, table, verdict_markup

_TITLES = {"score": "score", "worst_rel_l2": "worst drift", "median_ms": "latency of the chosen engine, ms"}


def history(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of run directories.")], as_json: Json = False
) -> None:
    """List the runs in a folder with their verdicts, oldest first, and how their numbers move."""
    from mpdeploy.run_history import runs_in, sparkline, trends_of

    runs = runs_in(folder)
    trends = trends_of(runs)
    if as_json:
        emit({"runs": runs, "trends": trends})
        return
    right = ("score", "worst drift", "ms")
    rows = table("run", "updated", "verdict", "score", "worst drift", "ms", "chosen engine", right=right)
    for item in runs:
        rows.add_row(
            plain(item["run"]), item["updated"], verdict_markup(item["verdict"] or ("broken" if item["fault"] else "unfinished")),
            number(item["score"], 3), number(item["worst_rel_l2"]), number(item["median_ms"]), plain(item["chosen_engine"] or "-"),
        )  # fmt: skip
    out = console(stderr=False)
    if not out.is_terminal:  # a log: paths stay whole
        out.width = max(out.width, max(len(item["run"]) for item in runs) + 90)
    out.print(rows)
    for item in runs:
        if item["fault"]:
            out.print(f"{item['run']}: {item['fault']}", markup=False)
    for pipeline, curves in trends.items():
        if len(curves["score"]) < 2:
            continue
        out.print(f"{pipeline}, {len(curves['score'])} runs, oldest first:", markup=False)
        for key, values in curves.items():
            known = [value for value in values if value is not None]
            if known:
                line = f"{sparkline(values)}  {_TITLES[key]}: {number(known[0], 3)} -> {number(known[-1], 3)}"
                out.print(f"  {line}", markup=False)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("history")(history)
