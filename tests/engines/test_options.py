"""Build options: one way to say them for every engine, on the command line, in a pipeline and in a sidecar."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpdeploy.artifact import TensorSpec
from mpdeploy.config import BuildConfig
from mpdeploy.engines import ENGINES, backend
from mpdeploy.engines.base import ShapeRange
from mpdeploy.engines.onnxruntime import OrtOptions
from mpdeploy.engines.openvino import OpenVinoOptions
from mpdeploy.engines.options import BYTES, parse_assignments, read_options
from mpdeploy.engines.tensorrt import TENSORRT, TENSORRT_RTX
from mpdeploy.errors import ConfigError, UsageError


def test_assignments_are_split_at_the_first_equals_sign():
    given = parse_assignments(["tf32=true", "timing-cache=a=b.bin", "workspace_bytes=1GiB"])
    assert given == {"tf32": "true", "timing_cache": "a=b.bin", "workspace_bytes": "1GiB"}


@pytest.mark.parametrize("texts", [["tf32"], ["=true"], ["tf32="], ["tf32=true", "tf32=false"]])
def test_what_is_no_assignment_or_comes_twice_is_refused(texts):
    with pytest.raises(UsageError, match="--option"):
        parse_assignments(texts)


@pytest.mark.parametrize(
    ("text", "found"), [("1024", 1024), (1024, 1024), ("1kB", 1000), ("1.5GiB", 3 << 29), ("64 MiB", 64 << 20)]
)
def test_bytes_have_units(text, found):
    assert BYTES.read(text) == found


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_lists_options_that_explain_themselves(name):
    rows = backend(name).option_rows()
    assert rows
    for row in rows:
        assert row.takes
        assert row.text.endswith(".")
        json.dumps(row.to_json())


@pytest.mark.parametrize("name", ENGINES)
def test_an_unknown_option_is_refused_without_the_library_and_says_where_they_are_listed(name):
    with pytest.raises(ConfigError, match="has no build option 'thraeds'") as caught:
        backend(name).check_options({"thraeds": "1"})
    assert f"mpdeploy doctor --engine {name}" in str(caught.value.hint)


def test_every_engine_says_the_closest_name():
    for name, wrong, right in (("openvino", "thread", "threads"), ("tensorrt", "sparse_weight", "sparse_weights")):
        with pytest.raises(ConfigError) as caught:
            backend(name).check_options({wrong: "1"})
        assert right in str(caught.value.hint)


def test_texts_and_values_say_the_same():
    texts = {"threads": "2", "spinning": "OFF", "provider": "cpu"}
    values = {"threads": 2, "spinning": "off", "provider": "cpu"}
    read = [read_options(OrtOptions, given, title="t", engine="e") for given in (texts, values)]
    assert read[0] == read[1] == OrtOptions("cpu", 2, None, "off")


@pytest.mark.parametrize(
    ("options", "given"),
    [(OrtOptions, {"threads": 0}), (OrtOptions, {"provider": "tpu"}), (OpenVinoOptions, {"inference_precision": "f8"})],
)
def test_a_value_that_does_not_fit_is_refused_with_those_that_do(options, given):
    with pytest.raises(ConfigError) as caught:
        read_options(options, given, title="The library", engine="e")
    assert "The library's" in str(caught.value.hint)


def test_openvino_s_options_become_its_properties():
    config = OpenVinoOptions(threads=3, streams=2, pinning="off", cache_dir="c").to_config()
    assert config == {
        "PERFORMANCE_HINT": "LATENCY", "EXECUTION_MODE_HINT": "ACCURACY", "ENABLE_CPU_PINNING": False,
        "INFERENCE_NUM_THREADS": 3, "NUM_STREAMS": 2, "CACHE_DIR": "c",
    }  # fmt: skip
    retyped = OpenVinoOptions(inference_precision="bf16").to_config()
    assert retyped["INFERENCE_PRECISION_HINT"] == "bf16"
    assert "EXECUTION_MODE_HINT" not in retyped


def test_tensorrt_offers_what_the_library_has():
    names = {row.name for row in TENSORRT.option_rows()}
    assert names >= {
        "workspace_bytes", "builder_level", "version_compatible", "hardware_compatible", "refit", "strip", "weight_streaming",
        "timing_cache", "timing_cache_readonly", "compute_capabilities", "tf32", "sparse_weights",
    }  # fmt: skip
    lacking = {row.name for row in TENSORRT_RTX.option_rows() if row.lacking}
    assert {"timing_cache", "version_compatible", "hardware_compatible"} <= lacking
    assert "compute_capabilities" not in lacking


def test_a_pipeline_says_them_by_engine_and_the_config_s_json_keeps_them():
    config = BuildConfig(options={"tensorrt": {"tf32": True, "compute_capabilities": ["SM89"]}})
    assert json.loads(json.dumps(config.to_json()))["options"] == {
        "tensorrt": {"tf32": True, "compute_capabilities": ["SM89"]}
    }


def built(name: str, folder: Path, **options):
    from tensorrt_models import MLP, PROFILE, onnx_model

    row = backend(name)
    if row.available() is not None:
        pytest.skip(row.available().reason)
    return row.build(onnx_model(MLP, folder / "model.onnx"), PROFILE, options, folder)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("openvino", {"threads": "1", "cache_dir": "cache"}),
        ("onnxruntime", {"threads": "1", "inter_op_threads": "2", "spinning": "off"}),
    ],
)
def test_options_are_kept_in_the_sidecar_and_used_when_the_engine_is_loaded(name, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = built(name, tmp_path, **options)
    assert engine.sidecar["options"]["threads"] == 1
    with backend(name).load(engine) as runner:
        if name == "openvino":
            assert runner.compiled.get_property("INFERENCE_NUM_THREADS") == 1
            assert list((tmp_path / "cache").iterdir()), "the compiled model was kept"
        else:
            session_options = runner._session.get_session_options()
            assert (session_options.intra_op_num_threads, session_options.inter_op_num_threads) == (1, 2)


def test_an_input_that_is_given_twice_has_two_profiles():
    from tensorrt_models import PROFILE

    from mpdeploy.building import profile_of

    spec = TensorSpec("x", "float32", ("batch", 8))
    found = profile_of((spec,), ["x=1x8,1x8,1x8", "x=2x8,8x8,32x8"], None, where="here")["x"]
    assert found.to_json() == [[1, 8], [1, 8], [32, 8]]
    assert [part.best for part in found.parts] == [(1, 8), (8, 8)]
    assert ShapeRange.joined([PROFILE["x"]]) is PROFILE["x"]
