"""Ranges by module become ranges by tensor, through the scopes the exporter wrote, over visible graphs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from mpdeploy.conversion import convert
from mpdeploy.export.handover import keep_file_json, nodes_from_modules, tensors_from_modules
from mpdeploy.export.to_onnx import export_onnx
from mpdeploy.precision.keep_list import NAME_SCOPES
from mpdeploy.train.health import ActivationRanges

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


FOLDED = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[batch, 2, 4, 4] x) => (float[batch, 2, 4, 4] y)
  <float[2, 2, 1, 1] "features.0.weight" = {1, 0, 0, 1}, float[2] bias = {0, 0}>
{
  bn = Conv(x, "features.0.weight", bias)
  y = Relu(bn)
}
"""


@pytest.fixture
def folded(tmp_path: Path) -> Path:
    """A Conv that its BatchNorm `features.1` was folded into, as torch's exporter writes it, and a ReLU."""
    model = ir.from_proto(onnx.parser.parse_model(FOLDED))
    scopes = {"bn": ["", "features", "features.1", "batch_norm"], "y": ["", "features", "features.2", "relu"]}
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
        node.metadata_props[NAME_SCOPES] = str(scopes[node.outputs[0].name])
    ir.save(model, tmp_path / "folded.onnx")
    return tmp_path / "folded.onnx"


def test_a_fused_conv_takes_its_batch_norm_s_range_and_the_conv_s_own_is_listed_as_folded(folded):
    handover = tensors_from_modules(folded, {"features.0": 900.0, "features.1": 3.0, "features.3": 1.0})
    assert dict(handover.tensors) == {"bn": 3.0}
    assert dict(handover.modules) == {"bn": "features.1"}
    assert dict(handover.folded) == {"features.0": "features.1"}
    assert handover.unmapped == ("features.3",)


@pytest.mark.parametrize(
    ("modules", "nodes", "unmapped"),
    [
        (["features.1"], {"node_bn": "features.1"}, ()),
        (["features.0"], {"node_bn": "features.0"}, ()),  # by its weight: its scope went with the folding
        (["features.2"], {"node_y": "features.2"}, ()),
        (["features"], {"node_bn": "features", "node_y": "features"}, ()),  # a container: all nodes below it
        (["feature", "drop"], {}, ("feature", "drop")),  # part of a name is no name
    ],
)
def test_modules_are_found_by_scope_by_weight_and_as_containers(folded, modules, nodes, unmapped):
    found = nodes_from_modules(folded, modules)
    assert (dict(found.nodes), found.unmapped) == (nodes, unmapped)


def test_what_stayed_fp32_in_training_is_a_keep_list_that_says_so(folded, tmp_path):
    path = tmp_path / "keep.json"
    path.write_text(json.dumps(keep_file_json(nodes_from_modules(folded, ["features.0"]))))
    done = convert(folded, keep=[f"@{path}"])
    kept = {node: "; ".join(map(str, reasons)) for node, reasons in done.plan.kept.items()}
    assert "fp32_modules: 'features.0' was kept in FP32 in training" in kept["node_bn"]


class Spiky(nn.Module):
    """Its first layer passes its input on, and the Tanh behind it makes all outputs small again: x [n, 8] -> logits [n, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.squash, self.head = nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)
        with torch.no_grad():
            self.grow.weight.copy_(torch.eye(16, 8))
            self.grow.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.squash(self.grow(x) * 0.5))


def test_training_s_ranges_keep_a_node_that_a_small_calibration_set_would_have_let_go(tmp_path):
    """500 training samples, one of them large; 16 calibration samples, none of them large."""
    torch.manual_seed(0)
    model, path = Spiky().eval(), tmp_path / "spiky.onnx"
    train, calibration = torch.randn(500, 8), np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    train[123, 0] = 71_000.0
    ranges = ActivationRanges()
    with ranges.recording(model), torch.no_grad():
        model(train)
    export_onnx(model, {"x": calibration}, path, opset=20, output_names=["logits"])
    np.savez(tmp_path / "calibration.npz", x=calibration)
    handed = tensors_from_modules(path, ranges.to_json())

    def reasons(**handed_over: object) -> dict[str, str]:
        done = convert(path, data=str(tmp_path / "calibration.npz"), keep_io=True, **handed_over)
        return {done.plan.ops[node]: "; ".join(map(str, why)) for node, why in done.plan.kept.items()}

    assert "reaches" not in " ".join(reasons().values())
    text = reasons(amax=handed.tensors, amax_modules=handed.modules)["Gemm"]
    assert f"reaches 7.1e+04 (in training at module 'grow', {np.abs(calibration).max():.4g} in calibration)" in text
