"""The two models of the benchmark, as ONNX files and as runs that `mpdeploy serve` takes: their engines passed a gate on real outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from mpdeploy.artifact import Dataset, FileArtifact, Golden, OnnxModel
from mpdeploy.building import describe_model
from mpdeploy.config import Gate
from mpdeploy.engines import backend
from mpdeploy.engines.base import default_profile
from mpdeploy.files import write_json
from mpdeploy.gates.evidence import Evidence, Place, arrays_of_drift
from mpdeploy.gates.gate import decide, gate_json
from mpdeploy.measure.drift import drift_of
from mpdeploy.run_dir import RunDir, StageRecord

SAMPLE_SHAPES = {"mlp": (784,), "cnn": (1, 28, 28), "sums": (256,), "heavy": (256,)}


def make_model(name: str) -> onnx.ModelProto:
    """`mlp`: 784-512-512-10. `cnn`: two convolutions, about 0.12 ms a sample. `sums`: y = 2x and the sum of each sample, which
    prove whose an answer is. `heavy`: the same, and some milliseconds of matrix products."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    outputs = {"y": 10}
    if name == "mlp":
        text = "h0 = MatMul(x, w0) r0 = Relu(h0) h1 = MatMul(r0, w1) r1 = Relu(h1) y = MatMul(r1, w2)"
        weights = {"w0": weight(512, 784).T, "w1": weight(512, 512).T, "w2": weight(10, 512).T}
    elif name == "cnn":
        text = """c0 = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w0) r0 = Relu(c0)
            p0 = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r0)
            c1 = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(p0, w1) r1 = Relu(c1)
            p1 = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r1) f = Flatten(p1) y = MatMul(f, w2)"""
        weights = {"w0": weight(32, 1, 3, 3), "w1": weight(64, 32, 3, 3), "w2": weight(10, 64 * 49).T}
    else:
        text = "y = Add(x, x) total = ReduceSum<keepdims = 0>(x, axes)"
        weights = {"axes": np.array([1], np.int64)}
        outputs = {"y": 256, "total": 0}
        if name == "heavy":
            text += " h0 = MatMul(x, w0) h1 = MatMul(h0, w1) h2 = MatMul(h1, w2) z = MatMul(h2, w3)"
            sizes = (256, 2500, 2500, 2500, 4)
            weights |= {f"w{i}": weight(sizes[i + 1], sizes[i]).T for i in range(4)}
            outputs["z"] = 4
    shape = ", ".join(map(str, ("N", *SAMPLE_SHAPES[name])))
    results = ", ".join(f"float[N{f', {size}' if size else ''}] {key}" for key, size in outputs.items())
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 20]> g (float[{shape}] x) => ({results}) {{ {text} }}'
    )
    model.graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(a), key) for key, a in weights.items())
    return model


def make_run(folder: Path, name: str, batches: tuple[int, int, int] = (1, 8, 32)) -> Path:
    """A run of the model: exported, built for ONNX Runtime, its outputs compared with the golden ones, its gate decided."""
    run = RunDir.create(folder)
    file = run.folder("20-export") / "model.fp32.onnx"
    onnx.save(make_model(name), file)
    described = describe_model(file)
    exported = OnnxModel(described.path, described.sha256, described.inputs, described.outputs, {"precision": "fp32"})
    samples = {"x": np.random.default_rng(1).standard_normal((8, *SAMPLE_SHAPES[name])).astype(np.float32)}
    row, at = backend("onnxruntime"), "engine/onnxruntime"
    profile = default_profile(exported.inputs, batches, {"x": samples["x"].shape})
    built = row.build(exported, profile, {}, run.folder("40-build/onnxruntime"))
    with row.load(built) as runner:
        outputs = dict(runner.infer(samples))
    golden = Golden(Dataset(samples, np.arange(8)), outputs)
    golden.save(run.path / "20-export" / "golden.npz")
    answers = FileArtifact.of(run.path / "20-export" / "golden.npz")
    with row.load(built) as runner:
        drift = drift_of([(golden.outputs, dict(runner.infer(samples)))])
    gates = [Gate(id="drift", metric="rel_l2", limit=1e-3, at=at)]
    place = Place(
        at, "fp32", "40-build/onnxruntime", status="measured", arrays=arrays_of_drift(drift),
        digests={"artifact": built.sha256, "source": exported.sha256},
    )  # fmt: skip
    evidence = Evidence({at: place}, {"golden": answers.sha256}, {})
    evidence.save(run.folder("evidence"))
    run.put(StageRecord("20-export", "done", {}, {"model": exported, "golden": answers}))
    run.put(StageRecord("40-build/onnxruntime", "done", {}, {"engine": built}))
    index = FileArtifact.of(run.path / "evidence" / "index.json")
    run.put(StageRecord("50-validate", "done", {}, {"evidence": index}))
    run.set_header(pipeline=name, gates=[gate.to_json() for gate in gates], chosen_engine="onnxruntime")
    write_json(run.path / "gate.json", gate_json(decide(gates, evidence), evidence, name, gates))
    return folder


RAW = """
import json, sys, time
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
shape = json.loads(sys.argv[2])
found = {}
for batch in (1, 32):
    feed = {"x": np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)}
    for _ in range(20):
        session.run(None, feed)
    times, begin, cpu = [], time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < float(sys.argv[3]):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    median_ms = 1e3 * sorted(times)[len(times) // 2]
    rate, cpu_us = batch * len(times) / seconds, 1e6 * cpu / (batch * len(times))
    found[batch] = {"samples_per_s": rate, "p50_ms": median_ms, "cpu_us": cpu_us}
print(json.dumps(found))
"""
"""A process that runs the model alone, in batches of 1 and of 32, and prints samples a second and the median of one run."""
