"""A model as packages hold it: the file, what it takes and answers, how it may be batched, and what the gates said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpdeploy.artifact import TensorSpec
from mpdeploy.serve.package.batching import Batching

ONNX = "onnx"
"""The exported FP32 model: no row of the engine table, and the fallback that every ONNX Runtime runs."""


@dataclass(frozen=True)
class PackagedModel:
    """One model of a package.

    Attributes:
        engine: a row of the engine table, or `onnx`.
        path: the file in the run, its digest checked.
        sha256: of the file.
        inputs: names, dtypes (of the engine itself) and shapes.
        outputs: as inputs.
        batching: from the engine's profile.
        place: where its evidence stands in gate.json: `engine/tensorrt`, `onnx`.
        verdict: pass or inconclusive; fail or unvalidated only where that was allowed.
        reasons: messages of the gates that did not pass.
        precision: `fp32`, `fp16` or `bf16`.
        sidecar: of the engine; empty for `onnx`.
    """

    engine: str
    path: Path
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batching: Batching
    place: str
    verdict: str
    reasons: tuple[str, ...] = ()
    precision: str = "fp32"
    sidecar: Mapping[str, Any] = field(default_factory=dict)

    def provenance(self) -> dict[str, Any]:
        """What it is and what was said of it, as plain JSON."""
        return {
            "engine": self.engine,
            "precision": self.precision,
            "sha256": self.sha256,
            "source_sha256": self.sidecar.get("source_sha256", self.sha256),
            "place": self.place,
            "verdict": self.verdict,
            "not_passed": list(self.reasons),
        }
