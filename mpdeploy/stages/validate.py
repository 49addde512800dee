"""50-validate: every place of the run against the golden answers; per-sample numbers and raw latencies become evidence.

Deciding is not done here: `mpdeploy.gates` decides from the evidence, now and whenever it is asked again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, Dataset, Engine, FileArtifact, Golden, OnnxModel, Runner
from mpdeploy.engines import backend
from mpdeploy.environment import fingerprint, hardware_key, package_versions
from mpdeploy.gates.evidence import HARNESS_VERSION, INDEX, Evidence, Place, arrays_of_drift
from mpdeploy.measure import accuracy
from mpdeploy.measure.drift import DriftMeter
from mpdeploy.pipeline import Context, Outcome
from mpdeploy.run_dir import StageRecord

NAME = "50-validate"


class ValidateStage:
    """See the module's docstring."""

    name = NAME
    isolated = False

    def __init__(self, engines: tuple[str, ...]) -> None:
        self._engines = engines

    def key(self, context: Context) -> dict[str, Any]:
        """Every artifact that is measured, how it is measured, and the hardware it is measured on."""
        artifacts = {
            name: {key: item.sha256 for key, item in record.artifacts.items()}
            for name, record in context.run.records().items()
            if name != NAME and record.status == "done"
        }
        return {
            "artifacts": artifacts,
            "validation": context.pipeline.validation.to_json(),
            "harness": HARNESS_VERSION,
            "hardware": hardware_key(),
            "versions": package_versions(),
        }

    def run(self, context: Context) -> Outcome:
        """Measure every place and write the evidence."""
        measuring = _Measuring(context)
        places: list[Place] = []
        steps = 4 + len(self._engines)
        context.progress(0, steps, "parity of AMP and FP32")
        places += measuring.parity()
        context.progress(1, steps, "the FP32 ONNX model")
        places.append(measuring.onnx())
        for precision in measuring.half_precisions():
            context.progress(2, steps, f"emulating {precision}")
            places.append(measuring.emulated(precision))
        for number, name in enumerate(self._engines):
            context.progress(4 + number, steps, f"engine {name}")
            place = measuring.engine(name)
            if place is not None:
                places.append(place)
        evidence = Evidence(
            places={place.at: place for place in places},
            digests={"dataset": measuring.golden.dataset.digest, "golden": measuring.golden_file.sha256},
            environment=fingerprint(),
        )
        folder = context.run.folder("evidence")
        evidence.save(folder)
        report = {
            "places": {place.at: _summary(place) for place in places},
            "num_samples": len(measuring.golden.dataset),
            "metric": accuracy.metric_name(context.pipeline.validation.metric),
        }
        return Outcome({"evidence": FileArtifact.of(folder / INDEX)}, report)


