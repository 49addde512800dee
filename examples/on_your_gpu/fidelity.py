"""Part 2: is the emulated drift what half-precision hardware shows? The same mixed models, in real half on the GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from machine import Session

from mpdeploy.building import build
from mpdeploy.conversion import convert
from mpdeploy.emulated_runs import emulated_runner
from mpdeploy.engines import ENGINES, backend
from mpdeploy.engines.onnxruntime import OrtRunner, loads_cuda
from mpdeploy.errors import MpdeployError
from mpdeploy.measure.drift import drift_of
from mpdeploy.precision.formats import FORMATS
from mpdeploy.precision.model_io import load_model, save_model
from mpdeploy.precision.plan import make_plan
from mpdeploy.precision.rewrite import prepare, rewrite

NUM_SAMPLES = 32
LOST = 0.5
DRY_ARCHITECTURES = ("resnet", "bert", "mobilenetv2_uncalibrated")

Arrays = Mapping[str, np.ndarray]


def rel_l2(found: Arrays, golden: Arrays) -> float:
    """Of the worst output; infinite where a value is not finite."""
    return drift_of([(golden, found)]).rel_l2


def fidelity(session: Session) -> dict[str, Any]:
    """A row for each architecture and precision: emulated drift, and the drift of each runtime that computes half here."""
    from tests import zoo

    names = [name for name in zoo.NAMES if not session.dry or name in DRY_ARCHITECTURES]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for precision in ("fp16", "bf16"):
                row = session.measured(
                    f"fidelity {name} {precision}",
                    lambda name=name, precision=precision: _row(session, zoo, name, precision, Path(folder)),
                    needs_s=20,
                )
                if row is not None:
                    rows[f"{name} {precision}"] = row
    return rows


def _row(session: Session, zoo: Any, name: str, precision: str, folder: Path) -> dict[str, Any]:
    model = zoo.export(name, folder)
    if model is None:
        raise FileNotFoundError(f"the weights of {name} are not installed")
    feeds = model.feeds(4 if session.dry else NUM_SAMPLES, 5)
    np.savez(folder / "feeds.npz", **feeds)
    with OrtRunner(model.path) as runner:
        golden = dict(runner.infer(feeds))
    row: dict[str, Any] = {"output_values": int(sum(array.size for array in golden.values()))}
    mixed = folder / f"{name}.{precision}.onnx"
    if model.signal_lost_in_half:  # everything half, by hand: the question is whether both say that nothing is left
        save_model(_all_half(model.path, precision), mixed)
    else:
        convert(model.path, data=str(folder / "feeds.npz"), precision=precision, keep_io=True, output=mixed)  # type: ignore[arg-type]
    with emulated_runner(load_model(mixed)) as runner:
        row["emulated"] = rel_l2(runner.infer(feeds), golden)
    row["engines"] = {}
    for engine in ENGINES:
        with _opened(session, engine, mixed, feeds, folder) as opened:
            if opened is None:
                continue
            drift = rel_l2(opened.infer(feeds), golden)
            row["engines"][engine] = _judged(row["emulated"], drift)
    if name in zoo.TORCH_JUDGES:
        with emulated_runner(_all_half(model.path, precision)) as runner:
            row["emulated_all_half"] = rel_l2(runner.infer(feeds), golden)
        dtype = {"fp16": "float16", "bf16": "bfloat16"}[precision]
        answers = zoo.torch_in_half(name, dtype, feeds, device=session.device)
        drift = rel_l2(dict(zip(golden, answers, strict=True)), golden)
        row["torch_all_half"] = _judged(row["emulated_all_half"], drift)
    return row


def _judged(emulated: float, real: float) -> dict[str, Any]:
    both_lost = (emulated > LOST) == (real > LOST)
    ratio = emulated / real if np.isfinite(real) and np.isfinite(emulated) and real > 0 else None
    return {"drift": real, "ratio": ratio, "same_answer_on_lost": both_lost}


def _all_half(path: Path, precision: str) -> Any:
    half = FORMATS[precision]
    prepared = prepare(load_model(path), half)
    kept_io = [value.name or "" for value in (*prepared.model.graph.inputs, *prepared.model.graph.outputs)]
    return rewrite(prepared, make_plan(prepared.index, half, float_io=kept_io))


@contextmanager
def _opened(session: Session, engine: str, model: Path, feeds: Arrays, folder: Path) -> Iterator[Any]:
    """A runner that computes half on the GPU, or None with the reason noted once; on a dry run the CPU's runners stand in."""
    row = backend(engine)
    missing = row.available() or row.can_run()
    on_gpu = engine in ("tensorrt", "tensorrt-rtx") or (engine == "onnxruntime" and loads_cuda() is None)
    if missing is not None or (not on_gpu and not session.dry):
        why = missing.reason if missing is not None else "it computes on the CPU here, and not in half"
        note = {"what": f"fidelity in {engine}", "why": why}
        if note not in session.skipped:
            session.skipped.append(note)
        yield None
        return
    target = folder / f"{model.stem}.{engine}"
    try:
        built, _ = build(model, engine, target, data=str(folder / "feeds.npz"))
    except MpdeployError as error:
        session.skip(f"{model.stem} in {engine}", error.message.splitlines()[0])
        yield None
        return
    with row.load(built) as runner:
        yield runner
