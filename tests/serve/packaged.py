"""Models as packages hold them, made without a run, for tests of what is written about them; and a run whose export was judged too."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper
from served import FLOAT, make_run, model_of

from mpdeploy.artifact import FileArtifact, TensorSpec
from mpdeploy.config import Gate
from mpdeploy.engines.base import ShapeRange
from mpdeploy.files import write_json
from mpdeploy.gates.evidence import Evidence, Place
from mpdeploy.gates.gate import decide, gate_json
from mpdeploy.run_dir import RunDir, StageRecord
from mpdeploy.serve.package.batching import batching_of
from mpdeploy.serve.package.models import PackagedModel

IMAGE = (TensorSpec("image", "float32", ("batch", 1, 8, 8)),)
LOGITS = (TensorSpec("logits", "float32", ("batch", 10)),)
IMAGES = {"image": ShapeRange((1, 1, 8, 8), (8, 1, 8, 8), (32, 1, 8, 8))}
IDS = (TensorSpec("ids", "int64", ("batch", "length")), TensorSpec("mask", "float16", ("batch", "length")))
VECTORS = (TensorSpec("vectors", "float32", ("batch", 384)),)
TEXTS = {
    "ids": ShapeRange((1, 4), (8, 64), (16, 256)),
    "mask": ShapeRange((1, 4), (8, 64), (32, 256)),
}
PLAN_SIDECAR = {
    "engine": "tensorrt",
    "library": "tensorrt",
    "library_version": "11.4.0.106",
    "device": {"name": "NVIDIA L4", "sm": 89, "memory_bytes": 24_000_000_000, "driver": "580.65.06", "cuda": "13.0"},
    "os": "Linux",
    "machine": "x86_64",
    "source_sha256": "5" * 64,
}


def model(
    folder: Path,
    engine: str,
    inputs: tuple[TensorSpec, ...] = IMAGE,
    outputs: tuple[TensorSpec, ...] = LOGITS,
    profile: dict[str, ShapeRange] | None = None,
    **more: Any,
) -> PackagedModel:
    """A model whose file holds some bytes."""
    content = f"what {engine} made".encode()
    path = folder / f"{engine}.engine"
    if engine == "onnx":
        path = folder / "onnx.onnx"
        graph = helper.make_graph([], "g", [], [])
        content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()
    path.write_bytes(content)
    return PackagedModel(
        engine=engine,
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        inputs=inputs,
        outputs=outputs,
        batching=batching_of(inputs, outputs, IMAGES if profile is None else profile, where=engine),
        place="onnx" if engine == "onnx" else f"engine/{engine}",
        **({"verdict": "pass", "precision": "fp16" if engine == "tensorrt" else "fp32"} | more),
        sidecar=PLAN_SIDECAR if engine == "tensorrt" else {},
    )


def judged_run(path: Path, engines: tuple[str, ...] = ("onnxruntime", "openvino")) -> Path:
    """A run of a small classifier of 8x8 images as `make_run` makes it, and the place `onnx` judged beside the engines."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((64, 10)).astype(np.float32), "shape": np.array([-1, 64], np.int64)}
    classifier = model_of(
        [
            helper.make_node("Reshape", ["image", "shape"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        {"image": (FLOAT, ["batch", 1, 8, 8])},
        {"logits": (FLOAT, ["batch", 10])},
        weights,
    )
    run = RunDir.open(make_run(path, classifier, engines=engines, name="tiny"))
    evidence = Evidence.load(path / "evidence")
    exported = run.artifact("20-export", "model")
    arrays = evidence.places[f"engine/{engines[0]}"].arrays
    place = Place("onnx", "fp32", "20-export", arrays=arrays, digests={"artifact": exported.sha256})
    evidence = Evidence({"onnx": place, **evidence.places}, evidence.digests, {})
    evidence.save(path / "evidence")
    run.put(StageRecord("50-validate", "done", {}, {"evidence": FileArtifact.of(path / "evidence/index.json")}))
    gates = [
        *(Gate(**item) for item in run.manifest["gates"]),
        Gate(id="drift", metric="rel_l2", limit=1e-3, at="onnx"),
    ]
    run.set_header(gates=[gate.to_json() for gate in gates])
    write_json(path / "gate.json", gate_json(decide(gates, evidence), evidence, "tiny", gates))
    return path
