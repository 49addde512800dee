"""The node that did it is named."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mpdeploy.conversion import convert
from mpdeploy.emulated_runs import opener
from mpdeploy.errors import GateFailedError
from mpdeploy.precision.blame import blame_nodes
from tests.precision.visible import W, X, converted, graph, named

SQUARES = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  up = Mul(h, k)  sq = Mul(up, up)  rt = Sqrt(sq)  y = MatMul(rt, w) }"


def _blame(model: ir.Model, folder: Path, **more: object) -> list[tuple[str, float]]:
    done = converted(model, **more)
    found = blame_nodes(done.prepared.model, done.model, {"x": X}, lambda shown, stem: opener(shown, folder, stem))
    return [(item.node, item.after) for item in found]


def test_the_node_that_overflows_is_named_first(tmp_path: Path) -> None:
    worst = _blame(named(graph(SQUARES, w=W, k=np.float32(1000.0))), tmp_path)[0]
    assert worst == ("sq", math.inf)


def test_what_follows_the_node_that_overflowed_is_not_blamed(tmp_path: Path) -> None:
    infinite = [
        node for node, after in _blame(named(graph(SQUARES, w=W, k=np.float32(1000.0))), tmp_path) if math.isinf(after)
    ]
    assert infinite == ["sq"]


def test_the_node_where_the_signal_vanishes_is_named(tmp_path: Path) -> None:
    assert _blame(named(graph(SQUARES, w=W, k=np.float32(1e-4))), tmp_path)[0][0] == "sq"


def test_a_harmless_model_blames_no_one_for_much(tmp_path: Path) -> None:
    assert all(after < 2e-3 for _, after in _blame(named(graph(SQUARES, w=W, k=np.float32(1.0))), tmp_path))


def test_a_kept_node_is_not_to_blame_for_what_it_was_given(tmp_path: Path) -> None:
    found = dict(_blame(named(graph(SQUARES, w=W, k=np.float32(1000.0))), tmp_path, keep=["rt"]))
    assert "sq" in found
    assert not math.isinf(found.get("rt", 0.0))


def test_a_forced_conversion_that_loses_its_output_names_the_node_and_leaves_no_file(tmp_path: Path) -> None:
    ir.save(named(graph(SQUARES, w=W, k=np.float32(1000.0))), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=X)
    with pytest.raises(
        GateFailedError, match="Output 'y' is lost in half precision: 24 values are not finite"
    ) as raised:
        convert(tmp_path / "m.onnx", data=str(tmp_path / "x.npz"), output=tmp_path / "out.onnx", use_ranges=False)
    assert "Mul 'sq': " in str(raised.value)
    assert "--search" in str(raised.value)
    assert raised.value.exit_code == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "x.npz"]
