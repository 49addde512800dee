"""What an audit reads out of the engine inspector's JSON, in the schemas of TensorRT 10 and 11."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mpdeploy.artifact import Engine
from mpdeploy.engines.base import Layer
from mpdeploy.engines.tensorrt import TENSORRT_RTX, TensorRTBackend, backend
from mpdeploy.engines.tensorrt.audit import (
    layers_from_inspector,
    nodes_from_metadata,
    on_deciding_layers,
    tells_nothing,
)
from mpdeploy.errors import BuildError, UnavailableError

# The network as it was parsed: FP16 but for two kept nodes, with FP32 inputs and outputs.
NETWORK = (
    Layer("to_half", "CAST", "fp16", ("to_half",)),
    Layer("conv", "CONVOLUTION", "fp16", ("conv",)),
    Layer("act", "ACTIVATION", "fp16", ("act",)),
    Layer("up", "CAST", "fp32", ("up",)),
    Layer("kept_mul", "ELEMENTWISE", "fp32", ("kept_mul",)),
    Layer("down", "CAST", "fp16", ("down",)),
    Layer("product", "MATRIX_MULTIPLY", "fp16", ("product",)),
    Layer("to_full", "CAST", "fp32", ("to_full",)),
    Layer("kept_softmax", "SOFTMAX", "fp32", ("kept_softmax",)),
)

# (name, layer type, types in, types out, nodes, tactic)
KERNELS = [
    ("Reformatting CopyNode for Input Tensor 0 to conv + act", "Reformat", ["fp32"], ["fp16"], ["to_half"], ""),
    ("conv + act", "CaskConvolution", ["fp16"], ["fp16"], ["conv", "act"], "sm80_xmma_fprop_f16f16_f16f16_f16"),
    ("__myl_CastMulCast_myl0_1", "kgen", ["fp16"], ["fp16"], ["up", "kept_mul", "down"], "__myl_CastMulCast"),
    ("product_myl0_2", "gemm", ["fp16", "fp16"], ["fp32"], ["product", "to_full"], "sm80_xmma_gemm_f16f16_f16f32"),
    ("__myl_MaxSubExpSumDiv_myl0_3", "kgen", ["fp32"], ["fp32"], ["kept_softmax"], "__myl_MaxSubExpSumDiv"),
]
TEXT_10 = {
    "fp32": "Row major linear FP32",
    "fp16": "Channel major FP16 format where channel % 8 == 0",
    "bf16": "BFloat16",
}
TYPE_11 = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16"}


def schema_10(kernels) -> str:
    def tensor(precision: str) -> dict[str, Any]:
        return {"Name": "t", "Location": "Device", "Dimensions": [1, 8], "Format/Datatype": TEXT_10[precision]}

    return json.dumps({"Layers": [_layer(kernel, tensor) for kernel in kernels], "Bindings": ["x", "y"]})


def schema_11(kernels) -> str:
    def tensor(precision: str) -> dict[str, Any]:
        layout = "Row major linear FP32 format (kLINEAR)"  # the type is what counts, not what this text holds
        return {"Name": "t", "Dimensions": [1, 8], "Datatype": TYPE_11[precision], "Format": layout}

    io = [{"Name": "x", "IOMode": "Input", "DataType": "Float", "Dimensions": [1, 8], "Location": "Device"}]
    return json.dumps({"Layers": [_layer(kernel, tensor) for kernel in kernels], "I/O Tensors": io})


def _layer(kernel, tensor) -> dict[str, Any]:
    name, kind, taken, made, nodes, tactic = kernel
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [tensor(item) for item in taken],
        "Outputs": [tensor(item) for item in made],
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


both_schemas = pytest.mark.parametrize("schema", [schema_10, schema_11])


def of_nodes(text: str, network=NETWORK) -> dict[str, str]:
    return {node: layer.precision for layer in layers_from_inspector(text, network) for node in layer.nodes}


@both_schemas
def test_every_kernel_is_read_with_its_nodes_and_its_precision(schema):
    assert of_nodes(schema(KERNELS)) == {
        "to_half": "fp16",
        "conv": "fp16",
        "act": "fp16",
        "up": "mixed",
        "kept_mul": "mixed",  # half at the kernel's border, but the casts are inside: nobody can tell
        "down": "mixed",
        "product": "fp16",
        "to_full": "fp16",
        "kept_softmax": "fp32",
    }


@both_schemas
def test_a_kept_node_that_runs_in_half_is_found(schema):
    softmax = ("__myl_MaxSubExpSumDiv_myl0_3", "kgen", ["fp16"], ["fp16"], ["kept_softmax"], "")
    assert of_nodes(schema([*KERNELS[:-1], softmax]))["kept_softmax"] == "fp16"


@both_schemas
def test_bf16_is_told_from_fp16(schema):
    assert of_nodes(schema([("p", "gemm", ["bf16"], ["bf16"], ["product"], "")])) == {"product": "bf16"}


@both_schemas
def test_several_types_at_a_border_are_mixed_unless_the_nodes_types_are_known(schema):
    text = schema([KERNELS[3]])
    assert of_nodes(text)["product"] == "fp16"
    assert of_nodes(text, network=())["product"] == "mixed"


@both_schemas
def test_a_tf32_tactic_makes_an_fp32_kernel_tf32(schema):
    kernel = ("product", "gemm", ["fp32"], ["fp32"], ["product"], "sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n")
    assert of_nodes(schema([kernel])) == {"product": "tf32"}


@both_schemas
def test_a_reformat_does_not_speak_for_the_node_it_feeds(schema):
    reformat = ("Reformatting CopyNode", "Reformat", ["fp32"], ["fp16"], ["kept_softmax"], "")
    assert of_nodes(schema([reformat, KERNELS[-1]])) == {"kept_softmax": "fp32"}


@both_schemas
def test_a_region_whose_inside_is_not_told_is_unknown(schema):
    text = schema([("{ForeignNode[conv...kept_softmax]}", "Myelin", ["fp32"], ["fp32"], ["conv", "kept_softmax"], "")])
    assert of_nodes(text) == {"conv": "unknown", "kept_softmax": "unknown"}
    assert tells_nothing(layers_from_inspector(text, NETWORK))
    assert not tells_nothing(layers_from_inspector(schema(KERNELS), NETWORK))


def test_an_engine_built_without_detailed_profiling_tells_names_only():
    layers = layers_from_inspector(json.dumps({"Layers": ["conv + act", "softmax"], "Bindings": ["x"]}))
    assert [(layer.name, layer.precision) for layer in layers] == [("conv + act", "unknown"), ("softmax", "unknown")]
    assert tells_nothing(layers)


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("Row major linear FP16 format", "fp16"),
        ("Row major linear BFP16 format", "bf16"),
        ("Thirty-two wide channel vectorized row major Int8 format.", "int8"),
        ("Row major UInt8 format", "uint8"),
        ("Int64", "int64"),
        ("FP8", "fp8"),
        ("Bool", "bool"),
        ("N/A due to dynamic shapes", "unknown"),
    ],
)
def test_the_inspector_s_words_for_types(text, precision):
    tensor = {"Name": "t", "Format/Datatype": text}
    layer = {"Name": "a", "LayerType": "Any", "Inputs": [tensor], "Outputs": [tensor]}
    assert layers_from_inspector(json.dumps({"Layers": [layer]}))[0].precision == precision


@pytest.mark.parametrize(
    "text", ["", "no json", "[]", '{"Bindings": []}', '{"Layers": [{"LayerType": "x"}]}', '{"Layers": 3}']
)
def test_an_answer_that_cannot_be_read_is_an_error(text):
    with pytest.raises(BuildError, match="cannot be read"):
        layers_from_inspector(text)


@pytest.mark.parametrize(
    ("metadata", "nodes"),
    [
        ("", ()),
        ("[ONNX Layer: a]", ("a",)),
        ("[ONNX Layer: a][ONNX Layer: b]", ("a", "b")),
        ("[ONNX Layer: a]\x1e[ONNX Layer: b]\x1f[ONNX Layer: a]", ("a", "b")),
        ("[ONNX Layer: block[0]/mul]", ("block[0]/mul",)),
    ],
)
def test_nodes_are_read_from_metadata(metadata, nodes):
    assert nodes_from_metadata(metadata) == nodes


def test_a_node_of_several_layers_is_named_by_its_lowest_float_precision():
    layers = (
        Layer("shape", "SHAPE", "int64", ("a", "only_shape")),
        Layer("core", "REDUCE", "fp16", ("a",)),
        Layer("rest", "ELEMENTWISE", "fp32", ("a", "b")),
    )
    assert [layer.nodes for layer in on_deciding_layers(layers)] == [("only_shape",), ("a",), ("b",)]


def test_layers_go_into_json_and_back():
    assert tuple(Layer.from_json(layer.to_json()) for layer in NETWORK) == NETWORK


@pytest.fixture
def runnable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audit as on a machine where the plan runs: only the inspector's text is made up."""
    monkeypatch.setattr(TensorRTBackend, "can_run", lambda self: None)
    monkeypatch.setattr(backend, "import_library", lambda family: None)


