"""`mpdeploy train-and-export PIPELINE`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mpdeploy.cli.common import Json, console, emit


def train_and_export(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="A pipeline file; see pipelines/.")],
    run: Annotated[
        Path | None, typer.Option("--run", "--run-dir", metavar="DIR", help="The run directory; default runs/NAME.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a field, for example train.epochs=3."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option("--engine", metavar="NAME", help="Build this engine; default: all that are there."),
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Run this stage and those after it again.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Inconclusive exits 11.")] = False,
    as_json: Json = False,
) -> None:
    """Train, export, convert, build and validate; finished stages are skipped. The exit code is the verdict."""
    from mpdeploy import distributed
    from mpdeploy.config import apply_overrides, load_pipeline

    chosen = apply_overrides(load_pipeline(pipeline), overrides or ())
    if distributed.rank() != 0:
        from mpdeploy.train_and_export import follow

        follow(chosen)
    from mpdeploy.cli.live import LiveListener, summary_table
    from mpdeploy.train_and_export import result_json
    from mpdeploy.train_and_export import run as run_pipeline

    with LiveListener(console()) as listener:
        result = run_pipeline(chosen, run, engines=engine or (), start=start, until=until, listener=listener)
    from mpdeploy.report.github import tell_github

    if result.gate is not None:
        tell_github(result.gate, sys.stderr if as_json else sys.stdout)
    document: dict[str, Any] = result_json(result)
    if as_json:
        emit(document)
    else:
        summary_table(console(stderr=False), document)
    error = result.error(strict=strict)
    if error is not None:
        raise error


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("train-and-export")(train_and_export)
