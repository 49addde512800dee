"""`compare --half-sums` and `convert --ranges` from the command line."""

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
