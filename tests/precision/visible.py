"""Graphs that a test shows: ONNX text in, one line a node out, and short ways to rewrite and run them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from mpdeploy.precision import formats
from mpdeploy.precision.emulate import emulate
from mpdeploy.precision.graph_index import GraphIndex, all_graphs
from mpdeploy.precision.keep_list import match_keep_list, read_patterns
from mpdeploy.precision.passes.assignment import Assignment
from mpdeploy.precision.plan import PrecisionPlan, make_plan
from mpdeploy.precision.ranges import Ranges, TensorStats
from mpdeploy.precision.rewrite import Prepared, prepare, rewrite
from tests.precision.conformance_base import normal, parsed, weight

FP16, BF16 = formats.FORMATS["fp16"], formats.FORMATS["bf16"]
FLOAT16, BFLOAT16, FLOAT = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT

X = normal(3, 8, seed="x")
W = weight(8, 8)

CHAIN = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  e = Exp(h)  y = MatMul(e, w) }"


def graph(text: str, opset: int = 17, domains: Mapping[str, int] | None = None, **weights: Any) -> ir.Model:
    """A model from ONNX text; keyword arguments are its initialisers."""
    arrays = {name: np.asarray(array) for name, array in weights.items()}
    return ir.from_proto(parsed(text, opset, arrays, domains))


def named(model: ir.Model) -> ir.Model:
    """The same model with each node named after its first output."""
    for each in all_graphs(model.graph):
        for node in each:
            node.name = node.outputs[0].name
    return model


def lines(model: ir.Model | ir.Graph) -> list[str]:
    """One line a node, bodies indented: `h: FLOAT16 = MatMul(x, w)`; a Cast shows its target."""
    found = []
    root = model.graph if isinstance(model, ir.Model) else model
    for node in root:
        made = ", ".join(f"{v.name}" for v in node.outputs)
        target = f"<{ir.DataType(node.attributes.get_int('to')).name}>" if node.op_type == "Cast" else ""
        taken = ", ".join("" if v is None else str(v.name) for v in node.inputs)
        found.append(f"{made} = {node.op_type}{target}({taken})")
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                found += [f"  {line}" for line in lines(attribute.as_graph())]
    return found


def snapshot(model: ir.Model) -> bytes:
    """The model's bytes: equal where nothing at all changed."""
    return ir.to_proto(model).SerializeToString(deterministic=True)


def types_of(model: ir.Model) -> dict[str, str]:
    """Tensor name -> element type, as indexed anew."""
    return {value.name or "": dtype.name for value, dtype in GraphIndex.of(model).dtypes.items()}


def run(model: ir.Model, feeds: Mapping[str, Any], *, optimise: bool = False) -> list[np.ndarray]:
    """ONNX Runtime's answers on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def rel_l2(found: np.ndarray, expected: np.ndarray) -> float:
    """||found - expected|| / ||expected||."""
    error = np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64))
    return float(error / np.linalg.norm(expected.astype(np.float64)))


def stats_of(*arrays: Any) -> TensorStats:
    """Statistics of one tensor over feeds."""
    stats = TensorStats()
    for number, array in enumerate(arrays):
        stats.add(np.asarray(array, np.float32), number)
    return stats


def ranges_of(model: ir.Model, *feeds: Mapping[str, Any]) -> Ranges:
    """What a model's float tensors (its float inputs too) held on some feeds."""
    shown = model.clone()
    index = GraphIndex.of(shown)
    inside = [v for node in shown.graph for v in node.outputs if index.is_float(v) and node.op_type != "Constant"]
    given = [v for v in shown.graph.inputs if index.is_float(v)]
    present = set(shown.graph.outputs)
    shown.graph.outputs.extend(v for v in inside if v not in present)
    order = [v.name for v in shown.graph.outputs]
    ranges = Ranges({v.name: TensorStats() for v in (*given, *inside)}, len(feeds), len(feeds))
    for number, feed in enumerate(feeds):
        answers = dict(zip(order, run(shown, feed), strict=True)) | {v.name: feed[v.name] for v in given}
        for name, stats in ranges.tensors.items():
            stats.add(np.asarray(answers[name], np.float32), number)
    return ranges


@dataclass
class Converted:
    """A model that went through the rewriter, with what it did on the way."""

    prepared: Prepared
    plan: PrecisionPlan
    model: ir.Model

    @property
    def lines(self) -> list[str]:
        return lines(self.model)

    @property
    def half(self) -> list[str]:
        return self.plan.half_nodes

    def why(self, node: str) -> str:
        return "; ".join(map(str, self.plan.kept[node]))

    def emulated(self, feeds: Mapping[str, Any]) -> list[np.ndarray]:
        return run(emulate(self.model), feeds)


def plan_of(
    model: ir.Model,
    half: formats.HalfFormat = FP16,
    *,
    keep: Sequence[str] = (),
    ranges: Ranges | None = None,
    float_io: Collection[str] = (),
    disabled_rules: Collection[str] = (),
) -> tuple[Prepared, PrecisionPlan]:
    prepared = prepare(model, half)
    kept = match_keep_list(prepared.index, read_patterns(keep), model_name="model")
    plan = make_plan(
        prepared.index, half, keep=kept, ranges=ranges, float_io=float_io, notes=prepared.notes,
        disabled_rules=disabled_rules,
    )  # fmt: skip
    return prepared, plan


def converted(model: ir.Model, half: formats.HalfFormat = FP16, *, keep_io: bool = False, **more: Any) -> Converted:
    """The model after the whole rewriter."""
    if keep_io:
        more["float_io"] = [v.name for v in (*model.graph.inputs, *model.graph.outputs)]
    prepared, plan = plan_of(model, half, **more)
    return Converted(prepared, plan, rewrite(prepared, plan))


def assigned(model: ir.Model, half: formats.HalfFormat = FP16, **more: Any) -> tuple[ir.Model, Assignment]:
    """A prepared model and its plan, for one pass to be tried on."""
    prepared, plan = plan_of(model, half, **more)
    return prepared.model, Assignment(prepared.index, plan)
