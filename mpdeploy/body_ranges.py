"""Ranges inside the bodies of If, Loop and Scan, whose tensors cannot be made outputs of the model.

Each body runs as a model of its own, fed as the node that owns it would feed it: the branch that its condition takes, every turn of a
loop, every slice of a scan, every element of a sequence. Bodies within bodies are walked in the same way. What a body takes from
outside comes from a run of the graph around it. As outside, tensors are asked for in chunks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mpdeploy.artifact import Feeds
from mpdeploy.engines import onnxruntime as ort_engine
from mpdeploy.errors import MpdeployError
from mpdeploy.precision.emulate import run_at_opset_21
from mpdeploy.precision.flow import float_values, shape_size
from mpdeploy.precision.graph_index import GraphIndex, all_graphs, bodies, constant_tensor
from mpdeploy.precision.model_io import SCRATCH_EXTERNAL_FROM_BYTES, write_model
from mpdeploy.precision.ranges import CHUNK_BYTES, Infer, OpenModel, Ranges, TensorStats, chunks

Scope = Mapping[ir.Value, Any]
"""Values of the graphs around a body, as arrays, or lists of them where they are sequences."""


def measure_body_ranges(
    index: GraphIndex, ranges: Ranges, open_model: OpenModel, feeds: Callable[[], Iterator[Feeds]], folder: Path
) -> list[str]:
    """Add statistics of every float tensor in the bodies of a model; what is in a branch that no feed took has none.

    Args:
        index: the model.
        ranges: where to.
        open_model: runs the main graph with chosen tensors as outputs.
        feeds: makes an iterator over the feeds, anew for each lot of nodes that have bodies.
        folder: for scratch files.

    Returns:
        For each node whose bodies could not be run, a warning that names it and says why.
    """
    warnings = []
    for owners in _lots([node for node in index.model.graph if bodies(node)], index):
        taken = {owner: _taken_by(index, owner) for owner in owners}
        needed = dict.fromkeys(value for values in taken.values() for value in values)
        by_name = {value.name: value for value in needed if value.name and not value.is_graph_input()}
        given = [value for value in needed if value.is_graph_input()]
        with contextlib.ExitStack() as stack:
            walk = _Walk(index, ranges, folder, stack)
            infer = stack.enter_context(open_model(list(by_name))) if by_name else lambda feed: {}
            for number, feed in enumerate(feeds()):
                walk.feed = number
                scope = {by_name[name]: array for name, array in infer(feed).items()}
                scope |= {value: _given(value, feed) for value in given}
                for owner in list(taken):
                    try:
                        walk.into(owner, scope)
                    except MpdeployError as error:
                        named = f"{owner.op_type} '{index.id_of[owner]}'"
                        warnings.append(f"ranges inside {named} were not taken: {error.message}")
                        del taken[owner]
    return warnings


def _lots(owners: Sequence[ir.Node], index: GraphIndex) -> Iterator[list[ir.Node]]:
    """Owners of bodies, so many at a time as can be held with what they take."""
    lot: list[ir.Node] = []
    held = 0.0
    for owner in owners:
        size = 4 * sum(shape_size(value) for value in _taken_by(index, owner))
        if lot and held + size > CHUNK_BYTES:
            yield lot
            lot, held = [], 0.0
        lot.append(owner)
        held += size
    if lot:
        yield lot


def _given(value: ir.Value, feed: Feeds) -> Any:
    """What a feed holds for a graph input, or the input's default."""
    if value.name in feed or value.const_value is None:
        return feed[value.name or ""]
    return value.const_value.numpy()


def _taken_by(index: GraphIndex, owner: ir.Node) -> list[ir.Value]:
    """What a node with bodies takes from the graph it stands in, or from one around that: its inputs and what its bodies capture."""
    taken = [value for value in owner.inputs if value is not None]
    for _, body in bodies(owner):
        taken += _captured(body)
    return [value for value in dict.fromkeys(taken) if not index.is_constant(value)]


