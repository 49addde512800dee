"""Build every architecture of the test zoo, in FP32 and mixed, on every engine of this machine, and print one Markdown table.

    python examples/engine_table/run.py [--only resnet,bert] [--cache DIR] [--output table.md]

Run it from a checkout: the architectures come from `tests/zoo` (small transformers configs, exported by torch).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(os.environ.get("MPDEPLOY_REPO", Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(ROOT))

from mpdeploy.building import build, find_engine  # noqa: E402
from mpdeploy.comparison import bench, compare  # noqa: E402
from mpdeploy.conversion import convert  # noqa: E402
from mpdeploy.engines import ENGINES, backend  # noqa: E402
from mpdeploy.environment import hardware_key, package_versions  # noqa: E402
from mpdeploy.errors import MpdeployError  # noqa: E402
from tests import zoo  # noqa: E402

COLUMNS = (
    "model",
    "engine",
    "from",
    "build s",
    "MB",
    "drift (rel L2)",
    "median ms",
    "layers by precision",
    "known from",
)
SAMPLES = 8


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="comma-separated names")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "mpdeploy-zoo")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    lines = [
        f"{hardware_key()}, {time.strftime('%Y-%m-%d')}; `python examples/engine_table/run.py`",
        f"Versions: {', '.join(f'{name} {version}' for name, version in package_versions().items())}",
        f"Drift and latency on {SAMPLES} samples, against the FP32 ONNX model in ONNX Runtime on the same machine.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    print("\n".join(lines), flush=True)
    for name in arguments.only.split(",") if arguments.only else zoo.NAMES:
        model = zoo.export(name, arguments.cache)
        if model is None:
            print(f"| {name} | not installed |" + " |" * (len(COLUMNS) - 2), flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            for row in rows_of(name, model, Path(folder)):
                lines.append("| " + " | ".join(row) + " |")
                print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


def rows_of(name: str, model: zoo.ZooModel, folder: Path) -> list[tuple[str, ...]]:
    """One row an engine and source model."""
    data = folder / "samples.npz"
    np.savez(data, **model.feeds(SAMPLES, 0))
    sources = {"fp32": model.path}
    for precision in ("fp16", "bf16"):
        sources[precision] = folder / f"{precision}.onnx"
        convert(model.path, data=str(data), precision=precision, keep_io=True, output=sources[precision])  # type: ignore[arg-type]
    rows = []
    for engine in ENGINES:
        row = backend(engine)
        if row.available() is not None:
            continue
        wanted = {"fp32", "fp16"} | ({row.takes()} if row.takes() == "bf16" else set())
        for precision in sorted(wanted, reverse=True):
            rows.append(_measured(name, engine, precision, sources, data, folder / f"{engine}-{precision}"))
    return rows


def _measured(
    name: str, engine: str, precision: str, sources: dict[str, Path], data: Path, folder: Path
) -> tuple[str, ...]:
    begin = time.perf_counter()
    try:
        _, audit = build(sources[precision], engine, folder, data=str(data))
    except MpdeployError as error:
        return (name, engine, precision, "failed", "", "", "", error.message.splitlines()[0][:80], "")
    seconds = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in folder.glob("engine.*") if file.suffix != ".json") / 1e6
    drift = median = "not run here"
    if backend(engine).can_run() is None:
        found = compare(sources["fp32"], find_engine(folder).path, data=str(data))
        drift = f"{found.drift.rel_l2:.2g}"
        median = f"{bench(find_engine(folder).path, data=str(data), num_samples=30).to_json()['median_ms']:.3g}"
    layers = ", ".join(f"{count} {kind}" for kind, count in sorted(audit.count_by_precision().items()))
    return (name, engine, precision, f"{seconds:.1f}", f"{size:.1f}", drift, median, layers, audit.source)


if __name__ == "__main__":
    main()
