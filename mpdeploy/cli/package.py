"""`mpdeploy package RUN --target triton|kserve|ray`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mpdeploy.cli.common import Json, RunPath, console, emit, plain, table, verdict_markup


def package(
    run: RunPath,
    target: Annotated[str, typer.Option("--target", metavar="NAME", help="triton, kserve or ray.")],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="The folder to make, or a package to replace.")
    ],
    engine: Annotated[
        list[str] | None, typer.Option("--engine", metavar="NAME", help="Only these engines of the run.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="MODEL", help="The model's name in URLs.")] = None,
    allow_failed: Annotated[
        bool, typer.Option("--allow-failed", help="Also what failed or was never validated; the package says so.")
    ] = False,
    labels: Annotated[
        Path | None, typer.Option("--labels", metavar="FILE", help="Triton: names of the classes, one a line.")
    ] = None,
    model_version: Annotated[
        int | None, typer.Option("--model-version", metavar="N", help="Triton: the version folder.")
    ] = None,
    instances: Annotated[
        int | None, typer.Option("--instances", metavar="N", help="Triton: instances a device.")
    ] = None,
    queue_size: Annotated[
        int | None, typer.Option("--queue-size", metavar="N", help="Requests that may wait; more are refused.")
    ] = None,
    queue_timeout_ms: Annotated[
        int | None, typer.Option("--queue-timeout-ms", metavar="MS", help="Triton: how long one may wait.")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", metavar="NAME", help="KServe: triton or mpdeploy (our own server).")
    ] = None,
    storage_uri: Annotated[
        str | None,
        typer.Option("--storage-uri", metavar="URI", help="KServe: where you put the package's model folder."),
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="IMAGE", help="KServe: the container image of our own server.")
    ] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", metavar="NAME", help="KServe.")] = None,
    min_replicas: Annotated[
        int | None, typer.Option("--min-replicas", metavar="N", help="KServe, Ray: never fewer.")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option("--max-replicas", metavar="N", help="KServe, Ray: never more.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Package the engines that passed the gates for Triton, KServe or Ray Serve."""
    from mpdeploy.serve.package import PackageRequest
    from mpdeploy.serve.package import package as write_package

    options: dict[str, Any] = {
        "labels_file": labels,
        "version": model_version,
        "instances": instances,
        "max_queue_size": queue_size,
        "queue_timeout_us": None if queue_timeout_ms is None else queue_timeout_ms * 1000,
        "runtime": runtime,
        "storage_uri": storage_uri,
        "image": image,
        "namespace": namespace,
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
    }
    given = {key: value for key, value in options.items() if value is not None}
    made = write_package(PackageRequest(run, target, output, tuple(engine or ()), name, allow_failed, given))
    if as_json:
        emit({"path": str(made.path), "next": list(made.next_steps), **made.provenance})
        return
    out, err = console(stderr=False), console()
    for warning in made.provenance["warnings"]:
        err.print(f"[yellow]warning:[/] {plain(warning)}")
    rows = table("model", "engine", "precision", "verdict", "sha256")
    for model, found in made.provenance["models"].items():
        rows.add_row(
            plain(model), found["engine"], found["precision"], verdict_markup(found["verdict"]), found["sha256"][:12]
        )
    out.print(rows)
    for left, why in made.provenance["left_out"].items():
        out.print(f"left out  {left}: {why}", markup=False)
    out.print(f"\n{made.path}: checked and written. Next:", markup=False)
    for step in made.next_steps:
        print(f"  {step}")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("package")(package)
