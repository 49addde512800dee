"""`mpdeploy build MODEL.onnx --engine NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mpdeploy.cli.common import Json, OptionalData, console, emit, human_bytes, plain


def build(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx")],
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="A row of the engine table: see mpdeploy doctor.")
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the engine and its sidecar go.")],
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="INPUT=MIN,OPT,MAX",
            help="Shapes like x=1x3x64x64,8x3x64x64,32x3x64x64; again for the same input: one more optimisation profile.",
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help="One of the engine's own build options, like tf32=true; mpdeploy doctor --engine NAME lists them.",
        ),
    ] = None,
    data: OptionalData = None,
    as_json: Json = False,
) -> None:
    """Build an engine and read back what it runs in which precision."""
    from mpdeploy.building import build as run_build
    from mpdeploy.building import engine_bytes
    from mpdeploy.engines.accounting import report_on
    from mpdeploy.engines.options import parse_assignments

    given = parse_assignments(options or ())
    title = f"building {model.name} with {engine}"
    with console().status(plain(title)) as status:

        def tell(phase: str, done: int, total: int) -> None:
            status.update(plain(f"{title}: {phase}" + (f" {done} of {total}" if total else "")))

        built, audit = run_build(model, engine, output, profile=profile or (), data=data, options=given, progress=tell)
    report = report_on(audit, built.sidecar["kept"], built.precision)
    document = {
        "engine": engine,
        "path": str(built.path),
        "bytes": engine_bytes(built),
        "precision": built.precision,
        "sha256": built.sha256,
        "source": audit.source,
        "realised": audit.realised,
        "layers": audit.count_by_precision(),
        "kept_in_half": report["kept_in_half"],
        "kept_unaccounted": report["kept_unaccounted"],
        "options": built.sidecar["options"],
        "seconds": built.sidecar.get("seconds"),
    }
    if as_json:
        emit(document)
        return
    _print(document)


def _print(document: dict[str, Any]) -> None:
    layers = ", ".join(f"{count} {precision}" for precision, count in document["layers"].items())
    told = "what really runs" if document["realised"] else "as parsed: it repeats the ONNX file"
    size = human_bytes(document["bytes"])
    print(
        f"{document['path']}: {size} in {document['seconds']:.1f} s, layers: {layers} (from the {document['source']}: {told})"
    )
    for key, text in (
        ("kept_in_half", "nodes that were kept in FP32 run in half"),
        ("kept_unaccounted", "kept nodes are named by no layer of the engine: how they run is not known"),
    ):
        nodes = document[key]
        if nodes:
            more = f" and {len(nodes) - 5} more" if len(nodes) > 5 else ""
            console().print(f"[yellow]warning:[/] {len(nodes)} {text}: {plain(', '.join(nodes[:5]))}{more}")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("build")(build)
