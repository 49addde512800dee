"""`mpdeploy inspect FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpdeploy.cli.common import Json, console, emit, human_bytes, plain, table


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An ONNX file, or a built engine (its folder or file).")],
    as_json: Json = False,
) -> None:
    """Precision per op, casts, and kept nodes with their reasons."""
    from mpdeploy.inspection import inspect as examine

    found = examine(file)
    if as_json:
        emit(found)
        return
    out = console(stderr=False)
    if found["kind"] == "onnx":
        out.print(
            f"{file}: ONNX opset {found['opset']}, {found['precision']}; {found['half_nodes']} of {found['nodes']} nodes in half, "
            f"{found['casts']} casts, {len(found['kept'])} kept",
            markup=False,
        )
    else:
        told = "what really runs" if found["realised"] else "as parsed: it repeats the ONNX file"
        out.print(
            f"{file}: {found['library']}, {human_bytes(found['bytes'])}, {found['casts']} casts, {len(found['kept'])} kept; "
            f"precisions from the {found['source']} ({told})",
            markup=False,
        )
    for side in ("inputs", "outputs"):
        out.print(f"{side}: {'; '.join(found[side])}", markup=False)
    precisions = sorted({precision for counts in found["ops"].values() for precision in counts})
    rows = table("op", *precisions, right=tuple(precisions))
    for op, counts in found["ops"].items():
        rows.add_row(op, *(str(counts.get(precision, "")) for precision in precisions))
    out.print(rows)
    if found.get("largest"):
        largest = table("largest nodes", "op", "weights", "stored as", right=("weights",))
        for entry in found["largest"]:
            largest.add_row(plain(entry["node"]), entry["op"], human_bytes(entry["bytes"]), entry["precision"])
        out.print(largest)
    if found["kept"]:
        of_engine = found["kind"] != "onnx"
        kept = table(
            "kept in FP32", "op", *(["runs in" if found["realised"] else "parsed as"] if of_engine else []), "why"
        )
        for entry in found["kept"]:
            realised = [_realised(entry["precision"])] if of_engine else []
            kept.add_row(plain(entry["node"]), entry["op"], *realised, plain(entry["reason"]))
        out.print(kept)


def _realised(precision: str | None) -> str:
    if precision is None:
        return "[yellow]not told[/]"
    return f"[red]{precision}[/]" if precision in ("fp16", "bf16", "fp8", "fp4") else precision


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("inspect")(inspect)