def _captured(body: ir.Graph) -> list[ir.Value]:
    inside = set(all_graphs(body))
    used = [value for graph in inside for node in graph for value in node.inputs if value is not None]
    used += [value for graph in inside for value in graph.outputs]
    return [value for value in dict.fromkeys(used) if value.graph not in inside]


@dataclass
class _Body:
    """A body that can be run.

    Attributes:
        graph: it.
        captured: what it takes from outside beside its inputs, constants left out.
        made: what its owner, and the owners within it, have to be told: its outputs, and what these take.
        watched: float tensors in it, and float inputs, by name.
        owners: nodes in it that have bodies.
        sessions: each answers with one chunk of tensors; the first with what was made too.
    """

    graph: ir.Graph
    captured: list[ir.Value]
    made: dict[str, ir.Value]
    watched: dict[str, ir.Value]
    owners: list[ir.Node]
    sessions: list[Infer] = field(default_factory=list)


class _Walk:
    """Runs the bodies of one node of the main graph, and of the nodes in them."""

    def __init__(self, index: GraphIndex, ranges: Ranges, folder: Path, stack: contextlib.ExitStack) -> None:
        self.index = index
        self.ranges = ranges
        self.folder = folder
        self.stack = stack
        self.feed = 0
        self._bodies: dict[ir.Graph, _Body] = {}

    def into(self, owner: ir.Node, scope: Scope) -> None:
        """Run the bodies of a node as it would, given the values around it."""
        inputs = [None if value is None else self._value(value, scope) for value in owner.inputs]
        graphs = dict(bodies(owner))
        if owner.op_type == "If":
            self._run(graphs["then_branch" if np.asarray(inputs[0]).item() else "else_branch"], [], scope)
        elif owner.op_type == "Loop":
            self._loop(graphs["body"], inputs, scope)
        elif owner.op_type == "Scan":
            self._scan(owner, graphs["body"], inputs, scope)
        elif owner.op_type == "SequenceMap":
            for number in range(len(inputs[0] or ())):
                elements = [array[number] if isinstance(array, list) else array for array in inputs]
                self._run(graphs["body"], elements, scope)
        else:
            raise MpdeployError(f"what {owner.domain}:{owner.op_type} does with its bodies is not known")

    def _loop(self, body: ir.Graph, inputs: Sequence[Any], scope: Scope) -> None:
        trips, goes_on, *state = inputs
        limit = np.iinfo(np.int64).max if trips is None else np.asarray(trips).item()
        going = True if goes_on is None else bool(np.asarray(goes_on).item())
        turn = 0
        while going and turn < limit:
            answers = self._run(body, [np.array(turn, np.int64), np.array(going), *state], scope)
            going, state = bool(np.asarray(answers[0]).item()), answers[1 : 1 + len(state)]
            turn += 1

    def _scan(self, node: ir.Node, body: ir.Graph, inputs: Sequence[Any], scope: Scope) -> None:
        if (node.version or self.index.model.graph.opset_imports.get("", 0)) < 9:
            raise MpdeployError("the Scan of opset 8, with its batch axis, is not walked")
        count = node.attributes.get_int("num_scan_inputs", 1)
        state, sequences = list(inputs[: len(inputs) - count]), inputs[len(inputs) - count :]
        axes = node.attributes.get_ints("scan_input_axes", [0] * count)
        backwards = node.attributes.get_ints("scan_input_directions", [0] * count)
        for turn in range(sequences[0].shape[axes[0]]):
            slices = [
                np.take(array, -1 - turn if back else turn, axis=axis)
                for array, axis, back in zip(sequences, axes, backwards, strict=True)
            ]
            state = self._run(body, [*state, *slices], scope)[: len(state)]

    def _run(self, graph: ir.Graph, inputs: Sequence[Any], scope: Scope) -> list[Any]:
        """Run a body once, take statistics, walk into what it holds, and return its outputs."""
        body = self._bodies.get(graph) or self._open(graph)
        around = dict(scope) | dict(zip(graph.inputs, inputs, strict=True))
        feed = {value.name or "": around[value] for value in (*graph.inputs, *body.captured)}
        self._watch(body, feed)
        answers: dict[str, Any] = {}
        for infer in body.sessions:
            found = infer(feed)
            self._watch(body, found)
            answers |= {name: array for name, array in found.items() if name in body.made}
        around |= {value: answers[name] for name, value in body.made.items() if name in answers}
        for owner in body.owners:
            self.into(owner, around)
        return [self._value(value, around) for value in graph.outputs]

    def _watch(self, body: _Body, arrays: Mapping[str, Any]) -> None:
        for name, array in arrays.items():
            if name in body.watched and isinstance(array, np.ndarray) and array.dtype == np.float32:
                self.ranges.tensors.setdefault(name, TensorStats()).add(array, self.feed)

    def _value(self, value: ir.Value, scope: Scope) -> Any:
        if value in scope:
            return scope[value]
        tensor = constant_tensor(value)
        if tensor is None:
            raise MpdeployError(f"'{value.name}', which it takes from outside, is not at hand")
        return tensor.numpy()

    def _open(self, graph: ir.Graph) -> _Body:
        owners = [node for node in graph if bodies(node)]
        told = [*graph.outputs, *(value for owner in owners for value in _taken_by(self.index, owner))]
        made = {value.name or "": value for value in told if value.producer() is not None and value.graph is graph}
        watched = {value.name or "": value for value in float_values(self.index, graph)}
        captured = [value for value in _captured(graph) if not self.index.is_constant(value)]
        body = _Body(graph, captured, made, watched, owners)
        sizes = {name: int(shape_size(value)) for name, value in watched.items() if value.shape is not None}
        inputs = [value.name or "" for value in graph.inputs]
        inside = [name for name in watched if name not in inputs and name not in made]
        for number, chunk in enumerate(list(chunks(inside, sizes)) or [[]]):
            names = [*made, *chunk] if number == 0 else list(chunk)
            if names:
                model = _standalone(self.index, graph, names)
                path = write_model(
                    model, self.folder, f"body{len(self._bodies)}.{number}.onnx",
                    external_from_bytes=SCRATCH_EXTERNAL_FROM_BYTES,
                )  # fmt: skip
                body.sessions.append(self.stack.enter_context(ort_engine.run_tensors(path, names)))
        self._bodies[graph] = body
        return body


