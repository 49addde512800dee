"""Plans at work on a GPU; the whole file needs one."""

from __future__ import annotations

import numpy as np
import pytest
from tensorrt_models import DATA_DEPENDENT, DOUBLE, MIXED, MLP, PROFILE, onnx_model, weights

from mpdeploy.artifact import Engine, OnnxModel, Runner
from mpdeploy.engines.base import ShapeRange
from mpdeploy.engines.tensorrt import TENSORRT, TENSORRT_RTX, TensorRTBackend
from mpdeploy.engines.tensorrt.driver import probe_gpu
from mpdeploy.errors import ArtifactChangedError, DataError, UnavailableError
from mpdeploy.measure.latency import measure_one

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[TENSORRT, TENSORRT_RTX], ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> TensorRTBackend:
    problem = request.param.can_run()
    if problem is not None:
        pytest.skip(problem.reason)
    if request.param is TENSORRT_RTX and probe_gpu().sm == 90:
        pytest.skip("TensorRT-RTX does not support SM90")
    return request.param


def x(batch: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 8)).astype(np.float32)


def mlp(model: OnnxModel, batch: np.ndarray) -> np.ndarray:
    held = weights(model)
    return np.maximum(batch @ held["w0"], 0) @ held["w1"]


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_answers_equal_numpy_s_at_every_batch_size_in_turn(row, tmp_path, cuda_graph):
    model = onnx_model(MLP, tmp_path / "model.onnx")
    engine = row.build(model, PROFILE, {"cuda_graph": cuda_graph}, tmp_path)
    with row.load(engine) as runner:
        assert isinstance(runner, Runner)
        for batch in (4, 4, 1, 16, 4):  # a graph is captured again whenever the shape changes
            answer = runner.infer({"x": x(batch, seed=batch)})
            np.testing.assert_allclose(answer["y"], mlp(model, x(batch, seed=batch)), rtol=1e-4, atol=1e-5)


def test_an_answer_is_the_caller_s_own(row, tmp_path):
    engine = row.build(onnx_model(MLP, tmp_path / "model.onnx"), PROFILE, {}, tmp_path)
    with row.load(engine) as runner:
        first = runner.infer({"x": x(4, seed=1)})["y"]
        kept = first.copy()
        runner.infer({"x": x(4, seed=2)})
    np.testing.assert_array_equal(first, kept)
    first[:] = 0  # writable


def test_a_mixed_plan_stays_near_fp32(row, tmp_path):
    engine = row.build(onnx_model(MIXED, tmp_path / "model.onnx", precision="fp16"), PROFILE, {}, tmp_path)
    held = weights(onnx_model(MIXED, tmp_path / "again.onnx"))
    with row.load(engine) as runner:
        answer = runner.infer({"x": x(4)})["y"]
    logits = np.maximum(x(4) @ held["w0"].astype(np.float32), 0) @ held["w1"].astype(np.float32) + held["b1"]
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    assert np.linalg.norm(answer - expected) / np.linalg.norm(expected) < 1e-2


def test_float64_comes_back_as_float64_and_int64_is_exact(row, tmp_path):
    shapes = ShapeRange((1, 8), (4, 8), (16, 8))
    engine = row.build(onnx_model(DOUBLE, tmp_path / "model.onnx"), {"x": shapes, "k": shapes}, {}, tmp_path)
    big = np.full((4, 8), 2**40 + 1, dtype=np.int64)
    with row.load(engine) as runner:
        answer = runner.infer({"x": x(4).astype(np.float64), "k": big})
    assert answer["y"].dtype == np.float64
    np.testing.assert_allclose(answer["y"], 2.0 * x(4), rtol=1e-6)
    np.testing.assert_array_equal(answer["q"], 2 * big)


def test_an_output_whose_shape_depends_on_data_has_the_shape_of_its_data(row, tmp_path):
    if row is TENSORRT_RTX:
        pytest.skip("TensorRT-RTX has no NonZero")
    engine = row.build(onnx_model(DATA_DEPENDENT, tmp_path / "model.onnx"), PROFILE, {}, tmp_path)
    with row.load(engine) as runner:
        for found in (3, 20, 1):
            batch = np.zeros((4, 8), np.float32)
            batch.flat[:found] = 1
            np.testing.assert_array_equal(runner.infer({"x": batch})["where"], np.stack(np.nonzero(batch)))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_each_shape_runs_in_the_profile_that_holds_it_and_the_runner_switches_between_them(row, tmp_path, cuda_graph):
    model = onnx_model(MLP, tmp_path / "model.onnx")
    parts = [ShapeRange((1, 8), (1, 8), (1, 8)), ShapeRange((2, 8), (4, 8), (16, 8))]
    engine = row.build(model, {"x": ShapeRange.joined(parts)}, {"cuda_graph": cuda_graph}, tmp_path)
    with row.load(engine) as runner:
        for batch, profile in ((1, 0), (16, 1), (1, 0), (2, 1)):
            answer = runner.infer({"x": x(batch, seed=batch)})
            np.testing.assert_allclose(answer["y"], mlp(model, x(batch, seed=batch)), rtol=1e-4, atol=1e-5)
            assert runner._session.context.active_optimization_profile == profile
        with pytest.raises(DataError, match="was given x=17x8"):
            runner.infer({"x": x(17)})


def test_a_captured_graph_is_kept_for_its_shape_and_made_again_for_another(row, tmp_path):
    engine = row.build(onnx_model(MLP, tmp_path / "model.onnx"), PROFILE, {"cuda_graph": True}, tmp_path)
    with row.load(engine) as runner:
        runner.infer({"x": x(4)})
        first = runner._session.graph
        runner.infer({"x": x(4, seed=2)})
        assert runner._session.graph is first is not None
        runner.infer({"x": x(8)})
        assert runner._session.graph is not first


