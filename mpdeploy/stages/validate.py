"""50-validate: every place of the run against the golden answers; per-sample numbers and raw latencies become evidence.

Deciding is not done here: `mpdeploy.gates` decides from the evidence, now and whenever it is asked again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, Dataset, Engine, FileArtifact, Golden, OnnxModel, Runner
from mpdeploy.engines import backend
from mpdeploy.environment import fingerprint, hardware_key, package_versions
from mpdeploy.errors import StageFailedError
from mpdeploy.files import write_json
from mpdeploy.gates.evidence import HARNESS_VERSION, INDEX, SAMPLES, Evidence, Place, arrays_of_drift
from mpdeploy.measure import accuracy
from mpdeploy.measure.corpus import CorpusDraws, corpus_draws, corpus_worth
from mpdeploy.measure.drift import DriftMeter
from mpdeploy.pipeline import Context, Outcome
from mpdeploy.run_dir import StageRecord
from mpdeploy.stages.command import command_of
from mpdeploy.stages.noise import batch_sweep, engine_noise, seed_noise, tf32_noise
from mpdeploy.stages.parity import seeds_place
from mpdeploy.stages.user_metrics import corpus_metric_name, resolved_corpus_metric, sample_groups, sample_texts

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
        places += seeds_place(context)
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
        _check_siblings(places)
        seeds = seed_noise(context, measuring.dataset, measuring.scored_by)
        tf32 = tf32_noise(context, measuring.dataset, context.pipeline.validation)
        places = [_with_floors(place, tf32, seeds) for place in places]
        evidence = Evidence(
            places={place.at: place for place in places},
            digests={"dataset": measuring.golden.dataset.digest, "golden": measuring.golden_file.sha256},
            environment=fingerprint(),
        )
        folder = context.run.folder("evidence")
        evidence.save(folder)
        artifacts = {"evidence": FileArtifact.of(folder / INDEX)}
        texts = sample_texts(context.pipeline.validation, measuring.dataset, places)
        if texts:
            write_json(folder / SAMPLES, {"texts": texts})
            artifacts["samples"] = FileArtifact.of(folder / SAMPLES)
        report = {
            "places": {place.at: _summary(place) for place in places},
            "command": command_of(sys.argv),
            "num_samples": len(measuring.golden.dataset),
            "metric": accuracy.metric_name(context.pipeline.validation.metric),
            "noise_floors": {
                place.at: found
                for place in places
                if (found := {key: value for key, value in place.facts.items() if key.startswith("noise_")})
            }
            | ({"seeds": seeds} if seeds else {})
            | ({"tf32": tf32} if tf32 else {}),
        }
        return Outcome(artifacts, report)


class _Measuring:
    def __init__(self, context: Context) -> None:
        self.context = context
        self.config = context.pipeline.validation
        self.golden_file = context.run.artifact("20-export", "golden")
        self.golden = Golden.load(self.golden_file.path)
        self.dataset: Dataset = self.golden.dataset
        self.golden_scores = self._scores(self.golden.outputs)
        self.golden_predictions = accuracy.predictions(self.config.metric, self.golden.outputs)
        self.golden_margins = accuracy.margins(self.config.metric, self.golden.outputs)
        self.groups = sample_groups(self.config, self.dataset)
        corpus_metric = self.config.corpus_metric
        self.corpus_metric = None if corpus_metric is None else resolved_corpus_metric(corpus_metric)
        self.golden_corpus = self._corpus(self.golden.outputs)
        self.corpus_worth = self._corpus_worth()

    def _corpus(self, outputs: Mapping[str, Array]) -> CorpusDraws | None:
        if self.corpus_metric is None:
            return None
        return corpus_draws(
            self.corpus_metric, outputs, self.dataset.labels, clusters=self.groups.get("clusters"),
            num_resamples=self.config.corpus_resamples,
        )  # fmt: skip

    def _corpus_worth(self) -> dict[str, Any]:
        """What one changed sample is worth to the corpus metric, as facts."""
        if self.corpus_metric is None:
            return {}
        found = corpus_worth(
            self.corpus_metric, self.golden.outputs, self.dataset.labels, clusters=self.groups.get("clusters")
        )
        return {
            "corpus_worth_largest": found.largest, "corpus_worth_typical": found.typical,
            "corpus_is_smooth": found.is_smooth,
        }  # fmt: skip

    def _corpus_facts(self, outputs: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Any]]:
        """The corpus metric here and of the golden answers: (arrays, facts)."""
        here, golden = self._corpus(outputs), self.golden_corpus
        if here is None or golden is None:
            return {}, {}
        arrays = {
            "corpus_draws": here.draws, "baseline_corpus_draws": golden.draws,
            "corpus_left_out": here.left_out, "baseline_corpus_left_out": golden.left_out,
        }  # fmt: skip
        facts = {
            "corpus_value": here.value, "baseline_corpus_value": golden.value, "corpus_num_units": here.num_units,
            "corpus_num_samples": len(self.dataset), **self.corpus_worth,
        }  # fmt: skip
        return arrays, facts

    def scored_by(self, outputs: Mapping[str, Array]) -> tuple[Array, Array | None]:
        """Scores and predicted classes of outputs."""
        return self._scores(outputs), accuracy.predictions(self.config.metric, outputs)

    def _scores(self, outputs: Mapping[str, Array]) -> Array:
        return accuracy.score(self.config.metric, outputs, self.dataset.labels)

    def _notes(self, **more: Any) -> dict[str, Any]:
        if self.config.corpus_metric is not None:
            more["corpus_metric"] = corpus_metric_name(self.config.corpus_metric)
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
            **self.groups,
        }
        predicted = accuracy.predictions(self.config.metric, outputs)
        if predicted is not None and self.golden_predictions is not None:
            arrays |= {"predictions": predicted, "baseline_predictions": self.golden_predictions}
        here = accuracy.margins(self.config.metric, outputs)
        if here is not None and self.golden_margins is not None:
            arrays |= {"margins": here, "baseline_margins": self.golden_margins}
        return arrays

    def _against_golden(self, runner: Runner) -> tuple[dict[str, Array], dict[str, Any]]:
        """Scores, drift and the corpus metric of a runner's answers: (arrays, facts)."""
        meter = DriftMeter()
        parts: dict[str, list[Array]] = {}
        size, start = self.config.batch_size, 0
        for feeds in self.dataset.batches(size):
            found = {name: np.asarray(value) for name, value in runner.infer(feeds).items()}
            expected = {name: value[start : start + size] for name, value in self.golden.outputs.items()}
            if lacking := sorted(expected.keys() - found.keys()):
                raise StageFailedError(
                    f"The answers lack the output{'s' if len(lacking) > 1 else ''} {', '.join(lacking)}; found: "
                    f"{', '.join(found) or 'none'}.",
                    hint="the engine was built from another model, or lost an output: build it again with --from 40-build",
                )
            meter.add(expected, {name: found[name] for name in expected})
            for name in expected:
                parts.setdefault(name, []).append(found[name])
            start += size
        outputs = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        arrays, facts = self._corpus_facts(outputs)
        return self._scored(outputs) | arrays_of_drift(meter.report()) | arrays, facts

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
            margins = accuracy.margins(self.config.metric, reference)
            if margins is not None:
                arrays["baseline_margins"] = margins
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
            arrays, facts = self._against_golden(runner)
        return Place(
            "onnx", "fp32", "20-export", arrays=arrays, facts=facts | {"size_bytes": model.path.stat().st_size},
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
            arrays, facts = self._against_golden(runner)
        kept = self._record("30-convert").report[precision]["kept"]
        return Place(
            f"emulated/{precision}", precision, "30-convert", arrays=arrays,
            facts=facts | {"size_bytes": model.path.stat().st_size, "num_kept": len(kept)},
            digests={"artifact": model.sha256},
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
        facts |= {key: audit[key] for key in ("kept_in_half", "half_in_fp32", "kept_unaccounted")}
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
            arrays, facts = self._against_golden(runner)
            report = measure_pair(baseline, runner, self._latency_feeds(), self.config.latency_samples)
            sweep = batch_sweep(runner, self.dataset, self._sweep_batches(engine))
        arrays |= report.arrays()
        facts |= report.facts() | engine_noise(self.context, engine, self.dataset, self.config)
        if sweep:
            facts["batch_sweep"] = sweep
        notes = {"latency_baseline": "onnx", "latency_warning": report.warning, "device": report.b.device}
        if name == "onnxruntime" and engine.precision == "fp32" and engine.sidecar.get("device") == "cpu":
            notes["latency_note"] = "the same runtime, precision and graph as its baseline: its ratio shows the noise"
        return arrays, facts, notes

    def _sweep_batches(self, engine: Engine) -> list[int]:
        """The batches asked for that the engine's profile allows and the samples fill."""
        profile = engine.sidecar.get("profile") or {}
        largest = min([len(self.dataset), *(int(shapes[2][0]) for shapes in profile.values() if shapes[2])])
        smallest = max([1, *(int(shapes[0][0]) for shapes in profile.values() if shapes[0])])
        return [batch for batch in self.config.sweep_batches if smallest <= batch <= largest]


SAMPLED = ("scores", "baseline_scores", "predictions", "baseline_predictions", "corpus_draws", "clusters")


def _check_siblings(places: Sequence[Place]) -> None:
    """Refuse a place that lost a metric which its siblings, measured on the same samples, have: a gate would look past it.

    Raises:
        StageFailedError: with the place and what it lacks.
    """
    siblings = [place for place in places if place.status == "measured" and place.baseline == "golden"]
    answered = [place for place in siblings if any(name.startswith("drift/") for name in place.arrays)]

    def metrics(place: Place) -> set[str]:
        return {name for name in place.arrays if name in SAMPLED or name.startswith(("drift/", "slice/"))}

    everything = set().union(*(metrics(place) for place in answered))
    for place in siblings:
        lacking = sorted(everything - metrics(place))
        if lacking and (place in answered or place.at.startswith(("engine/", "emulated/", "onnx"))):
            raise StageFailedError(
                f"`{place.at}` was measured without {', '.join(lacking[:4])}, which its siblings have: a metric was lost.",
                hint="look at the engine's outputs and at what the metric function returns for them",
            )


def _with_floors(place: Place, tf32: Mapping[str, Any], seeds: Mapping[str, Any]) -> Place:
    """The place with the noise floors of the whole run among its facts: a limit may be a multiple of them."""
    if place.status != "measured" or place.baseline != "golden" or place.at.startswith("parity"):
        return place
    found = {"noise_tf32_rel_l2": tf32.get("rel_l2"), "noise_seeds_score": seeds.get("spread")}
    return replace(place, facts={**place.facts, **{name: value for name, value in found.items() if value is not None}})


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
