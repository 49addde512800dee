"""`mpdeploy bench A [B]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mpdeploy.cli.common import Data, EngineName, Json, console, emit, number, plain, table


def bench(
    data: Data,
    a: Annotated[
        Path, typer.Argument(metavar="A", help="An ONNX file, a built engine, or a torch.export program (.pt2).")
    ],
    b: Annotated[Path | None, typer.Argument(metavar="B", help="What A is compared with, interleaved.")] = None,
    engine: EngineName = None,
    samples: Annotated[int, typer.Option(min=20, help="Timed calls of each; a p99 needs 299.")] = 300,
    batches: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Also the throughput of A (or B) at these batches.")
    ] = None,
    pin: Annotated[
        bool, typer.Option("--pin/--no-pin", help="Tie busy threads to cores of their own while it lasts (CPU).")
    ] = True,
    as_json: Json = False,
) -> None:
    """Latency of A; with B, both interleaved and the ratio B / A with its interval."""
    from mpdeploy.comparison import bench as measure
    from mpdeploy.comparison import sweep
    from mpdeploy.measure.latency import LatencyReport

    found = measure(a, b, data=data, engine=engine, num_samples=samples, pin=pin)
    document: dict[str, Any] = (
        found.to_json() if isinstance(found, LatencyReport) else {"a": found.to_json(), "b": None, "ratio": None}
    )
    if batches:
        document["sweep"] = sweep(b or a, _sizes(batches), data=data, engine=engine)
    if as_json:
        emit(document)
        return
    numbers = ("median ms", "p90 ms", "p99 ms", "CPU ms", "samples")
    rows = table("", *numbers, "includes", right=numbers)
    for name, path in (("a", a), ("b", b)):
        side = document[name]
        if side is not None:
            rows.add_row(
                plain(path),
                number(side["median_ms"]),
                number(side.get("p90_ms")),
                number(side["p99_ms"]),
                number(side["cpu_ms_per_call"]),
                str(side["num_samples"]),
                side["includes"] + _copies(side["copies_ms"]),
            )
    out = console(stderr=False)
    out.print(rows)
    if document["ratio"] is not None:
        low, high = document["ratio"]["interval"]
        out.print(
            f"ratio b / a of medians: {document['ratio']['median']:.3f} [{low:.3f}, {high:.3f}] (95 %)", markup=False
        )
    for line in _conditions((document["b"] or document["a"])["conditions"]):
        out.print(line, markup=False)
    if batches:
        rows = table("batch", "median ms", "samples/s", right=("batch", "median ms", "samples/s"))
        for entry in document["sweep"]:
            rows.add_row(str(entry["batch"]), number(entry["median_ms"]), f"{entry['samples_per_s']:,.0f}")
        out.print(rows)
    if document.get("warning"):
        console().print(f"[yellow]warning:[/] {plain(document['warning'])}")


def _copies(copies: dict[str, float] | None) -> str:
    told = [f"{name.replace('_', ' ')} {number(value)} ms" for name, value in (copies or {}).items()]
    return f" (copies: {', '.join(told)})" if told else ""


def _conditions(found: dict[str, Any]) -> list[str]:
    """What the machine did meanwhile, and what could not be read."""
    words = {
        "others_cpu_share": "other processes took {:.0%} of the cores",
        "steal_share": "other virtual machines {:.0%}",
        "load_average_1m": "load average {}",
        "temperature_c": "{:.0f} degrees C",
        "throttle_events": "{} thermal throttle events",
    }
    said = [text.format(found[name]) for name, text in words.items() if name in found]
    if "clock_mhz" in found:
        said.append(f"clocks {found['clock_mhz']['lowest']} to {found['clock_mhz']['highest']} MHz")
    if "gpu" in found:
        gpu = {name: value for name, value in found["gpu"].items() if value not in (None, [])}
        said.append("GPU " + ", ".join(f"{name} {value}" for name, value in gpu.items()))
    threads = found["threads"]
    pinned = f"on cores {threads['cores']}" if threads["pinned"] else f"no ({threads['reason']})"
    lines = [f"meanwhile: {'; '.join(said)}; threads pinned: {pinned}"]
    if found["absent"]:
        lines.append("not known: " + "; ".join(f"{name} ({reason})" for name, reason in found["absent"].items()))
    return lines


def _sizes(text: str) -> list[int]:
    from mpdeploy.errors import UsageError

    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UsageError(f"--batches {text}: write batch sizes like 1,8,32.")
    return sizes


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("bench")(bench)
