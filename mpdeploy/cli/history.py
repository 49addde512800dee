"""`mpdeploy history DIR`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from mpdeploy.cli.common import Json, console, emit, number, plain, table, verdict_markup

_TITLES = {"score": "score", "worst_rel_l2": "worst drift", "median_ms": "latency of the chosen engine, ms"}


def history(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of run directories.")], as_json: Json = False
) -> None:
    """List the runs in a folder with their verdicts, oldest first, and how their numbers move."""
    from mpdeploy.run_history import runs_in, sparkline, trends_of, verdict_line

    runs = runs_in(folder)
    trends = trends_of(runs)
    if as_json:
        emit({"runs": runs, "trends": trends})
        return
    right = ("score", "worst drift", "ms")
    rows = table("run", "when", "verdict", "score", "worst drift", "ms", "engine", "failed gates", right=right)
    for item in runs:
        verdict = item["verdict"] or ("broken" if item["fault"] else "unfinished")
        rows.add_row(
            plain(Path(item["run"]).name), str(item["updated"])[:16].replace("T", " "), verdict_markup(verdict),
            number(item["score"], 3), number(item["worst_rel_l2"]), number(item["median_ms"]),
            plain(item["chosen_engine"] or "-"), plain(", ".join(item["failed"]) or "-"),
        )  # fmt: skip
    out = console(stderr=False)
    if not out.is_terminal:  # a log: names stay whole
        longest = max(len(Path(item["run"]).name) + len(", ".join(item["failed"])) for item in runs)
        out.width = max(out.width, longest + 100)
    out.print(f"Runs in {folder}", markup=False)
    out.print(rows)
    for item in runs:
        if item["fault"]:
            out.print(f"{item['run']}: {item['fault']}", markup=False)
    for pipeline, curves in trends.items():
        if len(curves["score"]) < 2:
            continue
        out.print(f"{pipeline}, {len(curves['score'])} runs, oldest first:", markup=False)
        out.print(f"  {verdict_line(runs, pipeline)}  verdicts", markup=False)
        for key, values in curves.items():
            known = [value for value in values if value is not None]
            if known:
                line = f"{sparkline(values)}  {_TITLES[key]}: {number(known[0], 3)} -> {number(known[-1], 3)}"
                out.print(f"  {line}{_change(known)}", markup=False)


def _change(known: list[float]) -> str:
    """How far the last run is from the one before, where both are numbers and differ."""
    if len(known) < 2 or not all(math.isfinite(value) and value for value in known[-2:]):
        return ""
    ratio = known[-1] / known[-2] - 1.0
    return f"  ({100.0 * ratio:+.1f} % since the run before)" if abs(ratio) >= 5e-4 else "  (as the run before)"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("history")(history)
