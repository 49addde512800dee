"""FP16, BF16 and FP32 in one model: nodes that FP16 cannot hold run in BF16, which has FP32's range.

A model that is rewritten to FP16 is rewritten once more, to BF16, and only those nodes may change: the second pass sees the FP32 nodes
and the casts that the first one left. A tensor that goes from FP16 to BF16 passes through one Cast.
"""

from __future__ import annotations

import math
from dataclasses import replace

import onnx_ir as ir

from mpdeploy.precision.borders import half_units
from mpdeploy.precision.flow import build_flow, shape_size
from mpdeploy.precision.formats import FLOAT, FORMATS, HALF_TYPES
from mpdeploy.precision.graph_index import GraphIndex
from mpdeploy.precision.passes.assignment import Assignment
from mpdeploy.precision.passes.declare_types import declare_types
from mpdeploy.precision.passes.raise_opset import RaiseOpsetPass, needs_raise
from mpdeploy.precision.plan import PrecisionPlan
from mpdeploy.precision.rewrite import Prepared, passes, rewrite_indexed


def rewrite_with_islands(prepared: Prepared, plan: PrecisionPlan, *, consume: bool = False) -> GraphIndex:
    """Carry out a plan, BF16 nodes (`plan.bf16`) included; arguments and result are those of `rewrite_indexed`.

    A node that has no BF16 form in ONNX at any opset that can be reached stays FP32.
    """
    for node_id in plan.bf16:
        prepared.index.nodes[node_id].name = node_id  # the second pass finds it by that, whatever is put in between
    index = rewrite_indexed(prepared, plan, consume=consume)
    if not plan.bf16:
        return index
    half = FORMATS["bf16"]
    model = index.model
    missing = needs_raise(index, half)
    if any(index.nodes[node_id].op_type in missing for node_id in plan.bf16) and RaiseOpsetPass()(model).modified:
        index = GraphIndex.of(model)
    casts = {node_id for node_id, node in index.nodes.items() if _is_cast_beside_half(index, node)}
    flow = build_flow(
        index,
        half,
        is_fixed=lambda node_id: node_id not in plan.bf16 and node_id not in casts,
        float_io=lambda _: True,
        size_of=shape_size,
    )
    flow.units = [replace(unit, gain=math.inf) if unit.key in plan.bf16 else unit for unit in flow.units]
    second = PrecisionPlan(half, frozenset(half_units(flow)), {}, {})
    assignment = Assignment(index, second)
    for each in passes(assignment):
        each(model)
    for node_id in sorted(casts & second.half_keys):
        _rename(index.nodes[node_id], assignment)
    rewritten = GraphIndex.of(model)
    declare_types(rewritten)
    return rewritten


def _rename(cast: ir.Node, assignment: Assignment) -> None:
    """`x_to_float` makes BF16 now."""
    made = cast.outputs[0]
    name = made.name or ""
    if name.endswith("_to_float") and not made.is_graph_output() and cast.graph is not None:
        made.name = assignment.fresh_name(name.removesuffix("_to_float") + "_to_bfloat16")
        cast.name = assignment.fresh_name(f"Cast_{made.name}")


def _is_cast_beside_half(index: GraphIndex, node: ir.Node) -> bool:
    """A Cast between FP16 and FP32: where its FP32 side becomes BF16, it goes there directly."""
    if node.op_type != "Cast" or node.domain not in ("", "ai.onnx") or node.inputs[0] is None:
        return False
    types = {index.dtypes.get(node.inputs[0]), index.dtypes.get(node.outputs[0])}
    return FLOAT in types and bool(types & HALF_TYPES)
