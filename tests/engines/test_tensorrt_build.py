"""Real builds with TensorRT-RTX, which needs no GPU for them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from tensorrt_models import (
    DOUBLE,
    MISTYPED,
    MIXED,
    MLP,
    PROFILE,
    SHAPE_INPUT,
    UNKNOWN_OPERATOR,
    onnx_model,
)

from mpdeploy.artifact import Engine
from mpdeploy.engines.base import ShapeRange, Unavailable
from mpdeploy.engines.tensorrt import TENSORRT, TENSORRT_RTX, TensorRTBackend, read_header
from mpdeploy.engines.tensorrt.driver import probe_gpu
from mpdeploy.errors import BuildError, ConfigError, ModelError, UnavailableError

_PROBLEM = TENSORRT_RTX.available()
pytestmark = pytest.mark.skipif(_PROBLEM is not None, reason=_PROBLEM.reason if _PROBLEM else "")
HAS_GPU = not isinstance(probe_gpu(), Unavailable)


@pytest.fixture
def only_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audit as on a machine without a GPU."""
    monkeypatch.setattr(TensorRTBackend, "can_run", lambda self: Unavailable("no GPU, says the test", ""))


def build(text: str, folder: Path, profile=PROFILE, backend: TensorRTBackend = TENSORRT_RTX, **options) -> Engine:
    return backend.build(onnx_model(text, folder / "model.onnx"), profile, options, folder)


def test_a_build_writes_a_plan_whose_header_gives_the_library_s_version(tmp_path):
    import tensorrt_rtx_bindings as trt

    engine = build(MLP, tmp_path)
    header = read_header(engine.path)
    assert engine.path == tmp_path / "engine.plan"
    assert header.engine == "tensorrt-rtx"
    assert ".".join(map(str, header.version)) == trt.__version__
    assert header.size_bytes == engine.path.stat().st_size
    assert engine.verified() is engine


