"""What engines make of an op that ONNX calls one: several, with tensors between them that are stored in half as well.

`split_as_tensorrt_does` takes apart what TensorRT's ONNX parser takes apart (11.4 and RTX 1.7, read from the networks it makes; a test
reads them again). `hold_sums_in_half` goes further: it holds the sums inside reductions, norms and dot products in half, which is the
worst that an engine may do where its documentation does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from mpdeploy.precision.chain import Attributes, Chain
from mpdeploy.precision.dot_products import DOT_PRODUCTS, add_largest_sum
from mpdeploy.precision.formats import HALF_TYPES
from mpdeploy.precision.graph_index import GraphIndex


def _log_softmax(chain: Chain, attributes: Attributes) -> None:
    chain.add("Log", [chain.add("Softmax", [chain.node.inputs[0]], attributes)])


def _sum_of_squares(chain: Chain, attributes: Attributes) -> None:
    taken = chain.node.inputs[0]
    square = chain.add("Mul", [taken, taken])
    chain.add("ReduceL1", [square, *chain.node.inputs[1:]], attributes)  # a sum, in the same form at every opset


def _log_sum_exp(chain: Chain, attributes: Attributes) -> None:
    taken, axes = chain.node.inputs[0], list(chain.node.inputs[1:])
    kept = {**attributes, "keepdims": ir.AttrInt64("keepdims", 1)}
    shifted = chain.add("Sub", [taken, chain.add("ReduceMax", [taken, *axes], kept)])
    total = chain.add("ReduceL1", [chain.add("Exp", [shifted]), *axes], attributes)
    largest = chain.add("ReduceMax", [taken, *axes], attributes)
    chain.add("Add", [chain.add("Log", [total]), largest])


def _mish(chain: Chain, attributes: Attributes) -> None:
    taken = chain.node.inputs[0]
    chain.add("Mul", [taken, chain.add("Tanh", [chain.add("Softplus", [taken])])])


TENSORRT_SPLITS: dict[str, Callable[[Chain, Attributes], None]] = {
    "LogSoftmax": _log_softmax,
    "ReduceSumSquare": _sum_of_squares,
    "ReduceLogSumExp": _log_sum_exp,
    "Mish": _mish,
}


def split_as_tensorrt_does(model: ir.Model) -> None:
    """Replace half nodes of the ops in `TENSORRT_SPLITS`, in every body, by what TensorRT's parser makes of them."""
    index = GraphIndex.of(model)
    for node in list(index.nodes.values()):
        split = TENSORRT_SPLITS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        dtype = index.dtypes.get(node.outputs[0]) if split is not None else None
        if split is None or dtype not in HALF_TYPES:
            continue
        chain = Chain(node)
        made, users = node.outputs[0], list(node.outputs[0].uses())
        split(chain, dict(node.attributes))
        _continue_with(index, chain, users)
        made.name = f"{made.name}.whole"
        assert node.graph is not None
        node.graph.remove(node, safe=True)


def _continue_with(index: GraphIndex, chain: Chain, users: Sequence[tuple[ir.Node, int]]) -> None:
    """The chain's last output takes the name and the users of the node's."""
    made, last = chain.node.outputs[0], chain.nodes[-1].outputs[0]
    assert chain.node.graph is not None
    chain.node.graph.insert_after(chain.node, chain.nodes)
    for user, position in users:
        user.replace_input_with(position, last)
    for graph in index.graphs:
        for position, output in enumerate(graph.outputs):
            if output is made:
                graph.outputs[position] = last
    last.shape = made.shape
    made.name, last.name = f"{made.name}.before", made.name


MEANS = frozenset({"ReduceMean", "GlobalAveragePool"})
NORMS = frozenset({"LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "ReduceL2"})


def hold_sums_in_half(model: ir.Model) -> None:
    """Hold the sums inside half means and dot products, and the squares inside half norms, in half: what overflows there is lost.

    Of a dot product it is the largest sum that any order of its terms can give (see `dot_products`).
    """
    index = GraphIndex.of(model)
    for node in list(index.nodes.values()):
        dtype = index.dtypes.get(node.outputs[0])
        if node.domain not in ("", "ai.onnx") or dtype not in HALF_TYPES:
            continue
        if node.op_type not in MEANS | NORMS | DOT_PRODUCTS:
            continue
        chain = Chain(node)
        made, users = node.outputs[0], list(node.outputs[0].uses())
        if node.op_type in MEANS:
            count = _ratio_of_sizes(chain, node.inputs[0], made)
            chain.add("Div", [chain.add("Mul", [made, count]), count])
        elif node.op_type in DOT_PRODUCTS:
            largest = add_largest_sum(chain, dtype)
            chain.add("Add", [made, chain.add("Sub", [largest, largest])])  # zero, or NaN
        else:
            squares = chain.add("Mul", [node.inputs[0], node.inputs[0]])
            lost = chain.add("Sub", [squares, squares])  # zero, or NaN where a square is infinite
            worst = chain.add("ReduceMax", [lost], {"keepdims": ir.AttrInt64("keepdims", 0)})
            chain.add("Add", [made, worst])
        _continue_with(index, chain, users)


def _ratio_of_sizes(chain: Chain, taken: ir.Value | None, made: ir.Value) -> ir.Value:
    sizes: list[ir.Value | None] = [chain.add("Size", [value]) for value in (taken, made)]
    return chain.add("Cast", [chain.add("Div", sizes)], {"to": ir.AttrInt64("to", int(ir.DataType.FLOAT))})
