"""The rewriter: prepare an FP32 model, then carry out a plan on it. Read `PASSES` as the list of what happens.

    prepared = prepare(model, half)              # functions inlined, nodes sorted, masks clamped, opset raised where needed
    plan = make_plan(prepared.index, half, ...)  # see plan.py
    mixed = rewrite(prepared, plan)              # a new model; `prepared` stays as it is

Statistics are taken of the prepared model, so that clamped masks do not look like overflow. Drift is measured against the original.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from mpdeploy.errors import ModelError
from mpdeploy.precision.formats import HalfFormat
from mpdeploy.precision.graph_index import GraphIndex, Kind, all_graphs
from mpdeploy.precision.passes.assignment import Assignment
from mpdeploy.precision.passes.clamp_masks import ClampMasksPass
from mpdeploy.precision.passes.convert_constants import ConvertConstantsPass
from mpdeploy.precision.passes.declare_types import declare_types
from mpdeploy.precision.passes.insert_casts import InsertCastsPass
from mpdeploy.precision.passes.name_values import NameValuesPass
from mpdeploy.precision.passes.raise_opset import RaiseOpsetPass, needs_raise
from mpdeploy.precision.passes.refresh_shapes import RefreshShapesPass
from mpdeploy.precision.passes.remove_casts import RemoveNoOpCastsPass
from mpdeploy.precision.passes.retype_attributes import RetypeAttributesPass
from mpdeploy.precision.passes.sort_nodes import sort_nodes
from mpdeploy.precision.plan import PrecisionPlan

KEPT = "mpdeploy.kept"
"""Metadata of a node that stays FP32: its reasons."""
PRECISION = "mpdeploy.precision"
"""Metadata of a mixed model: its half format."""


@dataclass
class Prepared:
    """An FP32 model, ready to be planned and rewritten.

    Attributes:
        model: what will be converted; computes what the original does.
        index: of it.
        notes: what was changed on the way, for the reader.
        changed: whether anything was.
        has_shapes: whether the shapes of inner tensors were inferred.
    """

    model: ir.Model
    index: GraphIndex
    notes: list[str] = field(default_factory=list)
    changed: bool = False
    has_shapes: bool = True

    def infer_shapes(self) -> None:
        """Infer the shapes of inner tensors, once."""
        if not self.has_shapes:
            RefreshShapesPass()(self.model)
            self.has_shapes = True


def prepare(model: ir.Model, half: HalfFormat, *, shapes: bool = True) -> Prepared:
    """Bring a model into the form that is planned on. The model given is changed.

    Args:
        model: what to prepare.
        half: the format.
        shapes: infer the shapes of inner tensors. Without, it is done only where the file declares some, which may be stale, or
            where types cannot be known otherwise: it takes a quarter of the time that converting a large graph takes.

    Raises:
        ModelError: a cycle, or functions that call themselves.
    """
    notes: list[str] = []
    changed = False
    if model.functions:
        count = len(model.functions)
        try:
            InlinePass()(model)
        except Exception as error:
            raise ModelError(f"The model's local functions cannot be inlined: {error}") from error
        notes.append(f"{count} local functions inlined, so that each call can have its own precision")
        changed = True
    sort_nodes(model)
    NameValuesPass()(model)
    clamp = ClampMasksPass(half)
    changed |= clamp(model).modified
    notes += clamp.clamped
    missing = needs_raise(GraphIndex.of(model), half) if half.name == "bf16" else []
    if missing:
        raiser = RaiseOpsetPass()
        before = model.graph.opset_imports.get("")
        if raiser(model).modified:
            notes.append(
                f"opset raised from {before} to {model.graph.opset_imports['']}: {', '.join(missing)} admit {half.name} there"
            )
            NameValuesPass()(model)
            changed = True
        else:
            notes.append(f"opset stays {before} ({raiser.failure}): {', '.join(missing)} stay FP32")
    if not shapes and not _declares_shapes(model):
        index = GraphIndex.of(model)
        if index.knows_all_types:
            return Prepared(model, index, notes, changed, has_shapes=False)
    RefreshShapesPass()(model)
    return Prepared(model, GraphIndex.of(model), notes, changed)


def _declares_shapes(model: ir.Model) -> bool:
    """Whether any inner tensor has a shape."""
    outputs = set(model.graph.outputs)
    made = (value for graph in all_graphs(model.graph) for node in graph for value in node.outputs)
    return any(value.shape is not None and value not in outputs for value in made)


def passes(assignment: Assignment) -> tuple[ir.passes.InPlacePass, ...]:
    """What carries out a plan, in order."""
    return (
        RetypeAttributesPass(assignment),
        ConvertConstantsPass(assignment),
        InsertCastsPass(assignment),
        RemoveNoOpCastsPass(),
    )


def rewrite(prepared: Prepared, plan: PrecisionPlan) -> ir.Model:
    """Carry out a plan on a copy of a prepared model."""
    return rewrite_indexed(prepared, plan).model


def rewrite_indexed(prepared: Prepared, plan: PrecisionPlan, *, consume: bool = False) -> GraphIndex:
    """Carry out a plan and index the result: on a copy, or, to `consume` it, on the prepared model itself.

    Weights are never copied: they are converted when they are written.
    """
    model = prepared.model if consume else prepared.model.clone()
    index = prepared.index if consume else GraphIndex.of(model)
    for node_id, reasons in plan.kept.items():  # the file itself says why; `mpdeploy inspect` reads it
        index.nodes[node_id].metadata_props[KEPT] = "; ".join(map(str, reasons))
    model.metadata_props[PRECISION] = plan.half.name
    for each in passes(Assignment(index, plan)):
        each(model)
    rewritten = GraphIndex.of(model)
    declare_types(rewritten)
    return rewritten


@dataclass(frozen=True, slots=True)
class PrecisionCount:
    """What a mixed model holds.

    Attributes:
        nodes: all of them, in every body, casts included.
        half_nodes: those that compute in half: casts between float types are not counted.
        casts: Cast nodes between float types.
        ops: op type -> precision -> count.
    """

    nodes: int
    half_nodes: int
    casts: int
    ops: dict[str, dict[str, int]]


_FLOATS = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
}


def count_precisions(index: GraphIndex) -> PrecisionCount:
    """Count nodes by the type of their first output (or input, for an op such as Shape or ArgMax whose output is no float)."""
    ops: dict[str, dict[str, int]] = {}
    half_nodes = casts = 0
    same_kind: dict[Kind, list[ir.Node]] = {}
    for node in index.nodes.values():
        same_kind.setdefault(index.kind(node), []).append(node)
    for node, count in ((nodes[0], len(nodes)) for nodes in same_kind.values()):
        types = [index.dtypes.get(value) for value in (*node.outputs, *node.inputs) if value is not None]
        is_cast = node.op_type == "Cast" and all(t in _FLOATS for t in types)
        casts += count * is_cast
        known = [t for t in types if t is not None]
        held = next((_FLOATS[t] for t in known if t in _FLOATS), known[0].name.lower() if known else "unknown")
        half_nodes += count * (held in ("float16", "bfloat16") and not is_cast)
        by_type = ops.setdefault(node.op_type, {})
        by_type[held] = by_type.get(held, 0) + count
    return PrecisionCount(len(index.nodes), half_nodes, casts, {op: ops[op] for op in sorted(ops)})