def test_a_plan_of_another_version_is_refused_in_words_and_never_deserialised(row, tmp_path):
    engine = row.build(onnx_model(MLP, tmp_path / "model.onnx"), PROFILE, {}, tmp_path)
    other = bytearray(engine.path.read_bytes())
    other[24] = (other[24] + 1) % 256  # the major version, in the header
    engine.path.write_bytes(other)
    version = ".".join(map(str, other[24:28]))
    changed = Engine.of(
        engine.path, inputs=engine.inputs, outputs=engine.outputs,
        sidecar={**engine.sidecar, "library_version": version},
    )  # fmt: skip
    with pytest.raises(UnavailableError, match="exactly the version that built it"), row.load(changed):
        pass


def test_copies_are_measured_apart(row, tmp_path):
    engine = row.build(onnx_model(MLP, tmp_path / "model.onnx"), PROFILE, {}, tmp_path)
    with row.load(engine) as runner:
        copies = runner.copies_ms({"x": x(4)}, 5)
        assert copies.keys() == {"to_device", "to_host"}
        assert all(len(times) == 5 and min(times) > 0 for times in copies.values())
        found = measure_one(runner, {"x": x(4)}, 20).to_json()
    assert found["copies_ms"].keys() == {"to_device", "to_host"}
    assert "gpu" in found["conditions"] or "gpu" in found["conditions"]["absent"]


def test_times_are_one_a_run_and_say_what_they_include(row, tmp_path):
    engine = row.build(onnx_model(MLP, tmp_path / "model.onnx"), PROFILE, {}, tmp_path)
    with row.load(engine) as runner:
        times_ms = runner.time_ms({"x": x(4)}, 20)
        assert "no copies" in runner.includes
    assert len(times_ms) == 20
    assert all(0 < time_ms < 1000 for time_ms in times_ms)


def test_feeds_that_do_not_fit_are_refused_and_the_runner_goes_on(row, tmp_path):
    model = onnx_model(MLP, tmp_path / "model.onnx")
    engine = row.build(model, PROFILE, {}, tmp_path)
    with row.load(engine) as runner:
        with pytest.raises(DataError, match="no input named 'z'"):
            runner.infer({"z": x(4)})
        with pytest.raises(DataError, match="given float64"):
            runner.infer({"x": x(4).astype(np.float64)})
        with pytest.raises(DataError, match="x=1x8 to 16x8 and was given x=17x8"):
            runner.infer({"x": x(17)})
        np.testing.assert_allclose(runner.infer({"x": x(2)})["y"], mlp(model, x(2)), rtol=1e-4, atol=1e-5)


def test_a_closed_runner_says_so(row, tmp_path):
    engine = row.build(onnx_model(MLP, tmp_path / "model.onnx"), PROFILE, {}, tmp_path)
    with row.load(engine) as runner:
        runner.infer({"x": x(1)})
    with pytest.raises(UnavailableError, match="is closed"):
        runner.infer({"x": x(1)})
    with runner:  # it can be opened again
        assert runner.infer({"x": x(1)})["y"].shape == (1, 4)


def test_two_runners_at_once_do_not_disturb_each_other(row, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    models = [onnx_model(MLP, tmp_path / name / "model.onnx", seed=seed) for seed, name in enumerate("ab")]
    engines = [row.build(model, PROFILE, {}, model.path.parent) for model in models]
    with row.load(engines[0]) as first, row.load(engines[1]) as second:
        for runner, model in ((first, models[0]), (second, models[1]), (first, models[0])):
            np.testing.assert_allclose(runner.infer({"x": x(4)})["y"], mlp(model, x(4)), rtol=1e-4, atol=1e-5)


def test_a_stripped_plan_takes_its_weights_from_the_unchanged_onnx_file(row, tmp_path):
    model = onnx_model(MLP, tmp_path / "model.onnx")
    engine = row.build(model, PROFILE, {"strip": True}, tmp_path)
    with row.load(engine) as runner:
        np.testing.assert_allclose(runner.infer({"x": x(4)})["y"], mlp(model, x(4)), rtol=1e-4, atol=1e-5)
    onnx_model(MLP, tmp_path / "model.onnx", seed=9)
    with pytest.raises(ArtifactChangedError, match="has changed"), row.load(engine):
        pass


def test_a_timing_cache_is_written_and_read_again(tmp_path):
    if TENSORRT.can_run() is not None:
        pytest.skip(TENSORRT.can_run().reason)
    cache = tmp_path / "cache.bin"
    model = onnx_model(MLP, tmp_path / "model.onnx")
    TENSORRT.build(model, PROFILE, {"timing_cache": str(cache)}, tmp_path)
    written = cache.read_bytes()
    TENSORRT.build(model, PROFILE, {"timing_cache": str(cache), "timing_cache_readonly": True}, tmp_path)
    assert cache.read_bytes() == written


def test_the_inspector_s_audit_finds_the_kept_softmax_in_fp32(tmp_path):
    if TENSORRT.can_run() is not None:
        pytest.skip(TENSORRT.can_run().reason)
    engine = TENSORRT.build(onnx_model(MIXED, tmp_path / "model.onnx", precision="fp16"), PROFILE, {}, tmp_path)
    audit = TENSORRT.audit(engine)
    assert audit.source == "inspector"
    assert audit.of_nodes()["kept"] in ("fp32", "mixed")
    assert "fp16" in audit.count_by_precision()
