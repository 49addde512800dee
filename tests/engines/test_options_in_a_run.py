"""`BuildConfig.options` in a run: they reach their engine, and change it alone."""

from __future__ import annotations

import json

import pytest

import mpdeploy
from mpdeploy.errors import ConfigError
from mpdeploy.pipeline import Context, Silent
from mpdeploy.run_dir import RunDir
from mpdeploy.stages.build import BuildStage


@pytest.fixture
def context(run_copy):
    pipeline = mpdeploy.load_pipeline(run_copy.parent / "tiny.py")

    def make(run: RunDir, options: dict) -> Context:
        build = pipeline.build.model_copy(update={"options": options})
        return Context(run, pipeline.model_copy(update={"build": build}), Silent(), "40-build/openvino")

    with RunDir.open(run_copy) as run:
        yield lambda options: make(run, options)


def test_an_engine_s_options_reach_its_sidecar_and_its_audit_says_what_is_not_accounted_for(context, run_copy):
    outcome = BuildStage("openvino", asked_for=True).run(context({"openvino": {"threads": 1}}))
    written = json.loads((run_copy / "40-build" / "openvino" / "engine.json").read_text())
    assert written["options"]["threads"] == 1
    assert outcome.report["audit"]["kept_unaccounted"] == []


def test_options_are_part_of_what_their_engine_s_record_was_made_from_and_of_no_other_s(context):
    plain, changed = context({}), context({"openvino": {"threads": 1}})
    for engine, differs in (("openvino", True), ("onnxruntime", False)):
        stage = BuildStage(engine, asked_for=True)
        assert (stage.key(plain) != stage.key(changed)) == differs


def test_an_unknown_option_of_a_pipeline_is_refused_with_the_closest_names(context):
    with pytest.raises(ConfigError, match="OpenVINO has no build option 'thread'") as caught:
        BuildStage("openvino", asked_for=True).run(context({"openvino": {"thread": 1}}))
    assert "threads" in str(caught.value.hint)
