"""A model indexed once: every node of every body, an id for each, and the type of every value.

Ids are node names. A node without a name, or with one that is taken, gets an id made from its op and position, prefixed with the id
of the node whose body it lies in. The index never changes the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from mpdeploy.precision.formats import FLOAT
from mpdeploy.precision.schema import Signature, signature

CONTROL_FLOW = ("If", "Loop", "Scan")

# The attribute that says the type of an op's output, where the schema does not tie it to an input, and its default.
TYPE_ATTRIBUTES: dict[str, tuple[str, ir.DataType | None]] = {
    "Cast": ("to", None),
    "RandomNormal": ("dtype", FLOAT),
    "RandomUniform": ("dtype", FLOAT),
    "RandomNormalLike": ("dtype", None),
    "RandomUniformLike": ("dtype", None),
    "EyeLike": ("dtype", None),
    "Bernoulli": ("dtype", None),
    "Multinomial": ("dtype", ir.DataType.INT32),
    "SequenceEmpty": ("dtype", FLOAT),
    "BlackmanWindow": ("output_datatype", FLOAT),
    "HannWindow": ("output_datatype", FLOAT),
    "HammingWindow": ("output_datatype", FLOAT),
    "MelWeightMatrix": ("output_datatype", FLOAT),
    "QuantizeLinear": ("output_dtype", None),
    "DequantizeLinear": ("output_dtype", None),
}

Kind = tuple[str, str, int | None, int, tuple[int, ...]]
"""Domain, op type, version, number of inputs, and the element types of inputs (and outputs): -1 not known, -2 left out, -3 a container."""


@dataclass(eq=False)
class GraphIndex:
    """See the module's docstring.

    Attributes:
        model: what was indexed.
        nodes: id -> node, in execution order, bodies after the node that owns them.
        id_of: node -> id.
        owner: body -> the node that owns it (absent for the main graph).
        dtypes: value -> element type of the tensor it holds; absent where that is not known or it holds no tensor.
        containers: values that hold a sequence, an optional or a map.
        elements: container -> element type of the tensors in it, where known.
        ports: what `flow.half_ports` found, by kind of node and format.
    """

    model: ir.Model
    nodes: dict[str, ir.Node] = field(default_factory=dict)
    id_of: dict[ir.Node, str] = field(default_factory=dict)
    owner: dict[ir.Graph, ir.Node] = field(default_factory=dict)
    dtypes: dict[ir.Value, ir.DataType] = field(default_factory=dict)
    containers: set[ir.Value] = field(default_factory=set)
    elements: dict[ir.Value, ir.DataType] = field(default_factory=dict)
    ports: dict[tuple[Kind, str], tuple[frozenset[int], frozenset[int]]] = field(default_factory=dict)
    _signatures: dict[tuple[str, str, int | None], Signature | None] = field(default_factory=dict)
    _kinds: dict[ir.Node, Kind] = field(default_factory=dict)
    _outputs_of: dict[Kind, tuple[ir.DataType, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ir.Model) -> GraphIndex:
        """Index a model whose functions are inlined.

        Raises:
            ModelError: the graph has a cycle or uses a value before it is made and cannot be sorted.
        """
        index = cls(model)
        taken = {node.name for node in _all_nodes(model.graph) if node.name}
        index._name(model.graph, "", taken)
        index._infer(model.graph)
        return index

    def signature(self, node: ir.Node) -> Signature | None:
        """The node's schema at the model's opset; None for an op that ONNX does not define."""
        key = (node.domain, node.op_type, node.version)
        if key not in self._signatures:
            self._signatures[key] = self._find_signature(node)
        return self._signatures[key]

    def _find_signature(self, node: ir.Node) -> Signature | None:
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = node.version or self.model.graph.opset_imports.get(node.domain)
        if version is None:
            version = self.model.graph.opset_imports.get(domain, 0)
        return signature(domain, node.op_type, version)

    @property
    def graphs(self) -> tuple[ir.Graph, ...]:
        """The main graph and every body."""
        return (self.model.graph, *self.owner)

    @property
    def knows_all_types(self) -> bool:
        """Whether every tensor that a node makes has an element type."""
        made = (value for node in self.nodes.values() for value in node.outputs if value.name)
        return all(value in self.dtypes or value in self.containers for value in made)

    def kind(self, node: ir.Node) -> Kind:
        """What decides about a node's types: its op and version, and the type of each tensor that goes in and comes out.

        A graph of thousands of nodes has a few dozen kinds: what depends on nothing else is found out once a kind.
        """
        found = self._kinds.get(node)
        if found is None:
            found = self._kinds[node] = self._kind(node, (*node.inputs, None, *node.outputs))
        return found

    def _kind(self, node: ir.Node, values: Sequence[ir.Value | None]) -> Kind:
        dtypes, containers = self.dtypes, self.containers
        held = tuple([
            -2 if v is None else int(dtypes[v]) if v in dtypes else -3 if v in containers else -1 for v in values
        ])  # fmt: skip
        return (node.domain, node.op_type, node.version, len(node.inputs), held)

    def is_float(self, value: ir.Value | None) -> bool:
        """Whether it holds a float32 tensor."""
        return value is not None and self.dtypes.get(value) == FLOAT

    def is_constant(self, value: ir.Value) -> bool:
        """Whether its content is known: an initialiser, or the output of a Constant node.

        From IR version 4 on, an initialiser that is a graph input too is a default that callers may override: no constant.
        """
        if value.is_initializer():
            overridable = value.is_graph_input() and (self.model.ir_version or 4) >= 4
            return value.const_value is not None and not overridable
        node = value.producer()
        return node is not None and node.op_type == "Constant" and node.domain in ("", "ai.onnx")

    def _name(self, graph: ir.Graph, prefix: str, taken: set[str]) -> None:
        for position, node in enumerate(graph):
            node_id = node.name or ""
            if not node_id or node_id in self.nodes:
                base = f"{prefix}{node.name or f'{node.op_type}_{position}'}"
                node_id, count = base, 2
                while node_id in self.nodes or (node_id in taken and node_id != node.name):
                    node_id, count = f"{base}#{count}", count + 1
            self.nodes[node_id] = node
            self.id_of[node] = node_id
            for name, body in bodies(node):
                self.owner[body] = node
                self._name(body, f"{node_id}/{name}/", taken)

    def _infer(self, graph: ir.Graph) -> None:
        for value in (*graph.inputs, *graph.initializers.values()):
            if value.const_value is not None:
                self.dtypes[value] = value.const_value.dtype
            else:
                self._declare(value)
        for node in graph:
            for _, body in bodies(node):
                self._infer(body)
            kind = self._kind(node, node.inputs) if _is_plain(node) else None
            if kind in self._outputs_of and len(node.outputs) == len(self._outputs_of[kind]):
                self.dtypes.update(zip(node.outputs, self._outputs_of[kind], strict=True))
                continue
            for position, value in enumerate(node.outputs):
                if self._is_container(node, position, value):
                    self.containers.add(value)
                    element = self._element_dtype(node, position)
                    if element is not None:
                        self.elements[value] = element
                    continue
                dtype = self._output_dtype(node, position)
                if dtype is None:
                    self._declare(value)
                    kind = None
                else:
                    self.dtypes[value] = dtype
            if kind is not None and not self.containers.intersection((*node.inputs, *node.outputs)):
                self._outputs_of[kind] = tuple(self.dtypes[value] for value in node.outputs)

    def _declare(self, value: ir.Value) -> None:
        if isinstance(value.type, ir.TensorType) and value.type.dtype != ir.DataType.UNDEFINED:
            self.dtypes[value] = value.type.dtype
        elif isinstance(value.type, ir.SequenceType | ir.OptionalType):
            self.containers.add(value)
            self.elements[value] = value.type.dtype

    def _is_container(self, node: ir.Node, position: int, value: ir.Value) -> bool:
        """Whether an output is no tensor: by its schema, by the body it comes from, or as declared where both are possible."""
        if node.op_type in CONTROL_FLOW:
            return any(
                0 <= place < len(body.outputs) and body.outputs[place] in self.containers
                for _, body in bodies(node)
                for place in [position + 1 if node.op_type == "Loop" else position]
            )
        form = self.signature(node)
        wanted = form.output_type(position) if form is not None else None
        if form is None or wanted is None:
            return isinstance(value.type, ir.SequenceType | ir.OptionalType)
        admitted = form.admitted.get(wanted, frozenset({wanted}))
        if all(name.startswith(("seq(", "optional(", "map(")) for name in admitted):
            return True
        if all(name.startswith("tensor(") for name in admitted):
            return False
        same = [v for i, v in enumerate(node.inputs) if v is not None and form.input_type(i) == wanted]
        return any(v in self.containers for v in same) or isinstance(value.type, ir.SequenceType | ir.OptionalType)

    def _element_dtype(self, node: ir.Node, position: int) -> ir.DataType | None:
        """What a container that a node makes holds: what went into it."""
        if node.op_type in CONTROL_FLOW:
            place = position + 1 if node.op_type == "Loop" else position
            made = [self.elements.get(body.outputs[place]) for _, body in bodies(node) if place < len(body.outputs)]
            return next((element for element in made if element is not None), None)
        attribute = node.attributes.get("dtype")
        if node.op_type == "SequenceEmpty":
            return ir.DataType(attribute.as_int()) if attribute is not None else FLOAT
        for value in (*node.inputs, *(v for _, body in bodies(node) for v in body.outputs)):
            found = None if value is None else self.elements.get(value, self.dtypes.get(value))
            if found is not None:
                return found
        return None

    def _output_dtype(self, node: ir.Node, position: int) -> ir.DataType | None:
        if node.op_type == "Constant":
            return constant_dtype(node)
        if node.op_type == "ConstantOfShape":
            fill = node.attributes.get("value")
            return FLOAT if fill is None else fill.as_tensor().dtype
        if node.op_type in CONTROL_FLOW:
            return self._from_bodies(node, position)
        form = self.signature(node)
        if form is None:
            return None
        if node.op_type == "LayerNormalization" and position > 0:
            return ir.DataType(node.attributes.get_int("stash_type", 1))
        if node.op_type in TYPE_ATTRIBUTES:
            name, default = TYPE_ATTRIBUTES[node.op_type]
            attribute = node.attributes.get(name)
            if attribute is not None and attribute.as_int() != 0:
                return ir.DataType(attribute.as_int())
            if default is not None:
                return default
        wanted = form.output_type(position)
        if wanted is None:
            return None
        if wanted.startswith("tensor("):
            return _DTYPE_OF_STRING.get(wanted)
        for place, value in enumerate(node.inputs):
            if value is not None and form.input_type(place) == wanted and value in self.dtypes:
                return self.dtypes[value]
        admitted = form.admitted.get(wanted, frozenset())
        if len(admitted) == 1:
            return _DTYPE_OF_STRING.get(next(iter(admitted)))
        for value in node.inputs:  # SequenceAt, ConcatFromSequence, OptionalGetElement: what the container holds
            if value is not None and value in self.elements:
                return self.elements[value]
        if node.op_type == "QuantizeLinear":
            zero = node.inputs[2] if len(node.inputs) > 2 else None
            return ir.DataType.UINT8 if zero is None else self.dtypes.get(zero)
        if node.op_type == "DequantizeLinear":
            return self.dtypes.get(node.inputs[1]) if node.inputs[1] is not None else None
        if (
            node.op_type in ("EyeLike", "RandomNormalLike", "RandomUniformLike", "Bernoulli")
            and node.inputs[0] is not None
        ):
            return self.dtypes.get(node.inputs[0])
        return None

    def _from_bodies(self, node: ir.Node, position: int) -> ir.DataType | None:
        for _, body in bodies(node):
            place = position + 1 if node.op_type == "Loop" else position  # a Loop body's first output is its condition
            if place < len(body.outputs):
                return self.dtypes.get(body.outputs[place])
        return None


def _is_plain(node: ir.Node) -> bool:
    """Whether the types of what comes out follow from the types of what goes in: no body and no attribute has a say."""
    return node.domain in _ONNX and node.op_type not in _NOT_PLAIN


def bodies(node: ir.Node) -> Sequence[tuple[str, ir.Graph]]:
    """The graphs a node holds, with the names of their attributes."""
    return list(_bodies(node)) if may_hold_bodies(node) else ()


def may_hold_bodies(node: ir.Node) -> bool:
    """Whether a node is of an op that takes graphs, or may be."""
    return node.op_type in _OWNERS or node.domain not in _ONNX


_OWNERS = frozenset({*CONTROL_FLOW, "SequenceMap"})
_ONNX = frozenset({"", "ai.onnx"})
_NOT_PLAIN = _OWNERS | TYPE_ATTRIBUTES.keys() | {"Constant", "ConstantOfShape", "LayerNormalization"}


def _bodies(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for number, graph in enumerate(attribute.as_graphs()):
                yield f"{name}_{number}", graph


def all_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph and every body within it."""
    yield graph
    for node in graph:
        if node.op_type in _OWNERS or node.domain not in _ONNX:
            for _, body in _bodies(node):
                yield from all_graphs(body)


