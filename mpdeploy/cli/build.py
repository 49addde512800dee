"""`mpdeploy build MODEL.onnx --engine NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpdeploy.cli.common import Json, OptionalData, console, emit, human_bytes


def build(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx")],
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="A row of the engine table: see mpdeploy doctor.")
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the engine and its sidecar go.")],
    profile: Annotated[
        list[str] | None,
        typer.Option("--profile", metavar="INPUT=MIN,OPT,MAX", help="Shapes like x=1x3x64x64,8x3x64x64,32x3x64x64."),
    ] = None,
    data: OptionalData = None,
    as_json: Json = False,
) -> None:
    """Build an engine and read back what it runs in which precision."""
    from mpdeploy.building import build as run_build

    err = console()
    with err.status(f"building {model.name} with {engine}"):
        built, audit = run_build(model, engine, output, profile=profile or (), data=data)
    document = {
        "engine": engine,
        "path": str(built.path),
        "bytes": built.path.stat().st_size,
        "precision": built.precision,
        "sha256": built.sha256,
        "source": audit.source,
        "realised": audit.realised,
        "layers": audit.count_by_precision(),
        "seconds": built.sidecar.get("seconds"),
    }
    if as_json:
        emit(document)
        return
    layers = ", ".join(f"{count} {precision}" for precision, count in audit.count_by_precision().items())
    told = "what really runs" if audit.realised else "as parsed: it repeats the ONNX file"
    print(f"{built.path}: {human_bytes(built.path.stat().st_size)}, layers: {layers} (from the {audit.source}: {told})")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("build")(build)
