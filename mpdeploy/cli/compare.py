"""`mpdeploy compare REFERENCE CANDIDATE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpdeploy.cli.common import Data, EngineName, Json, console, emit, number, plain, table


def compare(
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE", help="An ONNX file or a built engine.")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="An ONNX file or a built engine.")],
    data: Data,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="Round the candidate's half tensors as half hardware would.")
    ] = False,
    half_sums: Annotated[
        bool,
        typer.Option(
            "--half-sums", help="With --emulate: sums inside means, norms and products are half too, the worst case."
        ),
    ] = False,
    engine: EngineName = None,
    max_drift: Annotated[float | None, typer.Option(metavar="REL_L2", help="Above it: exit 10.")] = None,
    as_json: Json = False,
) -> None:
    """Drift of two models or engines on the same samples."""
    from mpdeploy.comparison import compare as measure
    from mpdeploy.errors import GateFailedError
    from mpdeploy.gates.project import project_gates_accept

    found = measure(reference, candidate, data=data, emulate=emulate, half_sums=half_sums, engine=engine)
    for warning in found.warnings:
        console().print(f"[yellow]warning:[/] {plain(warning)}")
    if as_json:
        emit(found.to_json())
    else:
        rows = table(
            "output", "rel_l2", "max_abs", "cosine", "non-finite", right=("rel_l2", "max_abs", "cosine", "non-finite")
        )
        for name, drift in found.to_json()["outputs"].items():
            rows.add_row(
                plain(name),
                number(drift["rel_l2"]),
                number(drift["max_abs"]),
                f"{drift['cosine']:.6f}",
                str(drift["num_nonfinite"]),
            )
        console(stderr=False).print(rows)
    project_gates_accept(Path.cwd(), at=candidate.name)(found.drift, found.precision, {})
    if max_drift is not None and not found.drift.rel_l2 <= max_drift:
        raise GateFailedError(f"Relative L2 drift {found.drift.rel_l2:.3g} is above the limit {max_drift:.3g}.")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("compare")(compare)
