"""Ranges by module become ranges by tensor, through the scopes the exporter wrote, over visible graphs."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from mpdeploy.export.handover import tensors_from_modules
from mpdeploy.precision.keep_list import NAME_SCOPES

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[batch, 4] x) => (float[batch, 4] y) {
  hidden = Add(x, x)
  act = Relu(hidden)
  scaled = Mul(act, act)
  y = Neg(scaled)
}
"""


def graph_with(tmp_path: Path, **scopes: str) -> Path:
    """The graph above; `scopes` names for the tensor that a node makes the module path it came from."""
    model = ir.from_proto(onnx.parser.parse_model(GRAPH))
    for node in model.graph:
        if node.outputs[0].name in scopes:
            path = scopes[node.outputs[0].name].split("/")
            node.metadata_props[NAME_SCOPES] = str([*path, node.op_type.lower()])
    ir.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_a_module_s_range_goes_to_the_tensor_its_node_makes(tmp_path):
    path = graph_with(tmp_path, hidden="fc", act="relu")
    handover = tensors_from_modules(path, {"fc": 3.0, "relu": 2.0})
    assert dict(handover.tensors) == {"hidden": 3.0, "act": 2.0}
    assert handover.unmapped == ()


def test_of_a_module_of_several_nodes_the_last_one_counts(tmp_path):
    path = graph_with(tmp_path, act="gelu", scaled="gelu")
    assert dict(tensors_from_modules(path, {"gelu": 5.0}).tensors) == {"scaled": 5.0}


def test_a_node_counts_for_the_innermost_module(tmp_path):
    path = graph_with(tmp_path, act="block/block.relu")
    handover = tensors_from_modules(path, {"block": 9.0, "block.relu": 2.0})
    assert dict(handover.tensors) == {"act": 2.0}
    assert handover.unmapped == ("block",)


def test_a_module_without_a_node_is_listed(tmp_path):
    path = graph_with(tmp_path, act="relu")
    assert tensors_from_modules(path, {"relu": 2.0, "dropout": 1.0}).unmapped == ("dropout",)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_range_that_is_not_finite_is_not_handed_over(tmp_path, value):
    path = graph_with(tmp_path, act="relu", hidden="fc")
    assert dict(tensors_from_modules(path, {"relu": value, "fc": 1.0}).tensors) == {"hidden": 1.0}


def test_a_graph_without_scopes_takes_no_ranges(tmp_path):
    handover = tensors_from_modules(graph_with(tmp_path), {"relu": 2.0})
    assert (dict(handover.tensors), handover.unmapped) == ({}, ("relu",))
