"""Every kept node is answered for by a layer of the engine, or is said not to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from mpdeploy.artifact import OnnxModel
from mpdeploy.building import describe_model
from mpdeploy.conversion import convert
from mpdeploy.engines import backend
from mpdeploy.engines.accounting import Nodes, audit_report, report_on, spread
from mpdeploy.engines.base import Audit, Layer, default_profile

NORMED = """
<ir_version: 9, opset_import: ["" : 20]>
normed (float[batch, 6] x) => (float[batch, 3] y)
<float[6, 4] w1, float[4] b1, float[4] scale, float[4] shift, float[4, 3] w2>
{
    [first] h = MatMul(x, w1)
    [bias] hb = Add(h, b1)
    [norm] n = LayerNormalization(hb, scale, shift)
    [act] a = Gelu<approximate="none">(n)
    [second] z = MatMul(a, w2)
    [probabilities] y = Softmax(z)
}
"""


@pytest.fixture(scope="module")
def normed(tmp_path_factory) -> Path:
    """The graph in FP16 with its LayerNormalization and Softmax kept."""
    folder = tmp_path_factory.mktemp("normed")
    proto = onnx.parser.parse_model(NORMED)
    rng = np.random.default_rng(0)
    for info in list(proto.graph.value_info):
        shape = [axis.dim_value for axis in info.type.tensor_type.shape.dim]
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), info.name)
        )
        proto.graph.value_info.remove(info)
    onnx.save(proto, folder / "model.onnx")
    keep = ["op:LayerNormalization", "op:Softmax"]
    convert(folder / "model.onnx", keep=keep, precision="fp16", keep_io=True, output=folder / "half.onnx")
    return folder / "half.onnx"


def audited(model: Path, engine: str, folder: Path) -> tuple[Audit, OnnxModel, list[dict[str, str]]]:
    row = backend(engine)
    if row.available() is not None:
        pytest.skip(row.available().reason)
    described = describe_model(model)
    built = row.build(described, default_profile(described.inputs, (1, 2, 4), {}), {}, folder)
    return row.audit(built), described, built.sidecar["kept"]


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "tensorrt-rtx"])
def test_every_node_that_computes_is_answered_for(normed, engine, tmp_path):
    audit, _, kept = audited(normed, engine, tmp_path)
    assert {"first", "bias", "norm", "act", "second", "probabilities"} <= audit.of_nodes().keys()
    assert {entry["node"] for entry in kept} >= {"norm", "probabilities"}
    assert report_on(audit, kept, "fp16")["kept_unaccounted"] == []


def test_the_arithmetic_of_a_kept_layer_norm_in_openvino_is_not_anonymous(normed, tmp_path):
    """OpenVINO calls the MVN, which does the sums, by no name of the file; were it half, nobody would know."""
    audit, _, kept = audited(normed, "openvino", tmp_path)
    (mvn,) = (layer for layer in audit.layers if layer.op == "MVN")
    assert mvn.nodes == ("norm",)
    half = Audit(
        audit.source, tuple(replace(layer, precision="fp16") if layer is mvn else layer for layer in audit.layers)
    )
    assert half.of_nodes()["norm"] == "fp16", "the lowest precision of its layers counts"
    assert report_on(half, kept, "fp16")["kept_in_half"] == ["norm"]


def test_a_kept_node_that_no_layer_names_is_listed(normed, tmp_path):
    audit, _, kept = audited(normed, "openvino", tmp_path)
    silent = Audit(audit.source, tuple(layer for layer in audit.layers if "norm" not in layer.nodes))
    assert "norm" in report_on(silent, kept, "fp16")["kept_unaccounted"]
    assert report_on(silent, kept, "fp32")["kept_unaccounted"] == [], "of an FP32 model nothing was kept"


def test_a_kept_node_inside_a_kernel_of_several_precisions_is_listed_too():
    plan = {"keep": [{"node": "norm", "op": "LayerNormalization"}], "half": ["conv"]}
    report = audit_report(Audit("inspector", (Layer("k", "kgen", "mixed", ("norm", "conv")),)), plan)
    assert (report["kept_in_half"], report["kept_unaccounted"]) == ([], ["norm"])


def test_a_kept_op_that_only_moves_values_may_vanish():
    plan = {"keep": [{"node": "view", "op": "Reshape"}, {"node": "sum", "op": "ReduceSum"}], "half": []}
    assert audit_report(Audit("runtime_model", ()), plan)["kept_unaccounted"] == ["sum"]


def test_a_gate_may_forbid_kept_nodes_that_are_not_accounted_for():
    from mpdeploy.gates.evidence import Place
    from mpdeploy.gates.metrics import METRICS

    place = Place("engine/openvino", "fp16", "40-build/openvino", facts={"kept_unaccounted": ["norm", "sum"]})
    found = METRICS["kept_unaccounted"].find(place, 0.0)
    assert found is not None
    assert (found.measured, found.detail) == (2.0, "norm, sum")


def test_a_layer_stands_for_the_unnamed_nodes_before_it_and_for_no_named_one():
    before = {"add": ["matmul"], "matmul": ["norm"], "norm": ["input"]}
    layers = (Layer("a", "FullyConnected", "fp16", ("add",)), Layer("b", "MVN", "fp32", ("norm",)))
    assert [layer.nodes for layer in spread(layers, before)] == [("add", "matmul"), ("norm", "input")]


def test_the_walk_ends_at_a_cast(normed):
    nodes = Nodes.of(normed)
    casts = {name for name in nodes.ids if onnx_op(normed, name) == "Cast"}
    assert casts
    assert not casts & {node for taken in nodes.before.values() for node in taken}
    assert nodes.plan_sha256 is not None


def onnx_op(path: Path, name: str) -> str:
    return next((node.op_type for node in onnx.load(path).graph.node if node.name == name), "")


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "tensorrt-rtx"])
def test_the_sidecar_keeps_the_plan_s_digest_and_the_kept_nodes_with_their_reasons(normed, engine, tmp_path):
    _, _, kept = audited(normed, engine, tmp_path)
    assert {entry["reason"] for entry in kept if entry["node"] == "norm"} == {"user: kept by 'op:LayerNormalization'"}
