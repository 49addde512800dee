"""`mpdeploy bench A [B]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mpdeploy.cli.common import Data, EngineName, Json, console, emit, number, table


def bench(
    data: Data,
    a: Annotated[Path, typer.Argument(metavar="A", help="An ONNX file or a built engine.")],
    b: Annotated[Path | None, typer.Argument(metavar="B", help="What A is compared with, interleaved.")] = None,
    engine: EngineName = None,
    samples: Annotated[int, typer.Option(min=20, help="Timed calls of each; a p99 needs 299.")] = 300,
    as_json: Json = False,
) -> None:
    """Latency of A; with B, both interleaved and the ratio B / A with its interval."""
    from mpdeploy.comparison import bench as measure
    from mpdeploy.measure.latency import LatencyReport

    found = measure(a, b, data=data, engine=engine, num_samples=samples)
    document: dict[str, Any] = (
        found.to_json() if isinstance(found, LatencyReport) else {"a": found.to_json(), "b": None, "ratio": None}
    )
    if as_json:
        emit(document)
        return
    rows = table(
        "", "median ms", "p90 ms", "p99 ms", "samples", "includes", right=("median ms", "p90 ms", "p99 ms", "samples")
    )
    for name, path in (("a", a), ("b", b)):
        side = document[name]
        if side is not None:
            rows.add_row(
                str(path),
                number(side["median_ms"]),
                number(side.get("p90_ms")),
                number(side["p99_ms"]),
                str(side["num_samples"]),
                side["includes"],
            )
    out = console(stderr=False)
    out.print(rows)
    if document["ratio"] is not None:
        low, high = document["ratio"]["interval"]
        out.print(
            f"ratio b / a of medians: {document['ratio']['median']:.3f} [{low:.3f}, {high:.3f}] (95 %)", markup=False
        )
    if document.get("warning"):
        console().print(f"[yellow]warning:[/] {document['warning']}")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("bench")(bench)
