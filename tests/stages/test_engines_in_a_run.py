"""40-build and 50-validate: one record an engine, and what an engine that fails or cannot run means for the run."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mpdeploy
from mpdeploy import conversion
from mpdeploy.engines.base import Unavailable
from mpdeploy.engines.openvino import OpenVinoBackend
from mpdeploy.engines.tensorrt import TENSORRT, TENSORRT_RTX
from mpdeploy.errors import BuildError, StageFailedError, UnavailableError
from mpdeploy.gates.evidence import Evidence
from mpdeploy.pipeline import Context, Silent
from mpdeploy.run_dir import RunDir
from mpdeploy.stages import build as stages_build
from mpdeploy.stages.build import BuildStage
from mpdeploy.stages.common import load_splits
from mpdeploy.stages.convert import ConvertStage
from mpdeploy.train_and_export import result_json

ENGINES = ["onnxruntime", "openvino"]


@pytest.fixture
def go(run_copy):
    """Run the finished run again, with one thing changed."""
    pipeline = mpdeploy.load_pipeline(run_copy.parent / "tiny.py")

    def run(**options):
        return mpdeploy.run(pipeline, run_copy, **{"engines": ENGINES, **options})

    return run


@pytest.fixture
def context(run_copy):
    pipeline = mpdeploy.load_pipeline(run_copy.parent / "tiny.py")
    with RunDir.open(run_copy) as run:
        yield Context(run, pipeline, Silent(), "test")


def status(path, name):
    record = RunDir.open(path).record(name)
    return None if record is None else record.status


def test_an_engine_that_cannot_be_built_fails_alone_and_the_others_are_judged(go, run_copy, monkeypatch):
    as_it_is = stages_build.build_isolated

    def fail(request, progress):
        if request.engine == "openvino":
            raise BuildError("unsupported op: Frobnicate", hint="update")
        return as_it_is(request, progress)

    with monkeypatch.context() as patch:
        patch.setattr(stages_build, "build_isolated", fail)
        result = go(start="40-build")
    assert list(result.failures) == ["40-build/openvino"]
    assert isinstance(result.error(), StageFailedError)
    assert "unsupported op: Frobnicate" in str(result.error())
    assert (status(run_copy, "40-build/openvino"), status(run_copy, "40-build/onnxruntime")) == ("failed", "done")
    assert "engine/onnxruntime" in result.gate["places"]
    assert "engine/openvino" not in result.gate["places"]
    assert (run_copy / "gate.json").is_file()
    row = next(row for row in result_json(result)["table"] if row["artifact"] == "openvino")
    assert (row["verdict"], row["message"]) == ("failed", "unsupported op: Frobnicate")
    again = go()
    assert again.error() is None
    assert set(again.cached) == {"10-train", "20-export", "30-convert", "40-build/onnxruntime"}


def test_an_engine_this_machine_lacks_is_recorded_with_the_reason_and_is_no_error(run_copy, monkeypatch):
    missing = Unavailable("openvino is not installed.", "pip install 'mpdeploy[cpu]'")
    monkeypatch.setattr(OpenVinoBackend, "available", lambda self: missing)
    monkeypatch.setattr("mpdeploy.engines.ENGINES", {
        name: row for name, row in mpdeploy.engines.ENGINES.items() if name in ENGINES
    })  # fmt: skip
    pipeline = mpdeploy.load_pipeline(run_copy.parent / "tiny.py")
    result = mpdeploy.run(pipeline, run_copy)
    assert result.error() is None
    record = RunDir.open(run_copy).record("40-build/openvino")
    assert record is not None
    assert (record.status, record.message, record.hint) == ("unavailable", missing.reason, missing.hint)
    assert set(result.cached) >= {"10-train", "20-export", "30-convert", "40-build/onnxruntime"}


def test_an_engine_that_is_asked_for_and_missing_stops_before_anything_runs(go, monkeypatch):
    monkeypatch.setattr(OpenVinoBackend, "available", lambda self: Unavailable("not here.", "install it"))
    with pytest.raises(UnavailableError, match=r"The engine 'openvino' was asked for: not here\.") as caught:
        go()
    assert (caught.value.exit_code, caught.value.hint) == (21, "install it")


def test_an_engine_that_became_available_is_built(go, run_copy):
    with RunDir.open(run_copy) as run:
        stage = BuildStage("openvino", asked_for=False)
        context = Context(run, mpdeploy.load_pipeline(run_copy.parent / "tiny.py"), Silent())
        here = stage.key(context)
    assert "unavailable" not in here
    assert here["versions"]["openvino"]
    assert set(here["versions"]) <= {"openvino", "mpdeploy"}, "another engine's version is no reason to build this one"


def test_an_engine_that_was_built_and_cannot_run_here_is_unvalidated_and_never_passes(go, run_copy, monkeypatch):
    monkeypatch.setattr(
        OpenVinoBackend, "can_run", lambda self: Unavailable("no device, says the test.", "take it there")
    )
    result = go(start="40-build/openvino")
    assert result.error() is None
    assert result.gate["unvalidated"] == ["engine/openvino"]
    verdicts = {
        item.verdict
        for item in result.verdicts
        if item.at == "engine/openvino" and item.id in ("finite", "drift", "accuracy")
    }
    assert verdicts == {"unvalidated"}
    assert result.chosen == "onnxruntime"
    monkeypatch.undo()
    there = go(start="50-validate")
    assert there.gate["unvalidated"] == []
    assert "pass" in {item.verdict for item in there.verdicts if item.at == "engine/openvino"}
    assert set(there.cached) >= {"10-train", "20-export", "30-convert", "40-build/openvino"}


@pytest.mark.skipif(
    TENSORRT_RTX.available() is not None or TENSORRT_RTX.can_run() is None, reason="needs TensorRT-RTX and no GPU"
)
def test_a_tensorrt_rtx_plan_built_without_a_gpu_is_listed_as_unvalidated(go, run_copy):
    result = go(engines=["onnxruntime", "tensorrt-rtx"])
    assert result.error() is None
    assert (result.verdict, result.gate["unvalidated"]) == ("pass", ["engine/tensorrt-rtx"])
    audit = RunDir.open(run_copy).record("40-build/tensorrt-rtx").report["audit"]
    assert (audit["source"], audit["kept_in_half"]) == ("network", [])
    assert audit["layers"].get("fp16", 0) > 0


@pytest.mark.skipif(TENSORRT.available() is None, reason="TensorRT is here")
def test_tensorrt_without_a_gpu_says_why(context):
    outcome = BuildStage("tensorrt", asked_for=False).run(context)
    assert outcome.status == "unavailable"
    assert outcome.message
    assert outcome.hint


def test_conversion_sees_calibration_samples_alone(context, monkeypatch):
    seen = []
    as_it_is = conversion.convert

    def watch(model, **options):
        seen.extend(np.concatenate([feed["image"] for feed in options["data"]]))
        return as_it_is(model, **options)

    monkeypatch.setattr(conversion, "convert", watch)
    outcome = ConvertStage(("onnxruntime",)).run(context)
    splits = load_splits(context.pipeline)
    images = {
        name: {image.tobytes() for image in getattr(splits, name).inputs["image"]} for name in ("calibration", "gate")
    }
    found = {image.tobytes() for image in seen}
    assert len(seen) == context.pipeline.convert.calibration_samples == outcome.report["calibration_samples"]
    assert found <= images["calibration"]
    assert not found & images["gate"]


def test_the_plan_names_every_kept_node_with_a_reason(context):
    with_keep = context.pipeline.model_copy(
        update={"convert": context.pipeline.convert.model_copy(update={"keep": ("op:Gemm",)})}
    )
    outcome = ConvertStage(("onnxruntime",)).run(Context(context.run, with_keep, Silent(), "30-convert"))
    plan = json.loads(outcome.artifacts["plan.fp16"].path.read_text())
    assert [(entry["op"], entry["reason"]) for entry in plan["keep"]] == [("Gemm", "user: kept by 'op:Gemm'")]
    assert plan["half"]
    assert "calibration" in plan["ranges_from"]


def test_training_s_ranges_reach_the_conversion(context, monkeypatch):
    given = {}
    as_it_is = conversion.convert
    monkeypatch.setattr(
        conversion, "convert", lambda model, **options: given.update(options["amax"]) or as_it_is(model, **options)
    )
    ConvertStage(("onnxruntime",)).run(context)
    handed = json.loads((context.run.path / "20-export" / "amax.json").read_text())["tensors"]
    assert given == handed
    assert len(handed) >= 3


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"convert": {"keep": ("op:Gemm",)}}, {"30-convert"}),
        ({"build": {"profile": (1, 4, 16)}}, {"40-build/onnxruntime", "40-build/openvino", "50-validate"}),
        ({"validation": {"batch_size": 16}}, {"50-validate"}),
    ],
)
def test_a_stage_runs_again_for_its_own_slice_of_the_config(run_copy, changes, changed):
    pipeline = mpdeploy.load_pipeline(run_copy.parent / "tiny.py")
    for section, fields in changes.items():
        pipeline = pipeline.model_copy(update={section: getattr(pipeline, section).model_copy(update=fields)})
    result = mpdeploy.run(pipeline, run_copy, engines=ENGINES)
    ran = set(RunDir.open(run_copy).records()) - set(result.cached)
    assert changed <= ran
    assert "10-train" not in ran
    assert "20-export" not in ran
    if "validation" in changes:
        assert ran == changed


def test_every_place_is_measured_against_golden_on_all_of_the_gate_s_samples(finished_run):
    evidence = Evidence.load(finished_run.path / "evidence")
    splits = load_splits(mpdeploy.load_pipeline(finished_run.pipeline))
    assert list(evidence.places) == ["parity", "onnx", "emulated/fp16", "engine/onnxruntime", "engine/openvino"]
    for at, place in evidence.places.items():
        np.testing.assert_array_equal(place.arrays["ids"], splits.gate.ids)
        assert place.baseline == ("fp32-reference" if at == "parity" else "golden")
        if at != "parity":
            assert place.drift is not None
            assert len(place.drift.outputs["logits"].sq_error) == 360
