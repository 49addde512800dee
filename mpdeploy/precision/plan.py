"""The plan: which node runs in which precision, and for every node that stays FP32, why.

Reasons, in the order they are looked for: what the op's schema or its row in `op_rules` says, what the user keeps, what rounding
does to its constants, what the ranges of its tensors say, and last that half precision there would cost more in casts than it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from mpdeploy.precision.borders import half_units, sizes_decide
from mpdeploy.precision.constants import ConstantFault, examine
from mpdeploy.precision.flow import Flow, build_flow, half_ports, has_float, shape_size
from mpdeploy.precision.formats import HalfFormat
from mpdeploy.precision.graph_index import CONTROL_FLOW, GraphIndex, Kind, constant_tensor
from mpdeploy.precision.keep_list import KeepEntry
from mpdeploy.precision.op_rules import RULE_OF_OP, keeps
from mpdeploy.precision.positions import position_arithmetic
from mpdeploy.precision.range_rules import RANGE_RULES, Tensors
from mpdeploy.precision.ranges import Ranges


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a node stays FP32.

    Attributes:
        kind: `schema`, `op`, `user`, `constant`, `range`, `inner`, `state`, `border`, ...
        text: the values that decided.
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(frozen=True)
class PrecisionPlan:
    """Node -> precision, with reasons.

    Attributes:
        half: the format.
        half_keys: keys of the units (nodes by id, graph inputs and outputs, If outputs) that become half.
        kept: id of a node with float tensors that stays FP32 -> its reasons, at least one.
        ops: node id -> op type, for both kinds.
        notes: what was done to constants, and other things a reader should know.
        ranges_from: `none`, or what the ranges rest on.
        float_io: names of graph inputs and outputs that stay FP32.
        bf16: id of a node of an FP16 plan that runs in BF16 -> why (see `search.islands`).
    """

    half: HalfFormat
    half_keys: frozenset[str]
    kept: Mapping[str, tuple[Reason, ...]]
    ops: Mapping[str, str]
    notes: tuple[str, ...] = ()
    ranges_from: str = "none"
    float_io: frozenset[str] = field(default_factory=frozenset)
    bf16: Mapping[str, tuple[Reason, ...]] = field(default_factory=dict)

    @property
    def half_nodes(self) -> list[str]:
        """Ids of the nodes that become half."""
        return [node_id for node_id in self.ops if node_id in self.half_keys]

    def to_json(self) -> dict[str, Any]:
        """What `plan.json` holds; it can be given back with `--keep @plan.json`."""
        return {
            "precision": self.half.name,
            "ranges_from": self.ranges_from,
            "num_half": len(self.half_nodes),
            "num_kept": len(self.kept),
            "keep": [
                {"node": node_id, "op": self.ops[node_id], "reason": "; ".join(map(str, reasons))}
                for node_id, reasons in self.kept.items()
            ]
            + [  # given back without a search, they are FP32
                {"node": n, "op": self.ops[n], "reason": "; ".join(map(str, why)), "precision": "bf16"}
                for n, why in self.bf16.items()
            ],
            "half": self.half_nodes,
            "float_io": sorted(self.float_io),
            "notes": list(self.notes),
        }


_WITHOUT_PRECISION = frozenset({"Constant", *CONTROL_FLOW})


def make_plan(
    index: GraphIndex,
    half: HalfFormat,
    *,
    keep: Mapping[str, KeepEntry] | None = None,
    ranges: Ranges | None = None,
    float_io: Collection[str] = (),
    notes: Sequence[str] = (),
    disabled_rules: Collection[str] = (),
    infer_shapes: Callable[[], None] | None = None,
) -> PrecisionPlan:
    """Decide the precision of every node.

    Args:
        index: the FP32 model, prepared (functions inlined, masks clamped).
        half: FP16 or BF16.
        keep: node id -> the user's entry.
        ranges: statistics from calibration, or None: then rules and constants alone decide.
        float_io: names of graph inputs and outputs that stay FP32.
        notes: what preparing the model did.
        disabled_rules: names of range rules to leave out (to show what each is for).
        infer_shapes: called before sizes weigh anything, where shapes were not inferred yet (see `rewrite.prepare`).
    """
    reasons: dict[str, list[Reason]] = {}
    sound: set[Kind] = set()  # kinds of nodes that nothing about their op keeps
    for node_id, node in index.nodes.items():
        if node.op_type in _WITHOUT_PRECISION or not has_float(index, node):
            continue  # control flow has no precision of its own: the nodes in its bodies have
        found = reasons.setdefault(node_id, [])
        kind = index.kind(node)
        if kind not in sound:
            found += _reasons_of_op(index, node, half)
            if not found:
                sound.add(kind)
        if keep and node_id in keep:
            entry = keep[node_id]
            found.append(Reason("user", f"kept by '{entry.pattern}'" + (f" ({entry.note})" if entry.note else "")))
    for node_id in position_arithmetic(index):
        if node_id in reasons:
            reasons[node_id].append(
                Reason("op", "arithmetic on positions that ends in integers: rounding would give another index")
            )
    _keep_for_constants(index, half, reasons, ranges)
    float_names, float_borders = set(float_io), set[str]()
    if ranges is not None:
        tensors = Tensors(index, half, ranges)
        for rule in RANGE_RULES:
            if rule.name in disabled_rules:
                continue
            for verdict in rule.find(tensors):
                for node_id in verdict.nodes:
                    if node_id in reasons:
                        reasons[node_id].append(Reason(rule.kind, verdict.text))
                    else:
                        float_borders.add(node_id)
                float_names.update(verdict.io)

    def flow_of_now() -> Flow:
        return build_flow(
            index,
            half,
            is_fixed=lambda key: bool(reasons.get(key)) or key in float_borders,
            float_io=lambda name: name in float_names,
            size_of=_sizes(ranges),
        )

    flow = flow_of_now()
    if infer_shapes is not None and sizes_decide(flow):
        infer_shapes()
        flow = flow_of_now()
    half_keys = half_units(flow)
    for unit in flow.units:
        if unit.node is not None and unit.key in reasons and unit.key not in half_keys and not reasons[unit.key]:
            reasons[unit.key].append(Reason("border", "half precision here would cost more in casts than it saves"))
    ops = {node_id: index.nodes[node_id].op_type for node_id in reasons}
    return PrecisionPlan(
        half=half,
        half_keys=frozenset(half_keys),
        kept={node_id: tuple(dict.fromkeys(found)) for node_id, found in reasons.items() if found},
        ops=ops,
        notes=tuple(notes),
        ranges_from=_source(ranges),
        float_io=frozenset(float_names),
    )


def _source(ranges: Ranges | None) -> str:
    if ranges is None:
        return "none"
    if not ranges.num_feeds:
        return "training"
    return (
        f"{'synthetic data' if ranges.synthetic else 'calibration'}, {ranges.num_samples or ranges.num_feeds} samples"
    )


def _sizes(ranges: Ranges | None) -> Any:
    if ranges is None or not ranges.num_feeds:
        return shape_size

    def size_of(value: ir.Value) -> float:
        stats = ranges.tensors.get(value.name or "")
        return stats.count / ranges.num_feeds if stats is not None and stats.count else shape_size(value)

    return size_of


def _reasons_of_op(index: GraphIndex, node: ir.Node, half: HalfFormat) -> list[Reason]:
    form = index.signature(node)
    if form is None:
        return [Reason("schema", f"{node.domain}:{node.op_type} is no ONNX op: its types are not known")]
    if any(value in index.containers for value in (*node.inputs, *node.outputs) if value is not None):
        return [Reason("schema", "it handles a sequence or an optional, whose element type is fixed")]
    rule = RULE_OF_OP.get(node.op_type)
    if rule is not None and node.domain in ("", "ai.onnx"):
        given = any(
            position < len(node.inputs) and node.inputs[position] is not None for position in rule.keep_with_input
        )
        if keeps(node.op_type, half) or given:
            return [Reason("op", rule.reason)]
    unknown = [v.name for v in node.inputs if v is not None and v not in index.dtypes]
    if unknown:
        return [
            Reason(
                "schema", f"the type of '{unknown[0]}' is not known: it comes out of an op that ONNX does not define"
            )
        ]
    if not any(half_ports(index, node, half)):
        return [Reason("schema", f"{node.op_type}-{form.since_version} has no {half.onnx.name} form in ONNX")]
    return []


def _keep_for_constants(
    index: GraphIndex, half: HalfFormat, reasons: dict[str, list[Reason]], ranges: Ranges | None
) -> None:
    faults: dict[ir.Value, ConstantFault | None] = {}
    for node_id, found in reasons.items():
        node = index.nodes[node_id]
        fill = node.attributes.get("value") if node.op_type == "ConstantOfShape" else None
        fault = None if fill is None else examine(fill.as_tensor(), half)
        if fault is not None:
            found.append(Reason("constant", f"its fill value: {fault.text}"))
        inputs, _ = half_ports(index, node, half)
        for position in sorted(inputs):
            value = node.inputs[position]
            if value is None or not index.is_constant(value):
                continue
            if value not in faults:
                tensor = constant_tensor(value)
                faults[value] = None if tensor is None else examine(tensor, half)
            fault = faults[value]
            if fault is not None and not _harmless(node, position, fault, half, ranges):
                found.append(Reason("constant", f"{value.name}: {fault.text}"))


def _harmless(node: ir.Node, position: int, fault: ConstantFault, half: HalfFormat, ranges: Ranges | None) -> bool:
    """Whether a constant's rounding changes nothing that half could tell.

    A bound of Clip beyond the format's range binds nothing that half can hold. A small addend (the epsilon of a norm) that is
    rounded coarsely, but does not vanish, does not matter where every sum seen is so large that its own rounding is larger.
    """
    if node.op_type == "Clip" and position > 0 and fault.kind == "overflow":
        return True
    if node.op_type not in ("Add", "Sub") or fault.coarse_error is None or ranges is None:
        return False
    total = ranges.tensors.get(node.outputs[0].name or "")
    return total is not None and total.count > 0 and fault.coarse_error <= half.unit_roundoff / 4 * total.amin
