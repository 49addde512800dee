"""A run directory with evidence, records, plans and golden samples, healthy or broken."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpdeploy.artifact import Dataset, Engine, Golden
from mpdeploy.config import DEFAULT_GATES, Gate
from mpdeploy.files import write_json
from mpdeploy.gates.evidence import Evidence, Place, arrays_of_drift
from mpdeploy.gates.gate import decide, gate_json
from mpdeploy.measure.drift import drift_of
from mpdeploy.run_dir import RunDir, StageRecord

N = 200


@dataclass
class Run:
    """What the renderers are given."""

    directory: RunDir
    gate: dict[str, Any]
    plans: dict[str, dict[str, Any]]
    golden: Golden


def _place(at: str, precision: str, noise: float, *, lost: int = 0, nan: bool = False, latency: bool = False) -> Place:
    rng = np.random.default_rng(1)
    golden = rng.normal(size=(N, 10))
    candidate = golden + noise * rng.normal(size=golden.shape)
    if nan:
        candidate[17, 3] = np.nan
    report = drift_of([({"logits": golden, "features": golden**2}, {"logits": candidate, "features": candidate**2})])
    before = golden.argmax(1)
    after = np.where(np.arange(N) < lost, (before + 1) % 10, before)
    arrays = {
        "ids": np.arange(N) + 1000,
        "scores": (after == before) * 1.0,
        "baseline_scores": np.ones(N),
        "predictions": after,
        "baseline_predictions": before,
        **arrays_of_drift(report),
    }
    if latency:
        arrays["latency_a_ms"] = 2.0 * np.exp(0.05 * rng.normal(size=300))
        arrays["latency_b_ms"] = 1.2 * np.exp(0.05 * rng.normal(size=300))
    facts: dict[str, Any] = {"kept_in_half": [], "latency_block_size": 10, "latency_includes_b": "the run and copies"}
    stage = "40-build/" + at.split("/")[1] if at.startswith("engine/") else "30-convert"
    return Place(
        at, precision, stage, facts=facts, arrays=arrays, digests={"artifact": "ab" * 32}, notes={"metric": "top1"}
    )


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """`make_run(broken=False, name=..., gates=...)`."""

    def make(
        *, broken: bool = False, name: str = "digits", gates: tuple[Gate, ...] = DEFAULT_GATES[:1] + DEFAULT_GATES[2:]
    ) -> Run:
        places = [
            _place("onnx", "fp32", 1e-7),
            _place("emulated/fp16", "fp16", 4e-4),
            _place("emulated/bf16", "bf16", 4e-3),
            _place(
                "engine/openvino", "bf16", 3e-2 if broken else 4e-3, lost=40 if broken else 0, nan=broken, latency=True
            ),
            Place(
                "engine/tensorrt-rtx", "fp16", "40-build/tensorrt-rtx", status="unvalidated", facts={"size_bytes": 9}
            ),
        ]
        environment = {"cpu": "Test CPU", "cores": 2, "gpus": [], "packages": {"numpy": "2.4", "onnx": "1.23"}}
        evidence = Evidence({place.at: place for place in places}, {"dataset": "cd" * 32}, environment)
        run = RunDir.create(tmp_path / name.replace("/", "-").replace("<", ""))
        evidence.save(run.path / "evidence")
        gate = gate_json(decide(gates, evidence), evidence, name, gates)
        write_json(run.path / "gate.json", gate)
        epochs = [
            {"epoch": n, "loss": 2.0 / n, "early_stopping_loss": 2.2 / n, "loss_scale": 2.0 ** (16 - n % 3)}
            for n in range(1, 9)
        ]
        run.put(
            StageRecord(
                "10-train", "done", {}, report={"history": epochs, "reference_history": epochs[:4]}, seconds=12.0
            )
        )
        path = run.folder("40-build/openvino") / "engine.xml"
        path.write_text("<engine/>")
        audit = {"source": "runtime_model", "bf16": 12, "fp32": 3}
        engine = Engine.of(path, sidecar={"engine": "openvino", "precision": "bf16"})
        run.put(StageRecord("40-build/openvino", "done", {}, {"engine": engine}, {"audit": audit}, 3.2))
        run.put(
            StageRecord("40-build/tensorrt", "unavailable", {}, message="no driver", hint="take it to a GPU machine")
        )
        plan = {
            "precision": "fp16",
            "ranges_from": "128 samples",
            "num_half": 9,
            "num_kept": 1,
            "half": [f"encoder/layer{n % 2}/MatMul_{n}" for n in range(9)],
            "keep": [
                {
                    "node": "encoder/layer0/Softmax",
                    "op": "Softmax",
                    "reason": "op: exp(x) exceeds 65504 above x = 11.09",
                }
            ],
            "notes": ["clamped 1 mask constant"],
        }
        rng = np.random.default_rng(0)
        dataset = Dataset({"image": rng.random((N, 1, 8, 8), dtype=np.float32)}, np.arange(N) + 1000, np.arange(N) % 10)
        return Run(run, gate, {"fp16": plan}, Golden(dataset, {"logits": rng.normal(size=(N, 10)).astype(np.float32)}))

    return make
