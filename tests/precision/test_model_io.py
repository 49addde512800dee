"""Files that are no models, or lie about their weights; and files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from mpdeploy.errors import ConversionError, ModelError, StageFailedError
from mpdeploy.precision import model_io
from mpdeploy.precision.model_io import input_specs, load_model, output_specs, save_model, weight_bytes, write_model
from tests.precision.conformance_base import floats, graph_model
from tests.precision.visible import CHAIN, W, X, graph, lines, run


def _external(folder: Path, location: str = "w.bin", **entries: int) -> Path:
    """A model whose weight lies at `location`, and a right file w.bin beside it."""
    model = graph_model([helper.make_node("MatMul", ["x", "w"], ["y"])], [floats("x", "N", 8)], [floats("y", "N", 8)])
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[8, 8], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    model.graph.initializer.append(tensor)
    folder.mkdir(exist_ok=True)
    (folder / "w.bin").write_bytes(W.tobytes())
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"holds no graph|not a readable"),
        (b"hello, this is text", "is not"),
        (b"\x00" * 100, "is not"),
        (b"PK\x03\x04" + b"\x00" * 60, "is not"),
    ],
    ids=["empty", "text", "zeros", "a zip"],
)
def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=message) as raised:
        load_model(tmp_path / "m.onnx")
    assert "m.onnx" in raised.value.message
    assert raised.value.hint
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    ir.save(graph(CHAIN, w=W), tmp_path / "whole.onnx")
    whole = (tmp_path / "whole.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"cut\.onnx"):
        load_model(tmp_path / "cut.onnx")


def test_no_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(ModelError, match="There is no model file"):
            load_model(path)


@pytest.mark.parametrize("opset", [7, 8, 26, 99])
def test_an_opset_out_of_range_is_refused_with_the_range(tmp_path: Path, opset: int) -> None:
    model = graph(CHAIN, w=W)
    model.graph.opset_imports[""] = opset
    ir.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=f"has opset {opset}; opsets 9 to 25 are supported"):
        load_model(tmp_path / "m.onnx")


def test_external_data_is_read_where_it_lies(tmp_path: Path) -> None:
    model = load_model(_external(tmp_path))
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), W)


def test_external_data_that_is_missing_is_named(tmp_path: Path) -> None:
    path = _external(tmp_path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"'w\.bin' of 'w' is missing"):
        load_model(path)


@pytest.mark.parametrize("location", ["../secret.bin", "a/../../secret.bin", "/etc/passwd"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    path = _external(tmp_path / "inside", location)
    (tmp_path / "secret.bin").write_bytes(W.tobytes())
    with pytest.raises(ModelError, match=r"outside|not a readable") as raised:
        load_model(path)
    assert "m.onnx" in raised.value.message


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = _external(tmp_path / "inside", "link.bin")
    (tmp_path / "secret.bin").write_bytes(W.tobytes())
    (tmp_path / "inside" / "link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(ModelError, match="lies outside the model's folder"):
        load_model(path)


@pytest.mark.parametrize(
    "entries", [{"length": 999_999}, {"offset": 100}, {"offset": 10**12}], ids=["length", "offset", "far offset"]
)
def test_external_data_that_is_too_short_is_refused_with_both_numbers(tmp_path: Path, entries: dict[str, int]) -> None:
    path = _external(tmp_path, **entries)
    with pytest.raises(ModelError, match="256 bytes, 'w' needs"):
        load_model(path)


def test_external_data_cut_short_is_refused(tmp_path: Path) -> None:
    path = _external(tmp_path)
    (tmp_path / "w.bin").write_bytes(W.tobytes()[:100])
    with pytest.raises(ModelError, match="has 100 bytes, 'w' needs 256"):
        load_model(path)


def test_a_sparse_constant_is_made_dense(tmp_path: Path) -> None:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([2.0, 3.0], np.float32), "v"),
        numpy_helper.from_array(np.array([1, 6]), "i"),
        [8],
    )
    nodes = [helper.make_node("Constant", [], ["k"], sparse_value=sparse), helper.make_node("Add", ["x", "k"], ["y"])]
    onnx.save(graph_model(nodes, [floats("x", "N", 8)], [floats("y", "N", 8)]), tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    np.testing.assert_array_equal(run(model, {"x": np.zeros((1, 8), np.float32)})[0], [[0, 2, 0, 0, 0, 0, 3, 0]])


# ---- writing


def test_a_written_model_is_read_back(tmp_path: Path) -> None:
    save_model(graph(CHAIN, w=W), tmp_path / "new" / "m.onnx")
    assert lines(load_model(tmp_path / "new" / "m.onnx")) == lines(graph(CHAIN, w=W))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.onnx"]


def test_a_check_that_refuses_leaves_no_file_and_no_scrap(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        assert path.is_file()
        raise ConversionError("no")

    with pytest.raises(ConversionError, match="no"):
        save_model(graph(CHAIN, w=W), tmp_path / "m.onnx", [refuse])
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_refuses_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"before")

    def refuse(path: Path) -> None:
        raise ConversionError("no")

    with pytest.raises(ConversionError):
        save_model(graph(CHAIN, w=W), tmp_path / "m.onnx", [refuse])
    assert (tmp_path / "m.onnx").read_bytes() == b"before"


def test_a_folder_that_cannot_be_made_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((StageFailedError, OSError)):
        save_model(graph(CHAIN, w=W), tmp_path / "file" / "m.onnx")


def test_large_weights_go_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_io, "EXTERNAL_FROM_BYTES", 100)
    write_model(graph(CHAIN, w=W), tmp_path, "a.onnx", external_from_bytes=100)
    assert (tmp_path / "a.onnx.data").is_file()
    model = load_model(tmp_path / "a.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), W)


def test_weights_are_counted_in_bodies_too() -> None:
    text = """g (float[N, 8] x, bool c) => (float[N, 8] y) { y = If(c) <
      then_branch = t () => (float[N, 8] a) <float[8] k = {1, 2, 3, 4, 5, 6, 7, 8}> { a = Mul(x, k) },
      else_branch = e () => (float[N, 8] b) { b = MatMul(x, w) } > }"""
    assert weight_bytes(graph(text, w=W)) == 256 + 32


def test_specs_are_what_a_caller_must_give(tmp_path: Path) -> None:
    text = "g (float[N, 8] x, int64 n, float[8, 8] w) => (float[N, 8] y) { h = MatMul(x, w)  y = Identity(h) }"
    model = graph(text, w=W)
    assert [str(spec) for spec in input_specs(model)] == ["x: float32[N, 8]", "n: int64[]"]
    assert [str(spec) for spec in output_specs(model)] == ["y: float32[N, 8]"]
    assert X.shape == (3, 8)