def _standalone(index: GraphIndex, body: ir.Graph, names: Sequence[str]) -> ir.Model:
    """A body as a model that answers with the named tensors; what it takes from outside are inputs, or initialisers if constant."""
    graph = body.clone(allow_outer_scope_values=True)
    inside = set(all_graphs(graph))
    twins: dict[ir.Value, ir.Value] = {}

    def twin(value: ir.Value) -> ir.Value:
        if value not in twins:
            tensor = constant_tensor(value) if index.is_constant(value) else None
            dtype = index.dtypes.get(value)
            kind = value.type if dtype is None or value in index.containers else ir.TensorType(dtype)
            made = twins[value] = ir.Value(name=value.name, type=kind)
            if tensor is None:
                graph.inputs.append(made)
            else:
                made.const_value, made.type, made.shape = tensor, ir.TensorType(tensor.dtype), tensor.shape  # type: ignore[assignment]
                graph.register_initializer(made)
        return twins[value]

    for each in inside:
        for node in each:
            for position, value in enumerate(node.inputs):
                if value is not None and value.graph not in inside:
                    node.replace_input_with(position, twin(value))
        if each is not graph:
            for position, value in enumerate(each.outputs):
                if value.graph not in inside:
                    each.outputs[position] = twin(value)
    for original, copy in zip(_values(body), _values(graph), strict=True):
        if original in index.dtypes:
            copy.type = ir.TensorType(index.dtypes[original])
    of_name = {value.name: value for value in _values(graph)}
    graph.outputs.clear()
    graph.outputs.extend(of_name[name] for name in names)
    graph.opset_imports.update(index.model.graph.opset_imports)
    model = ir.Model(graph, ir_version=index.model.ir_version)
    run_at_opset_21(model)
    return model


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [value for node in graph for value in node.outputs]
