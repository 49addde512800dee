"""OpenVINO as a judge: it runs a graph as typed, in half precision for real, on CPUs that have the units."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

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
    model = core.read_model(path)
    num_outputs = len(model.outputs)
    if not fused:
        half = (ov.Type.f16, ov.Type.bf16)
        ports = [port for op in model.get_ordered_ops() for port in op.outputs() if port.get_element_type() in half]
        model.add_outputs([min(port.get_names()) for port in ports if port.get_names()])
    answers = core.compile_model(model, "CPU", AS_TYPED)(dict(feeds))
    return [np.asarray(answers[number]) for number in range(num_outputs)]
