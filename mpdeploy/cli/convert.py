"""`mpdeploy convert MODEL.onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mpdeploy.cli.common import Json, OptionalData, console, emit, number, plain, table


def convert(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An FP32 ONNX model.")],
    data: OptionalData = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep", metavar="PATTERN|@FILE", help="Nodes that stay FP32: name, glob, op:TYPE, scope:MODULE, @FILE."
        ),
    ] = None,
    ranges: Annotated[
        Path | None,
        typer.Option(
            metavar="amax.json", help="What training saw (20-export/amax.json of a run), merged with --data's."
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp16 or bf16.")] = "fp16",
    max_drift: Annotated[
        float | None,
        typer.Option(metavar="REL_L2", help="Largest emulated relative L2 drift; above it: exit 10, no file."),
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Find the smallest keep-list that meets --max-drift, or --metric and --max-drop."
        ),
    ] = False,
    labels: Annotated[
        Path | None, typer.Option("--labels", metavar="FILE.npz", help="One array: a label a sample, for --metric.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="A task metric, for example top1.")
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option("--max-drop", metavar="X", help="How much the metric may fall: 0.2pt, or 0.002.")
    ] = None,
    cost: Annotated[
        str,
        typer.Option(
            metavar="KIND", help="What --search makes small: traffic, nodes, or profile:FILE.json (time a node)."
        ),
    ] = "traffic",
    mixed_half: Annotated[
        bool,
        typer.Option("--mixed-half", help="With --search: what FP16 cannot hold runs in BF16 where the gate allows."),
    ] = False,
    engine: Annotated[
        str,
        typer.Option(metavar="NAME", help="The engine it is for: what that takes apart is emulated so."),
    ] = "tensorrt",
    keep_io: Annotated[bool, typer.Option("--keep-io", help="All inputs and outputs stay FP32.")] = False,
    keep_io_name: Annotated[
        list[str] | None, typer.Option("--keep-io-name", metavar="NAME", help="This input or output stays FP32.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="OUT.onnx", help="Default: MODEL.fp16.onnx beside MODEL.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="Also keep model, plan and record in a run directory.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rewrite an FP32 model into strictly typed mixed precision, and measure its drift as half hardware would show it."""
    from mpdeploy.cli.search_bar import SearchBar
    from mpdeploy.conversion import convert as run_conversion
    from mpdeploy.conversion import record_conversion
    from mpdeploy.data_files import load_amax
    from mpdeploy.errors import UsageError
    from mpdeploy.gates.project import project_gates_accept
    from mpdeploy.pipeline import TerminatedError
    from mpdeploy.run_dir import RunDir
    from mpdeploy.searching import parse_drop
    from mpdeploy.searching.conversion import convert_searched
    from mpdeploy.searching.profile import check_cost

    if search and data is None:
        raise UsageError("--search needs --data to measure drift on.", hint="add --data calib.npz")
    if not search and (mixed_half or cost != "traffic"):
        raise UsageError(f"{'--mixed-half' if mixed_half else '--cost'} goes with --search.", hint="add --search")
    check_cost(cost)
    if search and ranges is not None:
        raise UsageError("--ranges goes with plain convert.", hint="a search measures each node and needs no ranges")
    if precision not in ("fp16", "bf16"):
        raise UsageError(f"--precision {precision}: there is no such half precision.", hint="give fp16 or bf16")
    target = output or (
        run / "30-convert" / f"model.{precision}.onnx" if run else model.with_suffix(f".{precision}.onnx")
    )
    if run is not None:
        with RunDir.create(run) as directory:  # before anything is written into it: a foreign folder is refused
            directory.set_header(model=str(model))
    err = console()
    with SearchBar(err, model.name) as bar:
        common: dict[str, Any] = {
            "data": data, "keep": keep or (), "precision": precision, "keep_io": keep_io, "keep_io_names": keep_io_name or (),
            "output": target, "max_drift": max_drift, "metric": metric, "labels": labels,
            "engine": engine,
            "max_drop": None if max_drop is None else parse_drop(max_drop),
            "accept": project_gates_accept(Path.cwd(), at=target.name),
            "progress": bar.doing,
        }  # fmt: skip
        if search:
            state = target.with_suffix(".search")
            try:
                done = convert_searched(
                    model, **common, cost=cost, mixed_half=mixed_half, state=state, on_progress=bar.searching
                )
            except (KeyboardInterrupt, TerminatedError):
                if (state / "keep.json").exists():
                    err.print(f"the best keep-list so far: --keep @{state / 'keep.json'}", markup=False)
                raise
        else:
            trained: dict[str, Any] = {} if ranges is None else load_amax(ranges)
            done = run_conversion(model, **common, **trained)
    if run is not None:
        record_conversion(run, model, done)
    for warning in done.warnings:
        err.print(f"[yellow]warning:[/] {plain(warning)}")
    document = done.to_json()
    if as_json:
        emit(document)
    else:
        _show(document)


def _show(document: dict[str, Any]) -> None:
    out = console(stderr=False)
    in_bf16 = len(document.get("search", {}).get("bf16", ()))
    others = f"{in_bf16} in bf16, " if in_bf16 else ""
    out.print(
        f"{document['output']}: {document['half_nodes'] - in_bf16} of {document['nodes']} nodes in {document['precision']}, {others}"
        f"{len(document['kept'])} kept in FP32, {document['casts']} casts, {document['seconds']:.2g} s",
        markup=False,
    )
    if "search" in document:
        _show_search(document["search"], out)
    for note in document["notes"]:
        out.print(f"note: {note}", markup=False)
    if document["kept"]:
        rows = table("kept in FP32", "op", "why")
        for entry in document["kept"][:40]:
            rows.add_row(plain(entry["node"]), entry["op"], plain(entry["reason"]))
        out.print(rows)
        if len(document["kept"]) > 40:
            out.print(f"... and {len(document['kept']) - 40} more: mpdeploy inspect {document['output']}", markup=False)
    if document["drift"] is not None:
        rows = table(
            f"emulated drift ({document['emulated_engine']}) of",
            "rel_l2",
            "max_abs",
            "cosine",
            "non-finite",
            right=("rel_l2", "max_abs", "cosine", "non-finite"),
        )
        for name, drift in document["drift"].items():
            rows.add_row(
                plain(name),
                number(drift["rel_l2"]),
                number(drift["max_abs"]),
                f"{drift['cosine']:.6f}",
                str(drift["num_nonfinite"]),
            )
        out.print(rows)


def _show_search(search: dict[str, Any], out: Any) -> None:
    out.print(
        f"keep-list: {search['keep_list']}; edit it, and give it back with --keep @{search['keep_list']}", markup=False
    )
    shown = "each shown to be needed" if search["minimal"] else "not each shown to be needed"
    out.print(
        f"search: {search['gate']}; {search['kept']} of {search['searched']} kept, {shown}; {search['evaluations']:g} evaluations",
        markup=False,
    )
    if search["drift_held_out"] is not None:
        out.print(
            f"drift on the samples no probe saw: {number(search['drift_held_out'])}; on the others: {number(search['drift_seen'])}",
            markup=False,
        )
    points = search["pareto"]
    if len(points) > 1:
        rows = table("front: kept", "cost", "drift", "", right=("front: kept", "cost", "drift"))
        for point in [
            points[round(i * (len(points) - 1) / min(7, len(points) - 1))] for i in range(min(8, len(points)))
        ]:
            rows.add_row(
                str(point["num_kept"]),
                number(point["cost"]),
                number(point["drift"]),
                "meets the gate" if point["passes"] else "",
            )
        out.print(rows)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("convert")(convert)
