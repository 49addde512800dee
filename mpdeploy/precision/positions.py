"""Arithmetic on positions: floats that are made of integers and end as integers (relative position buckets, shapes, indices).

Half precision there moves an index, which no tolerance forgives. Such nodes are found in the graph alone.
"""

from __future__ import annotations

import onnx_ir as ir

from mpdeploy.precision.formats import FLOAT
from mpdeploy.precision.graph_index import CONTROL_FLOW, GraphIndex


def position_arithmetic(index: GraphIndex) -> set[str]:
    """Ids of float nodes that depend on integers and constants only and that an integer Cast depends on."""
    if not any(node.op_type == "Cast" and _becomes_integer(index, node) for node in index.nodes.values()):
        return set()
    made_of_integers: set[ir.Value] = set()
    for node in index.nodes.values():
        if node.op_type in CONTROL_FLOW or node.op_type == "Constant":
            continue
        floats = [value for value in node.inputs if index.is_float(value) and value is not None]
        if all(value in made_of_integers or index.is_constant(value) for value in floats):
            made_of_integers.update(value for value in node.outputs if index.is_float(value))
    found: set[str] = set()
    for node_id, node in reversed(index.nodes.items()):
        ends = node.op_type == "Cast" and not any(index.is_float(value) for value in node.outputs)
        feeds = any(
            user in index.id_of and index.id_of[user] in found for value in node.outputs for user, _ in value.uses()
        )
        takes = any(value in made_of_integers for value in node.inputs if value is not None)
        if (ends and takes and _becomes_integer(index, node)) or (
            feeds and any(value in made_of_integers for value in node.outputs)
        ):
            found.add(node_id)
    return found


def _becomes_integer(index: GraphIndex, node: ir.Node) -> bool:
    dtype = index.dtypes.get(node.outputs[0])
    return dtype is not None and dtype != FLOAT and dtype.is_integer()
