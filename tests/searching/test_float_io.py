"""Graph inputs and outputs in a search: kept by a file, kept by the search, passed through."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mpdeploy.conversion import convert
from mpdeploy.precision.model_io import load_model
from mpdeploy.searching import search_model
from mpdeploy.searching.conversion import convert_searched
from tests.precision.conformance_base import normal, weight
from tests.precision.visible import graph, named

PASSED = "g (float[N, 8] x) => (float[N, 8] x, float[N, 8] y) { h = MatMul(x, w)  y = Exp(h) }"
PLAIN = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  e = Exp(h)  y = Mul(e, e) }"


def _saved(text: str, tmp_path: Path, scale: float = 1.0) -> tuple[Path, str]:
    constants = {"k": np.float32(32768.0)} if "k)" in text else {}
    ir.save(named(graph(text, w=weight(8, 8), **constants)), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=normal(32, 8, seed="x") * np.float32(scale))
    return tmp_path / "m.onnx", str(tmp_path / "x.npz")


@pytest.mark.parametrize("max_drift", [1e-2, 2e-4, 1e-6])
def test_an_input_that_is_an_output_too_has_one_type_and_keeps_its_name(max_drift: float, tmp_path: Path) -> None:
    path, data = _saved(PASSED, tmp_path)
    done = convert_searched(path, data=data, max_drift=max_drift, output=tmp_path / "out.onnx")
    written = load_model(tmp_path / "out.onnx").graph
    assert [value.name for value in written.outputs] == ["x", "y"]
    assert written.inputs[0].dtype == written.outputs[0].dtype
    assert done.drift is not None
    assert done.drift.rel_l2 <= max_drift


def test_an_input_that_is_an_output_too_converts_without_a_search(tmp_path: Path) -> None:
    path, data = _saved(PASSED, tmp_path)
    done = convert(path, data=data, output=tmp_path / "out.onnx")
    assert done.drift is not None
    assert set(done.drift.outputs) == {"x", "y"}
    assert 0 < done.drift.rel_l2 < 1e-2


def test_what_a_keep_list_file_holds_in_fp32_stays_so_in_the_next_search(tmp_path: Path) -> None:
    path, data = _saved(PLAIN, tmp_path)
    first = search_model(path, data=data, max_drift=1e-2, keep=["e"], keep_io_names=["y"])
    first.write_keep_list(tmp_path / "keep.json")
    document = json.loads((tmp_path / "keep.json").read_text())
    assert [entry["node"] for entry in document["keep"]] == ["e"]
    assert [entry["name"] for entry in document["float_io"]] == ["y"]
    again = search_model(path, data=data, max_drift=1e-2, keep=[f"@{tmp_path / 'keep.json'}"])
    assert again.plan.float_io == {"y"}
    assert not {"e", "output:y"} & again.plan.half_keys
    without = search_model(path, data=data, max_drift=1e-2)
    assert {"e", "output:y"} <= without.plan.half_keys


def test_an_input_that_the_search_keeps_says_why_and_goes_back_into_convert(tmp_path: Path) -> None:
    path, data = _saved("g (float[N, 8] x) => (float[N, 8] y) { d = Div(x, k)  y = MatMul(d, w) }", tmp_path, 1e5)
    done = convert_searched(path, data=data, max_drift=1e-2, output=tmp_path / "out.onnx", state=tmp_path / "state")
    assert load_model(tmp_path / "out.onnx").graph.inputs[0].dtype == ir.DataType.FLOAT
    [note] = [note for note in done.plan.notes if "input x" in note]
    assert note.startswith("the input x stays FP32: range: x reaches")
    document = json.loads((tmp_path / "state" / "keep.json").read_text())
    assert [entry["name"] for entry in document["float_io"]] == ["x"]
    assert "range: x reaches" in document["float_io"][0]["reason"]
    again = convert(path, data=data, keep=[f"@{tmp_path / 'state' / 'keep.json'}"], use_ranges=False, max_drift=1e-2)
    assert again.plan.float_io == {"x"}