def test_the_sidecar_says_what_the_plan_was_made_of(tmp_path):
    model = onnx_model(MIXED, tmp_path / "model.onnx", precision="fp16")
    engine = TENSORRT_RTX.build(model, PROFILE, {"builder_level": 2, "sparse_weights": True}, tmp_path)
    written = json.loads((tmp_path / "engine.json").read_text())
    assert written == {**engine.sidecar, "sha256": engine.sha256}
    assert (engine.backend, engine.precision) == ("tensorrt-rtx", "fp16")
    assert written["source_sha256"] == model.sha256
    assert (tmp_path / written["source"]).samefile(model.path)
    assert written["options"]["builder_level"] == 2
    assert "SPARSE_WEIGHTS" in written["flags"]
    assert written["profile"] == {"x": [[1, 8], [4, 8], [16, 8]]}
    assert written["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 8]}]
    assert written["outputs"] == [{"name": "y", "dtype": "float32", "shape": ["batch", 4]}]


def test_the_specs_come_from_the_network_where_the_model_has_none(tmp_path):
    model = onnx_model(MLP, tmp_path / "model.onnx")
    bare = type(model).of(model.path)
    engine = TENSORRT_RTX.build(bare, PROFILE, {}, tmp_path)
    assert [str(spec) for spec in (*engine.inputs, *engine.outputs)] == ["x: float32[batch, 8]", "y: float32[?, 4]"]


@pytest.mark.usefixtures("only_network")
def test_an_fp32_graph_is_audited_as_fp32(tmp_path):
    audit = TENSORRT_RTX.audit(build(MLP, tmp_path))
    assert (audit.source, audit.realised) == ("network", False)
    assert audit.of_nodes() == {"first": "fp32", "act": "fp32", "second": "fp32"}
    assert audit.count_by_precision() == {"fp32": 3}


@pytest.mark.usefixtures("only_network")
def test_a_mixed_graph_is_audited_node_by_node(tmp_path):
    audit = TENSORRT_RTX.audit(build(MIXED, tmp_path))
    assert audit.of_nodes() == {
        "to_half": "fp16",
        "first": "fp16",
        "act": "fp16",
        "second": "fp16",
        "to_full": "fp32",
        "kept": "fp32",
    }


@pytest.mark.usefixtures("only_network")
def test_tf32_is_off_unless_asked_for_and_then_the_audit_says_so(tmp_path):
    (tmp_path / "off").mkdir()
    (tmp_path / "on").mkdir()
    off, on = build(MLP, tmp_path / "off"), build(MLP, tmp_path / "on", tf32=True)
    assert "TF32" not in off.sidecar["flags"]
    assert "TF32" in on.sidecar["flags"]
    assert TENSORRT_RTX.audit(on).of_nodes() == {"first": "tf32", "act": "fp32", "second": "tf32"}


def test_a_type_mismatch_names_the_node_its_operator_and_the_parser_s_line(tmp_path):
    with pytest.raises(BuildError) as caught:
        build(MISTYPED, tmp_path)
    assert "node 'mix' (Add, number 1)" in caught.value.message
    assert "must have same input types. But they are of types Half and Float" in caught.value.message
    assert "ModelImporter.cpp:" in caught.value.message
    assert "CUDA driver" not in caught.value.message  # the library's noise on machines without one
    assert "cast one input" in caught.value.hint
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.onnx"]


def test_an_unknown_operator_is_named(tmp_path):
    with pytest.raises(BuildError, match=r"node 'strange' \(NoSuchOperator, number 0\)") as caught:
        build(UNKNOWN_OPERATOR, tmp_path)
    assert "no such operator" in caught.value.hint


def test_each_build_reports_its_own_errors_only(tmp_path):
    for text, own, other in ((MISTYPED, "'mix'", "'strange'"), (UNKNOWN_OPERATOR, "'strange'", "'mix'")):
        with pytest.raises(BuildError) as caught:
            build(text, tmp_path)
        assert own in caught.value.message
        assert other not in caught.value.message
    assert build(MLP, tmp_path).sidecar["warnings"] == []


def test_a_missing_model_file_is_said_to_be_missing(tmp_path):
    model = onnx_model(MLP, tmp_path / "model.onnx")
    model.path.unlink()
    with pytest.raises(BuildError, match="cannot be found"):
        TENSORRT_RTX.build(model, PROFILE, {}, tmp_path)


def test_weights_in_external_data_are_found_beside_the_model(tmp_path):
    model = onnx_model(MLP, tmp_path / "model.onnx", external=True)
    assert len([item for item in tmp_path.iterdir() if item != model.path]) > 0
    assert TENSORRT_RTX.build(model, PROFILE, {}, tmp_path).path.is_file()


def test_progress_tells_phases_and_steps(tmp_path):
    steps: list[tuple[str, int, int]] = []
    build(MLP, tmp_path, backend=TENSORRT_RTX.with_progress(lambda *step: steps.append(step)))
    assert "Building engine" in {phase for phase, _, _ in steps}
    assert all(1 <= done <= total for _, done, total in steps)
    assert TENSORRT_RTX.on_progress is None


def test_a_callback_that_returns_false_cancels_the_build(tmp_path):
    calls: list[str] = []

    def stop_at_second(phase: str, done: int, total: int) -> bool:
        calls.append(phase)
        return len(calls) < 2

    with pytest.raises(BuildError, match="cancelled at '"):
        build(MLP, tmp_path, backend=TENSORRT_RTX.with_progress(stop_at_second))
    assert len(calls) == 2
    assert not (tmp_path / "engine.plan").exists()


def test_a_callback_s_own_exception_comes_out_of_the_build(tmp_path):
    def broken(phase: str, done: int, total: int) -> None:
        raise LookupError("the callback's own")

    with pytest.raises(LookupError, match="the callback's own"):
        build(MLP, tmp_path, backend=TENSORRT_RTX.with_progress(broken))


def test_ctrl_c_cancels_the_build_and_comes_out_as_keyboard_interrupt(tmp_path):
    calls: list[str] = []

    def interrupt(phase: str, done: int, total: int) -> None:
        calls.append(phase)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build(MLP, tmp_path, backend=TENSORRT_RTX.with_progress(interrupt))
    assert len(calls) == 1  # the second step was not reached
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "engine.plan").exists()


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({}, "The input 'x: float32[batch, 8]' has a dynamic shape and the profile gives no range for it."),
        ({"z": ShapeRange((1, 8), (4, 8), (16, 8))}, "The profile names 'z', which is no input of the model."),
        ({"x": ShapeRange((1, 9), (4, 9), (16, 9))}, "The profile x=1x9,4x9,16x9 does not fit the input"),
        ({"x": ShapeRange((1,), (4,), (16,))}, "The profile x=1,4,16 does not fit the input"),
        ({"x": ShapeRange((4, 8), (1, 8), (16, 8))}, "The profile x=4x8,1x8,16x8 is not in order."),
    ],
)
def test_a_profile_that_does_not_fit_is_refused_in_words(tmp_path, profile, message):
    with pytest.raises(ConfigError) as caught:
        build(MLP, tmp_path, profile=profile)
    assert message in caught.value.message
    assert caught.value.hint


