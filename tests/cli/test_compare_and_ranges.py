"""`compare --half-sums`, `--engine` and `convert --ranges` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from mpdeploy.cli import app
from mpdeploy.errors import DataError, UsageError
from tests.precision.visible import W, X, graph, named

LONG = "g (float[N, 16384] x) => (float[N, 1] y) { h = Relu(x) y = ReduceMean<axes = [1]>(h) }"
CHAIN = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }"


def invoke(*arguments: object) -> dict[str, object]:
    done = CliRunner().invoke(app, [str(item) for item in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def long(tmp_path: Path) -> Path:
    ir.save(named(graph(LONG)), tmp_path / "long.onnx")
    np.savez(tmp_path / "x.npz", x=np.full((2, 16384), 8, np.float32))
    return tmp_path / "long.onnx"


def test_sums_in_half_are_the_worst_case_and_told_apart(long: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    invoke("convert", long, "--output", out, "--json")  # no ranges: no rule keeps the mean
    both = [
        invoke("compare", long, out, "--data", tmp_path / "x.npz", "--emulate", *more, "--json")["outputs"]["y"]
        for more in ((), ("--half-sums",))
    ]
    assert both[0]["num_nonfinite"] == 0
    assert both[0]["rel_l2"] < 1e-3
    assert both[1]["num_nonfinite"] == 2


def test_half_sums_without_emulation_is_a_usage_error(long: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="goes with --emulate"):
        invoke("compare", long, long, "--data", tmp_path / "x.npz", "--half-sums")


@pytest.fixture
def norm(tmp_path: Path) -> Path:
    text = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w) n = LayerNormalization(h, s) y = MatMul(n, w) }"
    ir.save(named(graph(text, w=W, s=np.linspace(0.5, 1.5, 8, dtype=np.float32))), tmp_path / "norm.onnx")
    np.savez(tmp_path / "x.npz", x=X)
    return tmp_path / "norm.onnx"


@pytest.mark.parametrize("search", [(), ("--search", "--max-drift", "1")])
def test_the_engine_decides_what_is_taken_apart_in_convert_and_compare(
    search: tuple[str, ...], norm: Path, tmp_path: Path
) -> None:
    found = {}
    for engine in ("tensorrt", "openvino"):
        out, data = tmp_path / f"{engine}.onnx", ("--data", tmp_path / "x.npz")
        done = invoke("convert", norm, *data, *search, "--engine", engine, "--output", out, "--json")
        compared = invoke("compare", norm, out, *data, "--emulate", "--engine", engine, "--json")
        assert done["emulated_engine"] == engine
        assert compared["outputs"]["y"]["rel_l2"] == pytest.approx(done["drift"]["y"]["rel_l2"], rel=1e-6)
        found[engine] = done["drift"]["y"]["rel_l2"]
    assert found["openvino"] != pytest.approx(found["tensorrt"], rel=1e-3)


@pytest.mark.parametrize("search", [(), ("--search", "--max-drift", "1")])
def test_an_unknown_engine_is_refused_before_anything_runs(search: tuple[str, ...], norm: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no engine 'openvin'") as error:
        invoke("convert", norm, "--data", tmp_path / "x.npz", *search, "--engine", "openvin")
    assert "openvino" in (error.value.hint or "")


def test_ranges_of_training_keep_what_calibration_would_not(tmp_path: Path) -> None:
    model, ranges = tmp_path / "m.onnx", tmp_path / "amax.json"
    ir.save(named(graph(CHAIN, w=W)), model)
    np.savez(tmp_path / "x.npz", x=X)
    ranges.write_text(json.dumps({"tensors": {"h": 70000.0}, "modules": {"h": "grow"}}))
    arguments = ("convert", model, "--data", tmp_path / "x.npz", "--output", tmp_path / "out.onnx", "--json")
    assert invoke(*arguments)["kept"] == []
    kept = invoke(*arguments, "--ranges", ranges)["kept"]
    assert {item["node"] for item in kept} == {"h", "r"}
    assert "in training at module 'grow'" in kept[0]["reason"]


@pytest.mark.parametrize("content", ["{", "[]", '{"tensors": {"h": "much"}}'])
def test_a_file_without_ranges_says_what_to_give(content: str, tmp_path: Path) -> None:
    model, ranges = tmp_path / "m.onnx", tmp_path / "amax.json"
    ir.save(named(graph(CHAIN, w=W)), model)
    ranges.write_text(content)
    with pytest.raises(DataError, match="holds no ranges"):
        invoke("convert", model, "--ranges", ranges)
