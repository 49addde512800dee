"""How float tensors flow between the things that have a precision: nodes, graph inputs and outputs, and borders of bodies.

Each of them is a *unit* that is either half or FP32. A tensor whose producer and consumer differ needs a cast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from mpdeploy.precision.formats import FLOAT, HalfFormat
from mpdeploy.precision.graph_index import CONTROL_FLOW, TYPE_ATTRIBUTES, GraphIndex, bodies
from mpdeploy.precision.op_rules import COMPUTE_OPS, EXACT_OPS, RULE_OF_OP

UNKNOWN_AXIS = 16
UNKNOWN_SIZE = 1024


@dataclass
class Unit:
    """Something with a precision.

    Attributes:
        key: a node's id, `input:NAME`, `output:NAME`, or `NODE:out3` for an output of an If, Loop or Scan.
        node: the node, or None.
        gain: bytes of memory traffic that half precision saves; infinite for matrix products.
        fixed: whether it must be FP32.
        is_searched: a search fixed it, nobody asked for it: casts of an input or an output cost what others do.
    """

    key: str
    node: ir.Node | None = None
    gain: float = 0.0
    fixed: bool = False
    is_searched: bool = False


@dataclass
class Edge:
    """A float tensor, the unit that makes it and those that take it.

    Attributes:
        value: the tensor.
        producer: position in `Flow.units`.
        always_float: whether it comes out as FP32 whatever its producer's precision.
        consumers: positions of those that take it in their own precision.
        float_consumers: whether someone takes it as FP32 whatever its precision.
        size: number of values.
    """

    value: ir.Value
    producer: int
    always_float: bool = False
    consumers: list[int] = field(default_factory=list)
    float_consumers: bool = False
    size: float = UNKNOWN_SIZE


@dataclass
class Flow:
    """Units and the edges between them."""

    units: list[Unit] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    of_key: dict[str, int] = field(default_factory=dict)

    def add(self, unit: Unit) -> int:
        """Add a unit and return its position."""
        self.of_key[unit.key] = len(self.units)
        self.units.append(unit)
        return len(self.units) - 1


def half_ports(index: GraphIndex, node: ir.Node, half: HalfFormat) -> tuple[frozenset[int], frozenset[int]]:
    """Positions of the float inputs and outputs of a node that become half when the node does."""
    key = (index.kind(node), half.name)
    if key not in index.ports:
        index.ports[key] = _half_ports(index, node, half)
    return index.ports[key]


def _half_ports(index: GraphIndex, node: ir.Node, half: HalfFormat) -> tuple[frozenset[int], frozenset[int]]:
    form = index.signature(node)
    if form is None or node.op_type in (*CONTROL_FLOW, "Constant"):
        return frozenset(), frozenset()
    rule = RULE_OF_OP.get(node.op_type)
    stay = rule.float_inputs if rule is not None and node.domain in ("", "ai.onnx") else ()
    # A variable one of whose inputs stays FP32, or is of a type that is not known, ties all of its ports to FP32.
    tied = {
        form.input_type(position)
        for position, value in enumerate(node.inputs)
        if value is not None and (position in stay or value not in index.dtypes)
    }
    inputs: set[int] = set()
    variables: set[str] = set()
    for position, value in enumerate(node.inputs):
        wanted = form.input_type(position)
        if wanted is None or wanted in tied or not index.is_float(value):
            continue
        if not wanted.startswith("tensor(") and form.admits(wanted, half.onnx):
            inputs.add(position)
            variables.add(wanted)
    outputs: set[int] = set()
    for position, value in enumerate(node.outputs):
        wanted = form.output_type(position)
        if wanted is None or not index.is_float(value) or wanted.startswith("tensor("):
            continue
        free = node.op_type in TYPE_ATTRIBUTES or node.op_type == "ConstantOfShape"
        if form.admits(wanted, half.onnx) and (wanted in variables or free):
            outputs.add(position)
    return frozenset(inputs), frozenset(outputs)


def has_float(index: GraphIndex, node: ir.Node) -> bool:
    """Whether any tensor that goes in or comes out is float32 (or of unknown type, for an op that ONNX does not know)."""
    return int(FLOAT) in index.kind(node)[-1]


def build_flow(
    index: GraphIndex,
    half: HalfFormat,
    *,
    is_fixed: Callable[[str], bool],
    float_io: Callable[[str], bool],
    size_of: Callable[[ir.Value], float],
) -> Flow:
    """Units and edges of an indexed model.

    Args:
        index: the model.
        half: the format.
        is_fixed: node id, or border key of an If's output -> whether it must be FP32.
        float_io: name of a graph input or output -> whether it must be FP32.
        size_of: value -> number of elements.
    """
    flow = Flow()
    ports: dict[ir.Node, tuple[frozenset[int], frozenset[int]]] = {}
    unit_of: dict[ir.Node, int] = {}
    edge_of: dict[ir.Value, Edge] = {}

    def edge(value: ir.Value, producer: int, *, always_float: bool = False) -> None:
        edge_of[value] = Edge(value, producer, always_float, size=size_of(value))

    for node_id, node in index.nodes.items():
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            continue
        if node.op_type in CONTROL_FLOW:
            _add_borders(index, flow, node, node_id, edge, is_fixed)
            continue
        if not has_float(index, node):
            continue
        ports[node] = half_ports(index, node, half)
        fixed = is_fixed(node_id) or not any(ports[node])
        unit_of[node] = flow.add(Unit(node_id, node, gain=_gain(index, node, ports[node], size_of), fixed=fixed))
        for position, value in enumerate(node.outputs):
            if index.is_float(value):
                edge(value, unit_of[node], always_float=position not in ports[node][1])
    for given in index.model.graph.inputs:
        if index.is_float(given) and not index.is_constant(given):
            key = f"input:{given.name}"
            edge(given, flow.add(Unit(key, gain=2.0 * size_of(given), fixed=float_io(given.name or ""))))

    for node, unit in unit_of.items():
        for position, taken in enumerate(node.inputs):
            if taken is None or taken not in edge_of:
                continue
            if position in ports[node][0]:
                edge_of[taken].consumers.append(unit)
            else:
                edge_of[taken].float_consumers = True
    for node in index.nodes.values():
        if node.op_type in CONTROL_FLOW:
            _take_borders(index, flow, node, edge_of)
    for output in index.model.graph.outputs:
        if index.is_float(output) and output in edge_of:
            key = f"output:{output.name}"
            unit = flow.add(Unit(key, gain=2.0 * size_of(output), fixed=float_io(output.name or "")))
            edge_of[output].consumers.append(unit)
    flow.edges = list(edge_of.values())
    return flow


def _gain(
    index: GraphIndex,
    node: ir.Node,
    ports: tuple[frozenset[int], frozenset[int]],
    size_of: Callable[[ir.Value], float],
) -> float:
    if node.op_type in COMPUTE_OPS:
        return math.inf
    if node.op_type == "Cast":
        return (
            0.0 if all(index.dtypes.get(v) in _FLOATS for v in (*node.inputs, *node.outputs) if v is not None) else 1.0
        )
    values = [node.inputs[i] for i in ports[0]] + [node.outputs[i] for i in ports[1]]
    return sum(2.0 * size_of(value) for value in values if value is not None)


_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


def border_key(node_id: str, position: int) -> str:
    """The key of the unit for an output of an If, Loop or Scan."""
    return f"{node_id}:out{position}"


def _add_borders(
    index: GraphIndex,
    flow: Flow,
    node: ir.Node,
    node_id: str,
    edge: Callable[..., None],
    is_fixed: Callable[[str], bool],
) -> None:
    """An If output may be half. What a Loop or Scan carries or collects is FP32: rounding it would add up over iterations."""
    for position, value in enumerate(node.outputs):
        if index.is_float(value):
            key = border_key(node_id, position)
            edge(value, flow.add(Unit(key, node, fixed=node.op_type != "If" or is_fixed(key))))
    if node.op_type != "If":
        carried = flow.add(Unit(f"{node_id}:body", node, fixed=True))
        for _, body in bodies(node):
            for value in body.inputs:
                if index.is_float(value):
                    edge(value, carried)


def _take_borders(index: GraphIndex, flow: Flow, node: ir.Node, edge_of: dict[ir.Value, Edge]) -> None:
    node_id = index.id_of[node]
    for value in node.inputs:
        if value is not None and value in edge_of:
            edge_of[value].float_consumers = True
    for _, body in bodies(node):
        for position, value in enumerate(body.outputs):
            if value not in edge_of:
                continue
            if node.op_type == "If":
                edge_of[value].consumers.append(flow.of_key[border_key(node_id, position)])
            else:
                edge_of[value].float_consumers = True


def shape_size(value: ir.Value) -> float:
    """Number of elements by the declared shape; symbolic axes count as `UNKNOWN_AXIS`, no shape as `UNKNOWN_SIZE`."""
    if value.shape is None:
        return float(UNKNOWN_SIZE)
    return float(math.prod(axis if isinstance(axis, int) else UNKNOWN_AXIS for axis in value.shape))


def is_exact(node: ir.Node) -> bool:
    """Whether its outputs are copies, or exact functions, of its inputs (see `op_rules.EXACT_OPS`)."""
    return node.domain in ("", "ai.onnx") and node.op_type in EXACT_OPS


def float_values(index: GraphIndex, graph: ir.Graph | None = None) -> list[ir.Value]:
    """Float tensors of a graph that are computed: what ranges are taken of. Of a body its float inputs too, of the main graph not."""
    home = index.model.graph if graph is None else graph
    given = () if graph is None else tuple(graph.inputs)
    return [
        value
        for value in (*given, *(value for node in home if node.op_type != "Constant" for value in node.outputs))
        if value.name and index.dtypes.get(value) == FLOAT
    ]
