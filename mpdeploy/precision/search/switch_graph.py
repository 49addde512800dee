"""One graph for all candidates: an emulation whose roundings are switched at run time, so that no session is rebuilt.

`emulate` makes one FP32 model a plan. Here every rounding that some plan may cause sits in an `If` with a flag that is fed:

    a tensor on its way to a consumer      If(flag) { Cast to half, Cast back } else { Identity }
    an op with constants that half changes If(flag) { op with rounded constants } else { op as it was }

A tensor between p and c is rounded when p gives half or c takes half; ops that only move or select values (`MOVES`) commute with
rounding, so a chain of them is one switch, thrown when any unit on it is half. A plan is a vector of flags then, and so is a probe
of a single rounding. Switching equals rewriting and emulating; the tests and every search prove it on the model at hand.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mpdeploy.precision.engine_forms import USUAL, TakenApart, take_apart
from mpdeploy.precision.flow import Flow, border_key, half_ports
from mpdeploy.precision.formats import FLOAT, HalfFormat
from mpdeploy.precision.graph_index import CONTROL_FLOW, GraphIndex, all_graphs, constant_tensor
from mpdeploy.precision.passes.convert_constants import half_tensor

FLAGS = "mpdeploy.flags"
"""The input that holds one bool a switch."""

MOVES = frozenset(
    [
        "Reshape",
        "Transpose",
        "Unsqueeze",
        "Squeeze",
        "Flatten",
        "Identity",
        "Slice",
        "Split",
        "Expand",
        "Tile",
        "Gather",
        "GatherElements",
        "GatherND",
        "DepthToSpace",
        "SpaceToDepth",
        "Neg",
        "Abs",
        "Relu",
        "MaxPool",
        "GlobalMaxPool",
    ]
)
"""Ops with one float input (the first) that give back its values: rounding before or after them is the same."""
SIZES = frozenset(["Shape", "Size"])
"""Ops that do not look at values."""


@dataclass(frozen=True, slots=True)
class Switch:
    """One rounding that can be thrown.

    Attributes:
        name: `TENSOR -> CONSUMER`, or `constants of NODE`; no two are the same.
        needs: keys of the units that must all be FP32 for it to stay off.
        tensor: the tensor that is rounded (its name in the FP32 model), or None for constants.
        injected: relative squared error of rounding the constants; None for a tensor, whose values are not known here.
    """

    name: str
    needs: tuple[str, ...]
    tensor: str | None
    injected: float | None = None


@dataclass
class SwitchGraph:
    """The switchable model and its switches, in the order of the flags."""

    model: ir.Model
    switches: list[Switch] = field(default_factory=list)

    def flags(self, half_keys: Collection[str]) -> NDArray[np.bool_]:
        """The flags of a plan, by the keys of its half units."""
        return np.array([any(key in half_keys for key in switch.needs) for switch in self.switches], dtype=bool)


def build_switch_graph(prepared: ir.Model, half: HalfFormat, flow: Flow, engine: str = USUAL) -> SwitchGraph:
    """Make the switchable emulation of a prepared FP32 model.

    Args:
        prepared: the model; it is not changed.
        half: the format that is rounded to.
        flow: its units; those that are fixed are never half.
        engine: what it takes apart is taken apart (see `engine_forms`), and the pieces are half where the op is.

    Raises:
        UsageError: there is no such engine.
    """
    model = prepared.clone()
    taken_apart = take_apart(model, engine, in_fp32=True)
    builder = _Builder(model, half, {unit.key for unit in flow.units if not unit.fixed}, taken_apart)
    builder.run()
    return SwitchGraph(model, builder.switches)


@dataclass
class _Edge:
    """A place where a tensor may be rounded: at a node's inputs, or at a graph's output."""

    value: ir.Value
    needs: tuple[str, ...]
    root: ir.Value
    node: ir.Node | None = None
    positions: tuple[int, ...] = ()
    graph: ir.Graph | None = None


class _Builder:
    def __init__(self, model: ir.Model, half: HalfFormat, free: set[str], taken_apart: TakenApart) -> None:
        self.model = model
        self.half = half
        self.free = free
        self.inner = taken_apart.inner
        self.index = GraphIndex.of(model)
        self.key_of = {node: taken_apart.node_of.get(node.name or "", key) for node, key in self.index.id_of.items()}
        self.ports = {node: half_ports(self.index, node, half) for node in self.index.nodes.values()}
        self.switches: list[Switch] = []
        self.flags: list[ir.Value] = []
        self.count = 0

    def run(self) -> None:
        self._free_initialisers()
        edges = [*self._node_edges(), *self._output_edges()]
        constants = [
            (node, found) for node in self.index.nodes.values() if (found := self._changed_constants(node)) is not None
        ]
        for edge in edges:
            self._switch_edge(edge)
        for node, (changed, injected) in constants:
            self._switch_constants(node, changed, injected)
        self._feed_flags()
        if self.model.graph.opset_imports.get("") == 22:
            # as in `emulate`: ONNX Runtime lacks FP32 kernels of some ops at opset 22
            self.model.graph.opset_imports[""] = 21

    def _free_initialisers(self) -> None:
        """Before IR version 4 an initialiser must be an input, too: those that are put in here are none."""
        graph = self.model.graph
        if (self.model.ir_version or 4) < 4:
            self.model.ir_version = 4
            graph.inputs[:] = [value for value in graph.inputs if value.name not in graph.initializers]

    # which roundings there are

    def _takes(self, node: ir.Node, position: int) -> str | None:
        key = self.key_of[node]
        is_half = key in self.free and position in self.ports[node][0] and node.inputs[position] not in self.inner
        return key if is_half else None

    def _gives(self, value: ir.Value) -> str | None:
        node = value.producer()
        if node is None:
            key = f"input:{value.name}" if value.graph is self.model.graph else ""
        elif node.op_type in CONTROL_FLOW:
            key = border_key(self.key_of[node], value.index() or 0)
        else:
            key = self.key_of[node] if (value.index() or 0) in self.ports[node][1] else ""
        return key if key in self.free and value not in self.inner else None

    def _moves(self, node: ir.Node) -> bool:
        return (
            node.op_type in MOVES and node.domain in ("", "ai.onnx") and 0 in self.ports[node][0] | self.ports[node][1]
        )

    def _path(self, value: ir.Value) -> tuple[ir.Value, list[str]]:
        """The tensor that was made at the start of a chain of moves, and the units from its maker to the chain's end."""
        units: list[str | None] = [self._gives(value)]
        node = value.producer()
        while node is not None and self._moves(node):
            source = node.inputs[0]
            if source is None or not self._is_computed(source):
                break
            value, node = source, source.producer()
            units.append(self._gives(value))
        return value, [unit for unit in units if unit is not None]

    def _is_computed(self, value: ir.Value | None) -> bool:
        return value is not None and self.index.dtypes.get(value) == FLOAT and not self.index.is_constant(value)

    def _node_edges(self) -> Iterator[_Edge]:
        for node in self.index.nodes.values():
            if node.op_type in SIZES and node.domain in ("", "ai.onnx"):
                continue
            taken: dict[tuple[ir.Value, str | None], list[int]] = {}
            for position, value in enumerate(node.inputs):
                if value is None or not self._is_computed(value) or (position == 0 and self._moves(node)):
                    continue
                taken.setdefault((value, self._takes(node, position)), []).append(position)
            for (value, taker), positions in taken.items():
                root, needs = self._path(value)
                needs += [taker] if taker is not None else []
                if needs:
                    yield _Edge(value, tuple(dict.fromkeys(needs)), root, node, tuple(positions))

    def _output_edges(self) -> Iterator[_Edge]:
        for graph in all_graphs(self.model.graph):
            for position, value in enumerate(graph.outputs):
                if not self._is_computed(value) or (value.is_graph_input() and graph is self.model.graph):
                    continue  # an input that is an output too is given back as it was fed
                owner = self.index.owner.get(graph)
                taker = f"output:{value.name}" if owner is None else border_key(self.key_of[owner], position)
                root, needs = self._path(value)
                needs += [taker] if taker in self.free else []
                if needs:
                    yield _Edge(value, tuple(dict.fromkeys(needs)), root, positions=(position,), graph=graph)

    def _changed_constants(self, node: ir.Node) -> tuple[dict[int, ir.TensorProtocol], float] | None:
        """Constants of a node that half changes, widened again, and the relative squared error of the worst one."""
        changed: dict[int, ir.TensorProtocol] = {}
        worst = 0.0
        for position, value in enumerate(node.inputs):
            if value is None or self._takes(node, position) is None or (position == 0 and self._moves(node)):
                continue
            tensor = constant_tensor(value) if self.index.is_constant(value) else None
            if tensor is None or tensor.dtype != FLOAT:
                continue
            before = np.array(tensor.numpy(), dtype=np.float32)  # a copy: half_tensor lets go of a mapped file
            after = np.asarray(half_tensor(tensor, self.half, value.name).numpy()).astype(np.float32)
            if not np.array_equal(before, after, equal_nan=True):
                changed[position] = ir.tensor(after, name=f"{value.name}.rounded")
                worst = max(worst, _relative_energy(before, after))
        return (changed, worst) if changed else None

    # putting the switches in

    def _label(self, node: ir.Node) -> str:
        """What a switch at a node is called by: a piece of an op by the op and itself."""
        key, own = self.key_of[node], self.index.id_of[node]
        return key if key == own else f"{key} ({own})"

    def _flag(self, switch: Switch) -> ir.Value:
        flag = ir.val(f"mpdeploy.flag_{len(self.flags)}", dtype=ir.DataType.BOOL, shape=[1])
        self.flags.append(flag)
        self.switches.append(switch)
        return flag

    def _switch_edge(self, edge: _Edge) -> None:
        value = edge.value
        label = self._label(edge.node) if edge.node is not None else f"output {value.name}"
        flag = self._flag(Switch(f"{value.name} -> {label}", edge.needs, edge.root.name or ""))
        self.count += 1
        stem = f"mpdeploy.switch_{self.count}"
        narrow = ir.node("Cast", [value], {"to": int(self.half.onnx)}, name=f"{stem}_narrow")
        wide = ir.node("Cast", narrow.outputs, {"to": int(FLOAT)}, name=f"{stem}_wide")
        same = ir.node("Identity", [value], name=f"{stem}_same")
        _declare(narrow.outputs[0], f"{stem}.narrow", self.half.onnx)
        _declare(wide.outputs[0], f"{stem}.then", FLOAT)
        _declare(same.outputs[0], f"{stem}.else", FLOAT)
        chosen = self._if(flag, [narrow, wide], [same], stem)
        made = chosen.outputs[0]
        _declare(made, f"{stem}.value", FLOAT, value.shape)
        if edge.graph is not None and value.graph is not edge.graph:  # a body gives back a tensor from outside of it
            edge.graph.append(chosen)
        else:
            self._place_after(value, chosen)
        if edge.node is not None:
            for position in edge.positions:
                edge.node.replace_input_with(position, made)
            return
        assert edge.graph is not None
        for position in edge.positions:
            edge.graph.outputs[position] = made
        if not value.is_graph_output():
            value.name, made.name = f"{value.name}.unswitched", value.name

    def _switch_constants(self, node: ir.Node, changed: dict[int, ir.TensorProtocol], injected: float) -> None:
        flag = self._flag(Switch(f"constants of {self._label(node)}", (self.key_of[node],), None, injected))
        self.count += 1
        stem = f"mpdeploy.switch_{self.count}"
        graph = node.graph
        assert graph is not None
        rounded = list(node.inputs)
        for position, tensor in changed.items():
            twin = ir.Value(
                name=f"{stem}.constant_{position}",
                shape=tensor.shape,  # type: ignore[arg-type]
                type=ir.TensorType(FLOAT),
                const_value=tensor,
            )
            tensor.name = twin.name
            self.model.graph.register_initializer(twin)
            rounded[position] = twin
        then, other = _clone(node, rounded, f"{stem}.then"), _clone(node, list(node.inputs), f"{stem}.else")
        made = [position for position, output in enumerate(node.outputs) if output.name]  # others are left out
        chosen = self._if(flag, [then], [other], stem, made)
        graph.insert_before(node, chosen)
        for old, new in zip([node.outputs[position] for position in made], chosen.outputs, strict=True):
            new.type, new.shape = old.type, old.shape
            for user, position in tuple(old.uses()):
                user.replace_input_with(position, new)
            for position, output in enumerate(graph.outputs):
                if output is old:
                    graph.outputs[position] = new
            old.name, new.name = f"{stem}.{old.name}", old.name
        graph.remove(node, safe=True)

    def _if(
        self, flag: ir.Value, then: list[ir.Node], other: list[ir.Node], stem: str, made: Sequence[int] = (0,)
    ) -> ir.Node:
        branches = {
            f"{label}_branch": ir.Graph(
                [], [nodes[-1].outputs[position] for position in made], nodes=nodes, name=f"{stem}_{label}"
            )
            for label, nodes in (("then", then), ("else", other))
        }
        return ir.node("If", [flag], branches, num_outputs=len(made), name=stem)

    def _place_after(self, value: ir.Value, node: ir.Node) -> None:
        producer = value.producer()
        graph = value.graph if producer is None else producer.graph
        assert graph is not None
        if producer is not None:
            graph.insert_after(producer, node)
        elif (first := next(iter(graph), None)) is not None:
            graph.insert_before(first, node)

    def _feed_flags(self) -> None:
        if not self.flags:
            return
        graph = self.model.graph
        fed = ir.val(FLAGS, dtype=ir.DataType.BOOL, shape=[len(self.flags)])
        graph.inputs.append(fed)
        first = next(iter(graph))
        opset = graph.opset_imports.get("", 18)
        if opset >= 13:
            # a node and no initialiser: those may be written beside the model, where shape inference does not look
            sizes = ir.node("Constant", [], {"value_ints": [1] * len(self.flags)}, name=f"{FLAGS}.sizes")
            _declare(sizes.outputs[0], f"{FLAGS}.sizes", ir.DataType.INT64)
            graph.insert_before(first, sizes)
            split = ir.node(
                "Split", [fed, sizes.outputs[0]], {"axis": 0}, outputs=self.flags, name="mpdeploy.split_flags"
            )
        else:
            split = ir.node(
                "Split", [fed], {"axis": 0, "split": [1] * len(self.flags)}, outputs=self.flags, name="mpdeploy.split"
            )
        graph.insert_before(first, split)


def _relative_energy(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    energy = float(np.sum(np.square(before, dtype=np.float64), where=np.isfinite(before)))
    error = float(np.sum(np.square(after.astype(np.float64) - before), where=np.isfinite(before)))
    return error / energy if energy > 0 else 0.0


def _declare(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None = None) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), shape


def _clone(node: ir.Node, inputs: list[ir.Value | None], stem: str) -> ir.Node:
    twin = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        attributes=[*node.attributes.values()],
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
        name=stem,
    )
    for position, (old, new) in enumerate(zip(node.outputs, twin.outputs, strict=True)):
        new.name, new.type, new.shape = f"{stem}_{position}" if old.name else "", old.type, old.shape
    return twin