class _Measuring:
    def __init__(self, context: Context) -> None:
        self.context = context
        self.config = context.pipeline.validation
        self.golden_file = context.run.artifact("20-export", "golden")
        self.golden = Golden.load(self.golden_file.path)
        self.dataset: Dataset = self.golden.dataset
        self.golden_scores = self._scores(self.golden.outputs)
        self.golden_predictions = accuracy.predictions(self.config.metric, self.golden.outputs)

    def _scores(self, outputs: Mapping[str, Array]) -> Array:
        return accuracy.score(self.config.metric, outputs, self.dataset.labels)

    def _notes(self, **more: Any) -> dict[str, Any]:
        return {"metric": accuracy.metric_name(self.config.metric), **more}

    def _record(self, name: str) -> StageRecord:
        record = self.context.run.record(name)
        assert record is not None
        return record

    def _scored(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """Scores and predictions beside the golden ones."""
        arrays: dict[str, Array] = {
            "ids": self.dataset.ids,
            "scores": self._scores(outputs),
            "baseline_scores": self.golden_scores,
        }
        predicted = accuracy.predictions(self.config.metric, outputs)
        if predicted is not None and self.golden_predictions is not None:
            arrays |= {"predictions": predicted, "baseline_predictions": self.golden_predictions}
        return arrays

    def _against_golden(self, runner: Runner) -> dict[str, Array]:
        meter = DriftMeter()
        parts: dict[str, list[Array]] = {}
        size, start = self.config.batch_size, 0
        for feeds in self.dataset.batches(size):
            found = {name: np.asarray(value) for name, value in runner.infer(feeds).items()}
            expected = {name: value[start : start + size] for name, value in self.golden.outputs.items()}
            meter.add(expected, {name: found[name] for name in expected})
            for name in expected:
                parts.setdefault(name, []).append(found[name])
            start += size
        outputs = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        return self._scored(outputs) | arrays_of_drift(meter.report())

    def _latency_feeds(self) -> dict[str, Array]:
        return {
            name: np.ascontiguousarray(array[: self.config.latency_batch])
            for name, array in self.dataset.inputs.items()
        }

    def parity(self) -> list[Place]:
        """What ships against the FP32 reference, both evaluated in FP32 by torch."""
        trained = self._record("10-train")
        facts = {
            "excess_zero_gradients": trained.report["excess_zero_gradients"],
            "num_skipped": trained.report["num_skipped"],
        }
        arrays = self._scored(self.golden.outputs)
        baseline = "golden"
        if "fp32_reference" in self._record("20-export").artifacts:
            path = self.context.run.artifact("20-export", "fp32_reference").path
            reference = Golden.load(path).outputs
            arrays["baseline_scores"] = self._scores(reference)
            predicted = accuracy.predictions(self.config.metric, reference)
            if predicted is not None:
                arrays["baseline_predictions"] = predicted
            baseline = "fp32-reference"
        else:  # nothing to compare scores with: only the facts are evidence
            arrays = {"ids": self.dataset.ids, "scores": self.golden_scores}
        return [
            Place(
                "parity", "fp32", "10-train", baseline=baseline, facts=facts, arrays=arrays,
                digests={"artifact": trained.artifacts["model"].sha256},
                notes=self._notes(trained_in=trained.report["choice"]["precision"]),
            )
        ]  # fmt: skip

    def onnx(self) -> Place:
        """The exported FP32 model in ONNX Runtime on the CPU."""
        from mpdeploy.engines.onnxruntime import OrtRunner

        model = self.context.run.artifact("20-export", "model")
        with OrtRunner(model.path) as runner:
            arrays = self._against_golden(runner)
        return Place(
            "onnx", "fp32", "20-export", arrays=arrays, facts={"size_bytes": model.path.stat().st_size},
            digests={"artifact": model.sha256}, notes=self._notes(role="the baseline of every latency"),
        )  # fmt: skip

    def half_precisions(self) -> list[str]:
        """Of the mixed models that were made."""
        return [name for name, item in self._record("30-convert").artifacts.items() if isinstance(item, OnnxModel)]

    def emulated(self, precision: str) -> Place:
        """A mixed model, rounding as half hardware would."""
        import onnx_ir as ir

        from mpdeploy.emulated_runs import emulated_runner

        model = self.context.run.artifact("30-convert", precision)
        with emulated_runner(ir.load(model.path)) as runner:
            arrays = self._against_golden(runner)
        kept = self._record("30-convert").report[precision]["kept"]
        return Place(
            f"emulated/{precision}", precision, "30-convert", arrays=arrays,
            facts={"size_bytes": model.path.stat().st_size, "num_kept": len(kept)}, digests={"artifact": model.sha256},
            notes=self._notes(),
        )  # fmt: skip

    def engine(self, name: str) -> Place | None:
        """An engine that was built, run where it can run; None where it was not built."""
        record = self.context.run.record(f"40-build/{name}")
        if record is None or record.status != "done":
            return None
        engine = self.context.run.artifact(record.name, "engine")
        assert isinstance(engine, Engine)
        audit = record.report["audit"]
        facts: dict[str, Any] = {"size_bytes": record.report["bytes"], "realised": audit["realised"]}
        facts |= {key: audit[key] for key in ("kept_in_half", "half_in_fp32")}
        digests = {"artifact": engine.sha256, "source": str(engine.sidecar.get("source_sha256", ""))}
        notes = self._notes(audit_source=audit["source"])
        at = f"engine/{name}"
        missing = backend(name).available() or backend(name).can_run()
        if missing is not None:
            notes |= {"unvalidated": missing.reason, "hint": missing.hint}
            return Place(
                at, engine.precision, record.name, status="unvalidated", facts=facts, digests=digests, notes=notes
            )
        arrays, latency_facts, latency_notes = self._run_engine(name, engine)
        return Place(
            at, engine.precision, record.name, arrays=arrays, facts=facts | latency_facts, digests=digests,
            notes=notes | latency_notes,
        )  # fmt: skip

    def _run_engine(self, name: str, engine: Engine) -> tuple[dict[str, Array], dict[str, Any], dict[str, Any]]:
        """Answers and latency. The baseline of the latency is the FP32 ONNX model in ONNX Runtime, interleaved."""
        from mpdeploy.engines.onnxruntime import OrtRunner
        from mpdeploy.measure.latency import measure_pair

        model = self.context.run.artifact("20-export", "model")
        with OrtRunner(model.path) as baseline, backend(name).load(engine) as runner:
            arrays = self._against_golden(runner)
            report = measure_pair(baseline, runner, self._latency_feeds(), self.config.latency_samples)
        arrays |= report.arrays()
        notes = {"latency_baseline": "onnx", "latency_warning": report.warning, "device": report.b.device}
        if name == "onnxruntime" and engine.precision == "fp32" and engine.sidecar.get("device") == "cpu":
            notes["latency_note"] = "the same runtime, precision and graph as its baseline: its ratio shows the noise"
        return arrays, report.facts(), notes


def _summary(place: Place) -> dict[str, Any]:
    drift = place.drift
    scores = place.arrays.get("scores")
    latency = place.arrays.get("latency_b_ms")
    flips = None
    if "predictions" in place.arrays and "baseline_predictions" in place.arrays:
        flips = int((place.arrays["predictions"] != place.arrays["baseline_predictions"]).sum())
    return {
        "status": place.status,
        "precision": place.precision,
        "rel_l2": None if drift is None else drift.rel_l2,
        "drift": None if drift is None else drift.to_json()["outputs"],
        "score": None if scores is None else float(np.mean(scores)),
        "flips": flips,
        "median_ms": None if latency is None else float(np.median(latency)),
    }