def test_ranges_that_are_joined_become_one_optimisation_profile_each(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    parts = [ShapeRange((1, 8), (1, 8), (1, 8)), ShapeRange((2, 8), (4, 8), (16, 8))]
    one = build(MLP, tmp_path / "one", profile={"x": ShapeRange((1, 8), (1, 8), (16, 8))})
    two = build(MLP, tmp_path / "two", profile={"x": ShapeRange.joined(parts)})
    assert two.sidecar["profile"] == one.sidecar["profile"] == {"x": [[1, 8], [1, 8], [16, 8]]}
    assert two.sidecar["profiles"] == {"x": [part.to_json() for part in parts]}
    assert two.path.stat().st_size > one.path.stat().st_size, "kernels for a second profile"


def test_inputs_with_different_numbers_of_profiles_are_refused(tmp_path):
    shapes = ShapeRange((1, 8), (4, 8), (16, 8))
    profile = {"x": ShapeRange.joined([shapes] * 2), "k": ShapeRange.joined([shapes] * 3)}
    with pytest.raises(ConfigError, match=r"different numbers of profiles: x: 2, k: 3"):
        build(DOUBLE, tmp_path, profile=profile)


def test_a_workspace_that_is_too_small_is_a_build_error_with_a_hint(tmp_path):
    with pytest.raises(BuildError, match="within workspace limit") as caught:
        build(MLP, tmp_path, workspace_bytes=1 << 20)
    assert "workspace_bytes" in caught.value.hint


def test_compute_capabilities_choose_the_gpus_of_the_plan(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "all").mkdir()
    one, every = build(MLP, tmp_path / "one", compute_capabilities=["SM89"]), build(MLP, tmp_path / "all")
    assert one.sidecar["options"]["compute_capabilities"] == ["SM89"]
    assert one.sha256 != every.sha256
    with pytest.raises(ConfigError, match="does not build for SM90") as caught:
        build(MLP, tmp_path, compute_capabilities=["SM90"])
    assert "SM89" in caught.value.hint


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
@pytest.mark.parametrize("option", ["refit", "strip"])
def test_what_needs_a_driver_is_refused_before_the_library_is_asked(tmp_path, option):
    with pytest.raises(UnavailableError, match=f"needs a GPU to build with '{option}'"):
        build(MLP, tmp_path, **{option: True})


def test_the_plan_of_a_cuda_graph_leaves_allocation_to_the_caller(tmp_path):
    assert "REQUIRE_USER_ALLOCATION" in build(MLP, tmp_path, cuda_graph=True).sidecar["flags"]


def test_float64_stays_in_the_specs_and_the_sidecar_says_what_the_engine_takes(tmp_path):
    shapes = ShapeRange((1, 8), (4, 8), (16, 8))
    engine = build(DOUBLE, tmp_path, profile={"x": shapes, "k": shapes})
    assert [spec.dtype for spec in engine.inputs] == ["float64", "int64"]
    assert [spec.dtype for spec in engine.outputs] == ["float64", "int64"]
    assert engine.sidecar["engine_dtypes"] == {"x": "float32", "y": "float32"}


def test_an_input_that_is_itself_a_shape_is_refused_by_name(tmp_path):
    with pytest.raises(BuildError, match=r"The input 'shape' of .* is itself a shape"):
        build(SHAPE_INPUT, tmp_path)


def test_a_truncated_plan_is_refused(tmp_path):
    engine = build(MLP, tmp_path)
    data = engine.path.read_bytes()
    engine.path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=f"truncated: it has {len(data) // 2} of {len(data)} bytes"):
        read_header(engine.path)


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_without_a_gpu_a_runner_says_so_when_it_is_opened(tmp_path):
    engine = build(MLP, tmp_path)
    assert TENSORRT_RTX.can_run() is not None
    with pytest.raises(UnavailableError, match="driver"), TENSORRT_RTX.load(engine):
        pass


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_tensorrt_itself_refuses_to_build_without_a_gpu(tmp_path):
    with pytest.raises(UnavailableError, match="TensorRT builds on a GPU"):
        build(MLP, tmp_path, backend=TENSORRT)