def _all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for each in all_graphs(graph):
        yield from each


def constant_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The content of an initialiser or of a Constant node's output; None for anything else."""
    if value.const_value is not None and value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant":
        return value.const_value
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor()
        if name == "value_float":
            return ir.tensor(attribute.as_float(), dtype=FLOAT)
        if name == "value_floats":
            return ir.tensor(list(attribute.as_floats()), dtype=FLOAT)
    return None


def constant_dtype(node: ir.Node) -> ir.DataType | None:
    """The element type of a Constant node."""
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor().dtype
        if name in ("value_float", "value_floats"):
            return FLOAT
        if name in ("value_int", "value_ints"):
            return ir.DataType.INT64
        if name in ("value_string", "value_strings"):
            return ir.DataType.STRING
    return None


_DTYPE_OF_STRING = {
    f"tensor({name})": dtype
    for name, dtype in {
        "float": ir.DataType.FLOAT,
        "double": ir.DataType.DOUBLE,
        "float16": ir.DataType.FLOAT16,
        "bfloat16": ir.DataType.BFLOAT16,
        "int8": ir.DataType.INT8,
        "int16": ir.DataType.INT16,
        "int32": ir.DataType.INT32,
        "int64": ir.DataType.INT64,
        "uint8": ir.DataType.UINT8,
        "uint16": ir.DataType.UINT16,
        "uint32": ir.DataType.UINT32,
        "uint64": ir.DataType.UINT64,
        "bool": ir.DataType.BOOL,
        "string": ir.DataType.STRING,
        "complex64": ir.DataType.COMPLEX64,
        "complex128": ir.DataType.COMPLEX128,
    }.items()
}
