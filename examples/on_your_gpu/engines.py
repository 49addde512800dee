"""Part 3: engines of a ResNet and a BERT, built, audited, checked and timed against torch and against FP32."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from amp import Workload, workloads
from fidelity import rel_l2
from machine import Session

from mpdeploy.building import build
from mpdeploy.conversion import convert
from mpdeploy.engines import ENGINES, backend
from mpdeploy.engines.onnxruntime import OrtRunner
from mpdeploy.export.to_onnx import export_onnx
from mpdeploy.measure.latency import measure_one
from mpdeploy.train.precision import PrecisionChoice, float32_arithmetic

GRAPHS = ("tensorrt", "tensorrt-rtx")


def engines(session: Session, root: Path) -> dict[str, Any]:
    """By model: a row for torch eager and compiled, and one for every engine, in FP32 and mixed."""
    found = {}
    for workload in workloads(root, session.dry)[2:]:
        rows = session.measured(f"engines of {workload.name}", lambda w=workload: _rows(session, w), needs_s=60)
        if rows is not None:
            found[workload.name] = rows
    return found


def _rows(session: Session, workload: Workload) -> list[dict[str, Any]]:
    batch = 2 if session.dry else 8
    inputs = {f"input{i}": value[:batch].numpy() for i, value in enumerate(workload.inputs)}
    torch.manual_seed(0)
    model = workload.make().eval()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fp32, fp16 = folder / "model.fp32.onnx", folder / "model.fp16.onnx"
        samples = {key: value[: max(batch, 2)] for key, value in inputs.items()}
        export_onnx(model, samples, fp32, opset=20, output_names=["logits"])
        np.savez(folder / "feeds.npz", **inputs)
        convert(fp32, data=str(folder / "feeds.npz"), keep_io=True, output=fp16)
        with OrtRunner(fp32) as runner:
            golden = dict(runner.infer(inputs))
        for precision, compiled in ((None, False), (None, True), (torch.float16, False), (torch.float16, True)):
            label = f"torch {'compiled' if compiled else 'eager'}{', fp16 autocast' if precision else ', fp32'}"
            row = session.measured(
                f"{workload.name}, {label}",
                lambda p=precision, c=compiled: _torch_row(session, model, inputs, golden, p, compiled=c),
            )
            if row is not None:
                rows.append({"runs": label, "batch": batch} | row)
        for engine in ENGINES:
            missing = backend(engine).available() or backend(engine).can_run()
            if missing is not None:
                session.skip(f"{workload.name} in {engine}", missing.reason)
                continue
            for path in (fp32, fp16):
                for graph in (False, True) if engine in GRAPHS else (False,):
                    label = f"{engine}, {path.stem.split('.')[-1]}{', CUDA graph' if graph else ''}"
                    row = session.measured(
                        f"{workload.name}, {label}",
                        lambda e=engine, p=path, g=graph: _engine_row(session, e, p, g, inputs, golden, folder),
                        needs_s=30,
                    )
                    if row is not None:
                        rows.append({"runs": label, "batch": batch} | row)
    return rows


def _engine_row(
    session: Session, engine: str, model: Path, graph: bool, inputs: Any, golden: Any, folder: Path
) -> dict[str, Any]:
    options = {"cuda_graph": True} if graph else {}
    begin = time.perf_counter()
    target = folder / f"{model.stem}.{engine}.{graph}"
    built, audit = build(model, engine, target, data=str(folder / "feeds.npz"), options=options)
    seconds = time.perf_counter() - begin
    with backend(engine).load(built) as runner:
        drift = rel_l2(runner.infer(inputs), golden)
        report = measure_one(runner, inputs, 20 if session.dry else 300)
    return {
        "median_ms": report.median_ms, "p99_ms": report.p99_ms, "includes": report.includes, "rel_l2": drift,
        "build_s": seconds, "bytes": built.path.stat().st_size, "layers": audit.count_by_precision(),
        "realised": audit.realised, "source": audit.source,
    }  # fmt: skip


def _torch_row(
    session: Session, model: torch.nn.Module, inputs: Any, golden: Any, precision: Any, *, compiled: bool
) -> dict[str, Any]:
    moved = model.to(session.device)
    call: Callable[..., Any] = moved
    if compiled:
        call = torch.compile(moved, backend="aot_eager" if session.dry else "inductor", mode=None)
    given = [torch.from_numpy(value).to(session.device) for value in inputs.values()]
    # a CPU's autocast to FP16 is no path that anyone takes: BF16 stands in on a dry run
    dtype = torch.bfloat16 if precision is not None and session.device == "cpu" else precision
    times = []
    fp32 = float32_arithmetic(PrecisionChoice("fp32", session.device, "no TF32 unless it is said", {}))
    with fp32, torch.inference_mode(), torch.autocast(session.device, dtype=dtype, enabled=dtype is not None):
        for _ in range(2 if session.dry else 20):
            answer = call(*given)
        for _ in range(5 if session.dry else 300):
            times.append(_once_ms(session.device, lambda: call(*given)))
    torch._dynamo.reset()
    drift = rel_l2({"logits": answer.float().cpu().numpy()}, golden)
    what = "forward between CUDA events; no copies" if session.device == "cuda" else "forward by the clock"
    return {
        "median_ms": statistics.median(times),
        "p99_ms": float(np.quantile(times, 0.99)) if len(times) >= 299 else None,
        "rel_l2": drift,
        "includes": what,
    }


def _once_ms(device: str, run: Callable[[], Any]) -> float:
    if device != "cuda":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    begin_mark, end_mark = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin_mark.record()
    run()
    end_mark.record()
    end_mark.synchronize()
    return float(begin_mark.elapsed_time(end_mark))
