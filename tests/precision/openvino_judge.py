"""OpenVINO as a judge: it runs a graph as typed, in half precision for real, on CPUs that have the units.

What its kernels store they round to nearest even, but its conversion to BF16, where that is a layer of its own, adds half a unit only
where the last bit that stays is odd (2026.4: `software_cast`, which a test compares with it). No hardware does so: before a Cast to
BF16 the judge's graph therefore rounds to BF16 in FP32 arithmetic, after which every way of rounding gives the same.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpdeploy.precision.chain import Chain
from mpdeploy.precision.graph_index import GraphIndex

AS_TYPED = {"EXECUTION_MODE_HINT": "ACCURACY"}
HALF = {"fp16": (TensorProto.FLOAT16, "f16"), "bf16": (TensorProto.BFLOAT16, "bf16")}
"""Precision -> its type in ONNX, and its name in OpenVINO's runtime model."""


def skip_where_it_cannot_judge(precision: str) -> None:
    """Skip a test, with the reason, where OpenVINO computes half nodes in FP32 on this CPU, or is not installed."""
    pytest.importorskip("openvino")
    runs_in = precision_of_a_half_matmul(precision)
    if runs_in != HALF[precision][1]:
        pytest.skip(f"OpenVINO computes {precision} nodes in {runs_in} on this CPU and cannot judge")


@functools.cache
def precision_of_a_half_matmul(precision: str) -> str:
    """In what OpenVINO says that it runs a product typed `precision`: asked of it, since the flags of a CPU do not tell.

    BF16 products run on AVX512-BF16 as on AMX; FP16 ones on AVX512-FP16 and AMX-FP16 alone.
    """
    import openvino as ov

    half = HALF[precision][0]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [32, 64])
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["half"], to=half),
            helper.make_node("Cast", ["weights"], ["half_weights"], to=half),
            helper.make_node("MatMul", ["half", "half_weights"], ["product"], name="product"),
            helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
        ],
        "probe",
        [x],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [32, 64])],
        [numpy_helper.from_array(np.full((64, 64), 0.1, np.float32), "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    core = ov.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", AS_TYPED)
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    (runs_in,) = {i["runtimePrecision"].value for i in infos if i["layerType"].value in ("FullyConnected", "MatMul")}
    return str(runs_in)


def answers_as_typed(path: Path, feeds: Mapping[str, np.ndarray], *, fused: bool = True) -> list[np.ndarray]:
    """What OpenVINO answers with every node in the precision that the file says.

    Args:
        path: an ONNX file.
        feeds: input name -> array.
        fused: let one kernel compute several nodes, which then rounds once; else every half tensor of the file is asked for, too.
    """
    import openvino as ov

    core = ov.Core()
    judged = path.with_suffix(".judged.onnx")
    ir.save(rounded_before_casts(ir.load(path)), judged)
    model = core.read_model(judged)
    num_outputs = len(model.outputs)
    if not fused:
        half = (ov.Type.f16, ov.Type.bf16)
        ports = [port for op in model.get_ordered_ops() for port in op.outputs() if port.get_element_type() in half]
        model.add_outputs([min(port.get_names()) for port in ports if port.get_names()])
    answers = core.compile_model(model, "CPU", AS_TYPED)(dict(feeds))
    return [np.asarray(answers[number]) for number in range(num_outputs)]


def rounded_before_casts(model: ir.Model) -> ir.Model:
    """The same model, with what a Cast takes to BF16 rounded to BF16 before (Veltkamp 1968: c = (2**16 + 1) x; c - (c - x))."""
    dtypes = GraphIndex.of(model).dtypes
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Cast" or node.attributes.get_int("to") != TensorProto.BFLOAT16:
            continue
        taken = node.inputs[0]
        if dtypes.get(taken) != ir.DataType.FLOAT:
            continue
        chain = Chain(node)
        factor, most = (
            chain.add("Constant", [], {"value": ir.AttrTensor("value", ir.tensor(np.array(value, np.float32)))})
            for value in (2**16 + 1, 1e30)
        )
        scaled = chain.add("Mul", [taken, factor])
        rounded = chain.add("Sub", [scaled, chain.add("Sub", [scaled, taken])])
        is_small = chain.add("Less", [chain.add("Abs", [taken]), most])
        node.replace_input_with(0, chain.add("Where", [is_small, rounded, taken]))
        node.graph.insert_before(node, chain.nodes)
    return model


def software_cast(values: np.ndarray) -> np.ndarray:
    """OpenVINO's own conversion to BF16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + ((bits & 0x00010000) >> 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
