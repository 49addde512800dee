"""The values between stages: specs that refuse what does not fit, data with a digest, golden answers that read back."""

from __future__ import annotations

import numpy as np
import pytest

from mpdeploy.artifact import (
    Checkpoint,
    Dataset,
    Engine,
    FileArtifact,
    Golden,
    OnnxModel,
    TensorSpec,
    check_feeds,
    digest_of_arrays,
)
from mpdeploy.errors import ArtifactChangedError, DataError, StageFailedError


def samples(count: int = 6, labels: bool = True) -> Dataset:
    rng = np.random.default_rng(0)
    inputs = {"image": rng.random((count, 1, 2, 2), dtype=np.float32), "mask": rng.random((count, 3)) > 0.5}
    return Dataset(inputs, np.arange(100, 100 + count), np.arange(count) if labels else None)


def golden(labels: bool = True) -> Golden:
    outputs = {"logits": np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32), "score": np.ones(6)}
    return Golden(samples(labels=labels), outputs)


@pytest.mark.parametrize("labels", [True, False])
def test_golden_answers_read_back_to_the_last_bit(tmp_path, labels):
    written = golden(labels)
    written.save(tmp_path / "golden.npz")
    read = Golden.load(tmp_path / "golden.npz")
    assert read.dataset.digest == written.dataset.digest
    assert list(read.outputs) == ["logits", "score"]
    for name, array in written.outputs.items():
        assert read.outputs[name].dtype == array.dtype
        np.testing.assert_array_equal(read.outputs[name], array)
    assert (read.dataset.labels is None) is not labels


def test_golden_answers_that_hold_nan_and_infinity_read_back(tmp_path):
    Golden(samples(), {"y": np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0])}).save(tmp_path / "g.npz")
    np.testing.assert_array_equal(
        Golden.load(tmp_path / "g.npz").outputs["y"], [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0]
    )


def test_a_golden_file_takes_no_pickled_objects(tmp_path):
    with pytest.raises((ValueError, StageFailedError)):
        Golden(samples(), {"y": np.array([{}] * 6, dtype=object)}).save(tmp_path / "g.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("a value", lambda d: d.inputs["image"].__setitem__((3, 0, 1, 1), 9.0)),
        ("an id", lambda d: d.ids.__setitem__(2, 7)),
        ("a label", lambda d: d.labels.__setitem__(2, 7)),
    ],
)
def test_a_digest_of_data_sees(what, change):
    changed = samples()
    change(changed)
    assert samples().digest == samples().digest != changed.digest, what


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"x": np.zeros(4)}, {"y": np.zeros(4)}),
        ({"x": np.zeros(4)}, {"x": np.zeros((2, 2))}),
        ({"x": np.zeros(4, np.float32)}, {"x": np.zeros(4, np.int32)}),
        ({"x": np.zeros(4)}, {"x": np.zeros(4), "y": np.zeros(0)}),
    ],
)
def test_a_digest_of_arrays_tells_names_shapes_and_types_apart(a, b):
    assert digest_of_arrays(a) != digest_of_arrays(b)


def test_a_digest_of_arrays_does_not_know_how_they_lie_in_memory():
    array = np.arange(12.0).reshape(3, 4)
    assert digest_of_arrays({"x": array}) == digest_of_arrays({"x": np.asfortranarray(array)})


def test_samples_of_different_lengths_are_refused():
    with pytest.raises(DataError, match="one length along axis 0"):
        Dataset({"a": np.zeros(3), "b": np.zeros(4)}, np.arange(3))


def test_taking_samples_takes_their_ids_and_labels():
    taken = samples().take(np.array([4, 1]))
    assert (list(taken.ids), list(taken.labels)) == ([104, 101], [4, 1])
    np.testing.assert_array_equal(taken.inputs["image"], samples().inputs["image"][[4, 1]])


def test_batches_hold_every_sample_once_in_order():
    sizes = [len(feeds["image"]) for feeds in samples().batches(4)]
    joined = np.concatenate([feeds["image"] for feeds in samples().batches(4)])
    assert sizes == [4, 2]
    np.testing.assert_array_equal(joined, samples().inputs["image"])


@pytest.mark.parametrize(
    ("shape", "text", "symbolic"),
    [
        (("batch", 3), "x: float32[batch, 3]", True),
        ((1, 3), "x: float32[1, 3]", False),
        ((None, 3), "x: float32[?, 3]", True),
        ((), "x: float32[]", False),
        (None, "x: float32[?]", False),
    ],
)
def test_a_spec_writes_itself_and_reads_back(shape, text, symbolic):
    spec = TensorSpec("x", "float32", shape)
    assert str(spec) == text
    assert spec.has_symbolic_batch is symbolic
    assert TensorSpec.from_json(spec.to_json()) == spec


SPECS = [TensorSpec("image", "float32", ("batch", 3)), TensorSpec("length", "int64", None)]


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"imgae": np.zeros((2, 3), np.float32)}, "no input named 'imgae'"),
        ({"image": np.zeros((2, 3), np.float32)}, "needs an array for its input 'length: int64"),
        ({"image": np.zeros((2, 3)), "length": np.zeros(2, np.int64)}, r"was given float64\[2, 3\]"),
        ({"image": np.zeros((2, 4), np.float32), "length": np.zeros(2, np.int64)}, "the shapes do not fit"),
        ({"image": np.zeros((2, 3, 1), np.float32), "length": np.zeros(2, np.int64)}, "the shapes do not fit"),
    ],
)
def test_feeds_that_do_not_fit_are_refused_with_both_sides(feeds, message):
    with pytest.raises(DataError, match=message) as caught:
        check_feeds(SPECS, feeds, where="m.onnx")
    assert "m.onnx" in caught.value.message
    assert caught.value.hint


def test_feeds_that_fit_are_taken():
    check_feeds(SPECS, {"image": np.zeros((7, 3), np.float32), "length": np.zeros((1, 2), np.int64)}, where="m.onnx")


def test_a_file_that_changed_is_told_from_one_that_is_gone(tmp_path):
    path = tmp_path / "engine.plan"
    path.write_text("plan")
    artifact = FileArtifact.of(path)
    assert artifact.verified() is artifact
    path.write_text("other")
    with pytest.raises(ArtifactChangedError, match=f"has digest .*, recorded was {artifact.sha256[:12]}"):
        artifact.verified()
    path.unlink()
    with pytest.raises(ArtifactChangedError, match="is missing"):
        artifact.verified()


def test_precision_and_backend_come_from_the_sidecar(tmp_path):
    path = tmp_path / "f"
    path.write_text("x")
    assert OnnxModel.of(path).precision == "fp32"
    assert OnnxModel.of(path, sidecar={"precision": "bf16"}).precision == "bf16"
    assert Engine.of(path, sidecar={"engine": "openvino"}).backend == "openvino"
    assert type(Checkpoint.of(path)) is Checkpoint
