"""Costs by name, and measured profiles: what each file says a node costs, and that the search listens to it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from mpdeploy.cli import app
from mpdeploy.errors import DataError, UsageError
from mpdeploy.precision.graph_index import GraphIndex
from mpdeploy.searching.profile import cost_from
from tests.precision.visible import graph, named

TEXT = "g (float[N, 16] x) => (float[N, 16] y) { a = MatMul(x, w)  a2 = Tanh(a)  b = MatMul(x, v)  b2 = Tanh(b)  y = Add(a2, b2) }"


def _model() -> ir.Model:
    rng = np.random.default_rng(0)
    w, v = ((rng.normal(size=(16, 16)) / 4).astype("f") for _ in range(2))
    return named(graph(TEXT, w=w, v=v))


def _file(path: Path, document: Any) -> str:
    path.write_text(json.dumps(document))
    return str(path)


def test_times_of_nodes_are_read_as_what_fp32_adds(tmp_path: Path) -> None:
    document = {"nodes": {"a": {"fp32_ms": 0.8, "half_ms": 0.3}, "b": {"fp32_ms": 0.1, "half_ms": 0.2}, "gone": {"fp32_ms": 1, "half_ms": 0}}}  # fmt: skip
    found = cost_from(f"profile:{_file(tmp_path / 'p.json', document)}", GraphIndex.of(_model()))
    assert found == {"a": pytest.approx(500.0), "b": 0.0}


def test_layers_of_two_engines_are_shared_among_the_nodes_they_name(tmp_path: Path) -> None:
    fp32 = [{"count": 9}, {"name": "a + a2", "averageMs": 0.8}, {"name": "{ForeignNode[b...y]}", "averageMs": 0.6}]
    half = [{"count": 9}, {"name": "PWN(a2)", "averageMs": 0.1}, {"name": "a", "averageMs": 0.1}, {"name": "b", "averageMs": 0.3}]  # fmt: skip
    cost = f"profile:{_file(tmp_path / 'f.json', fp32)},{_file(tmp_path / 'h.json', half)}"
    found = cost_from(cost, GraphIndex.of(_model()))
    assert found == {
        "a": pytest.approx(300.0), "a2": pytest.approx(300.0), "b": 0.0,
        "b2": pytest.approx(200.0), "y": pytest.approx(200.0),
    }  # fmt: skip


def test_one_engine_says_which_nodes_are_large(tmp_path: Path) -> None:
    layers = [{"count": 9}, {"name": "a", "averageMs": 0.8}, {"name": "Reformatting CopyNode", "averageMs": 9.0}]
    found = cost_from(f"profile:{_file(tmp_path / 'f.json', layers)}", GraphIndex.of(_model()))
    assert found == {"a": pytest.approx(400.0)}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"nodes": {"a": {"fp32": 1}}}, "no profile: KeyError: 'half_ms'|no profile: KeyError: 'fp32_ms'"),
        ({"layers": []}, "no profile"),
        ([{"name": "a"}], "without averageMs"),
        ({"nodes": {"other": {"fp32_ms": 1, "half_ms": 0}}}, "is in the model"),
        ("text", "two files must both"),
        ([{"name": "a", "averageMs": None}], "'None' is no time"),
        ([{"name": "a", "averageMs": "1"}], "'1' is no time"),
        ({"nodes": {"a": {"fp32_ms": math.nan, "half_ms": 0}}}, "'nan' is no time"),
        ({"nodes": {"a": {"fp32_ms": math.inf, "half_ms": 0}}}, "'inf' is no time"),
    ],
)
def test_a_file_that_is_no_profile_of_the_model_is_refused(document: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        cost_from(f"profile:{_file(tmp_path / 'p.json', document)}", GraphIndex.of(_model()))


@pytest.mark.parametrize("cost", ["weight", "profile:", "profile:/no/such/file.json"])
def test_a_cost_that_is_none_is_refused(cost: str) -> None:
    with pytest.raises(UsageError, match="there is no"):
        cost_from(cost, GraphIndex.of(_model()))


@pytest.mark.parametrize("dear", ["a", "b"])
def test_on_the_command_line_the_dear_chain_stays_half(dear: str, tmp_path: Path) -> None:
    """Two chains of about equal error; either alone in FP32 meets the gate."""
    ir.save(_model(), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(1).normal(size=(32, 16)).astype("f"))
    times = {n: {"fp32_ms": 1.0 if n.startswith(dear) else 0.02, "half_ms": 0.01} for n in ("a", "a2", "b", "b2", "y")}
    profile = _file(tmp_path / "p.json", {"nodes": times})
    command = ["convert", str(tmp_path / "m.onnx"), "--data", str(tmp_path / "x.npz"), "--search", "--json"]

    def searched(max_drift: float) -> dict[str, Any]:
        options = [
            "--max-drift",
            str(max_drift),
            "--cost",
            f"profile:{profile}",
            "--output",
            str(tmp_path / f"{max_drift}.onnx"),
        ]
        result = CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
        assert result.exit_code == 0
        return dict(json.loads(result.stdout))

    all_half = searched(1.0)["search"]["all_half"]
    kept = {entry["node"] for entry in searched(0.85 * all_half)["kept"]}
    assert kept
    assert not {dear, f"{dear}2"} & kept
