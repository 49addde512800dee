"""Write three small run directories, as `mpdeploy train-and-export` would: runs/good, runs/drifted, runs/too_few.

Only what `mpdeploy gate` reads is in them: run.json and evidence/. No model, no engine, nothing but numpy is needed.
"""

from pathlib import Path

import numpy as np

from mpdeploy.artifact import FileArtifact
from mpdeploy.config import Gate
from mpdeploy.gates.evidence import Evidence, Place, arrays_of_drift
from mpdeploy.measure.drift import drift_of
from mpdeploy.run_dir import RunDir, StageRecord

GATES = (
    Gate(id="finite", metric="num_nonfinite", limit=0),
    Gate(id="accuracy", metric="score_drop", limit=0.02),
    Gate(id="drift", metric="rel_l2", limit=1e-2),
    Gate(id="latency", metric="latency_ratio", limit=1.0, advisory=True),
)
ENVIRONMENT = {"cpu": "the CPU of this example", "cores": 2, "gpus": [], "packages": {}}


def write_run(path: Path, *, num_samples: int, noise: float, num_flipped: int) -> None:
    """A run whose engine's outputs differ by `noise`, relatively, and are wrong on `num_flipped` samples more."""
    rng = np.random.default_rng(0)
    golden = rng.normal(size=(num_samples, 10))
    labels = golden.argmax(axis=1)
    found = golden * (1.0 + noise * rng.normal(size=golden.shape))
    classes = np.where(np.arange(num_samples) < num_flipped, (labels + 1) % 10, labels)
    spells = np.repeat(np.exp(0.02 * rng.normal(size=30)), 10)
    arrays = {
        "ids": np.arange(num_samples),
        "scores": (classes == labels) * 1.0,
        "baseline_scores": np.ones(num_samples),
        "predictions": classes,
        "baseline_predictions": labels,
        "latency_a_ms": 2.0 * spells * np.exp(0.02 * rng.normal(size=300)),
        "latency_b_ms": 1.1 * spells * np.exp(0.02 * rng.normal(size=300)),
        **arrays_of_drift(drift_of([({"logits": golden}, {"logits": found})])),
    }
    place = Place(
        "engine/tensorrt",
        "fp16",
        "40-build/tensorrt",
        facts={"latency_block_size": 10, "size_bytes": 1_000_000},
        arrays=arrays,
        notes={"metric": "top1"},
    )
    run = RunDir.create(path)
    evidence = Evidence({place.at: place}, {"dataset": "0" * 64}, ENVIRONMENT)
    evidence.save(path / "evidence")
    index = FileArtifact.of(path / "evidence" / "index.json")
    run.set_header(pipeline=path.name, gates=[gate.to_json() for gate in GATES], environment=ENVIRONMENT)
    run.put(StageRecord("50-validate", "done", {}, {"evidence": index}))


for name, choices in {
    "good": {"num_samples": 2000, "noise": 1e-3, "num_flipped": 4},
    "drifted": {"num_samples": 2000, "noise": 4e-2, "num_flipped": 90},
    "too_few": {"num_samples": 120, "noise": 1e-3, "num_flipped": 1},
}.items():
    write_run(Path("runs") / name, **choices)
    print(f"runs/{name}")
