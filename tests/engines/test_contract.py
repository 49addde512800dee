"""What every backend of the table must do; the ones this machine lacks are skipped with their reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from mpdeploy.artifact import Engine, Runner
from mpdeploy.building import describe_model, find_engine
from mpdeploy.engines import ENGINES, backend
from mpdeploy.engines.base import default_profile
from mpdeploy.errors import ConfigError, DataError, ModelError, MpdeployError

MODEL = """
<ir_version: 9, opset_import: ["" : 18]>
perceptron (float[batch, 6] x) => (float[batch, 3] y)
<float[6, 4] w1, float[4] b1, float[4, 3] w2>
{
    [first] h = MatMul(x, w1)
    [bias] hb = Add(h, b1)
    [act] a = Relu(hb)
    [second] y = MatMul(a, w2)
}
"""
TOLERANCE = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 3e-2}
"""Relative L2 error against numpy in float64 that each precision may make on this model (a few of its unit roundoffs)."""


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"w1": (6, 4), "b1": (4,), "w2": (4, 3)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def answer(x: np.ndarray) -> np.ndarray:
    w = {name: value.astype(np.float64) for name, value in weights().items()}
    return np.maximum(x.astype(np.float64) @ w["w1"] + w["b1"], 0) @ w["w2"]


@pytest.fixture(params=sorted(ENGINES))
def row(request):
    found = backend(request.param)
    missing = found.available()
    if missing is not None:
        pytest.skip(f"{request.param}: {missing.reason}")
    return found


@pytest.fixture
def engine(row, tmp_path) -> Engine:
    from mpdeploy.conversion import convert

    proto = onnx.parser.parse_model(MODEL)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights().items())
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    if row.takes() != "fp32":
        convert(path, precision=row.takes(), keep_io=True, output=tmp_path / "half.onnx")
        path = tmp_path / "half.onnx"
    folder = tmp_path / "engine"
    folder.mkdir()
    model = describe_model(path)
    return row.build(model, default_profile(model.inputs, (1, 4, 8), {}), {}, folder)


@pytest.fixture
def runner(row, engine) -> Runner:
    missing = row.can_run()
    if missing is not None:
        pytest.skip(f"{row.name} builds here and cannot run here: {missing.reason}")
    with row.load(engine) as opened:
        yield opened


def samples(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)


def test_it_says_its_inputs_and_outputs(engine):
    assert [spec.name for spec in engine.inputs] == ["x"]
    assert [spec.name for spec in engine.outputs] == ["y"]
    assert engine.inputs[0].dtype == "float32"


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_it_answers_any_batch_of_the_profile_within_its_precision(engine, runner, batch):
    x = samples(batch)
    found = runner.infer({"x": x})["y"]
    expected = answer(x)
    assert found.shape == (batch, 3)
    error = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE[engine.precision]


def test_answers_are_the_callers_own(runner):
    first = runner.infer({"x": samples(2, seed=1)})["y"]
    kept = first.copy()
    runner.infer({"x": samples(2, seed=2)})
    np.testing.assert_array_equal(first, kept)
    first[:] = 0  # and may be written to
    assert runner.infer({"x": samples(2, seed=1)})["y"].any()


@pytest.mark.parametrize(
    ("feeds", "said"),
    [
        ({"z": samples(2)}, "no input named 'z'"),
        ({}, "needs an array for its input"),
        ({"x": samples(2).astype(np.float64)}, "float64"),
        ({"x": samples(2)[:, :5]}, "shapes do not fit"),
    ],
    ids=["wrong name", "missing", "wrong dtype", "wrong shape"],
)
def test_feeds_that_do_not_fit_are_refused_in_words(runner, feeds, said):
    with pytest.raises(DataError, match=said):
        runner.infer(feeds)


def test_times_are_positive_and_say_what_they_include(runner):
    times = runner.time_ms({"x": samples(4)}, 5)
    assert len(times) == 5
    assert min(times) > 0
    assert runner.includes


def test_it_can_be_opened_again_and_not_used_after_close(row, engine):
    missing = row.can_run()
    if missing is not None:
        pytest.skip(f"{row.name} cannot run here: {missing.reason}")
    with row.load(engine) as opened:
        before = opened.infer({"x": samples(2)})["y"]
    with pytest.raises(MpdeployError, match="closed"):
        opened.infer({"x": samples(2)})
    with row.load(engine) as opened:
        np.testing.assert_array_equal(opened.infer({"x": samples(2)})["y"], before)


def test_the_audit_lists_the_matrix_products(row, engine):
    audit = row.audit(engine)
    assert audit.layers
    assert sum(audit.count_by_precision().values()) == len(audit.layers)


def test_an_unknown_option_is_refused_with_the_closest_ones(row, engine, tmp_path):
    model = describe_model(tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match=r"no option|thraeds"):
        row.build(model, default_profile(model.inputs, (1, 4, 8), {}), {"thraeds": 1}, engine.path.parent)


def test_an_engine_is_found_again_by_its_sidecar_and_refused_when_it_was_changed(engine):
    again = find_engine(engine.path.parent)
    assert (again.path, again.sha256, again.backend) == (engine.path, engine.sha256, engine.backend)
    with Path(engine.path).open("ab") as file:
        file.write(b"tampered")
    with pytest.raises(ModelError, match="is not the engine that"):
        find_engine(engine.path.parent)