def audit_with(monkeypatch: pytest.MonkeyPatch, answer: str | Exception, tmp_path):
    def engine_information(*args: object) -> str:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(backend, "engine_information", engine_information)
    plan = tmp_path / "engine.plan"
    plan.write_bytes(b"vtrt")
    engine = Engine.of(plan, sidecar={"engine": "tensorrt-rtx", "layers": [layer.to_json() for layer in NETWORK]})
    return TENSORRT_RTX.audit(engine)


@pytest.mark.usefixtures("runnable")
def test_a_plan_that_runs_here_is_audited_by_the_inspector(monkeypatch, tmp_path):
    audit = audit_with(monkeypatch, schema_11(KERNELS), tmp_path)
    assert (audit.source, audit.realised) == ("inspector", True)
    assert audit.of_nodes()["kept_softmax"] == "fp32"


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize(
    "answer",
    [
        schema_11([("{ForeignNode[conv...act]}", "Myelin", ["fp32"], ["fp32"], ["conv", "act"], "")]),
        UnavailableError("built for another GPU"),
    ],
)
def test_where_the_inspector_tells_nothing_the_network_answers_and_is_not_called_realised(
    monkeypatch, tmp_path, answer
):
    audit = audit_with(monkeypatch, answer, tmp_path)
    assert (audit.source, audit.realised) == ("network", False)
    assert audit.layers == NETWORK
