"""Which nodes of an ONNX file became part of which layers of an engine, and what that says against the precision plan.

An engine fuses nodes and renames what is left. A kept node that no layer answers for could run in half unseen, so it is listed
(`kept_unaccounted`) and a gate may forbid it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mpdeploy.engines.base import Audit, Layer
from mpdeploy.files import digest_of_json
from mpdeploy.precision.graph_index import GraphIndex, constant_tensor
from mpdeploy.precision.model_io import load_model
from mpdeploy.precision.rewrite import KEPT, PRECISION

HALF = ("fp16", "bf16")
NO_ARITHMETIC = frozenset(
    {"Cast", "Concat", "Constant", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Shape", "Slice", "Split",
     "Squeeze", "Transpose", "Unsqueeze"}
)  # fmt: skip
"""Ops that move values and compute none: an engine may drop them, and nothing is rounded by that."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of an ONNX file, as an engine's builder needs them.

    Attributes:
        ids: of all nodes, bodies included.
        maker: value -> the node that makes it.
        before: node -> the nodes whose results it takes, Casts left out.
        kept: nodes that were kept in FP32 by a conversion, with op and reason.
        largest: the nodes with most bytes of constants.
        plan_sha256: digest of which nodes were kept among which; None where nothing was converted.
    """

    ids: frozenset[str] = frozenset()
    maker: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kept: tuple[Mapping[str, str], ...] = ()
    largest: tuple[Mapping[str, Any], ...] = ()
    plan_sha256: str | None = None

    @classmethod
    def of(cls, path: Path) -> Nodes:
        """Read an ONNX file's nodes.

        Raises:
            ModelError: it cannot be read.
        """
        model = load_model(path)
        index = GraphIndex.of(model)
        kept = tuple(kept_of(index))
        maker = {value.name: node_id for node_id, node in index.nodes.items() for value in node.outputs if value.name}
        before = {
            node_id: tuple(
                index.id_of[producer]
                for value in node.inputs
                if value is not None and (producer := value.producer()) in index.id_of and producer.op_type != "Cast"
            )
            for node_id, node in index.nodes.items()
        }
        digest = digest_of_json([sorted(entry["node"] for entry in kept), sorted(index.nodes)])
        return cls(
            frozenset(index.nodes),
            maker,
            {node_id: nodes for node_id, nodes in before.items() if nodes},
            kept,
            tuple(largest_of(index)),
            digest if PRECISION in model.metadata_props else None,
        )

    def to_sidecar(self) -> dict[str, Any]:
        """What a sidecar keeps of them."""
        return {"plan_sha256": self.plan_sha256, "kept": list(self.kept), "largest": list(self.largest)}


def spread(layers: Iterable[Layer], before: Mapping[str, Sequence[str]]) -> tuple[Layer, ...]:
    """The same layers, each also standing for the nodes that no layer is named after and whose results flow into its own.

    An engine that fuses MatMul and Add calls the kernel after one of them. `before` ends at a Cast: what lies beyond one may run
    in another precision, and is rather reported as unaccounted.
    """
    layers = tuple(layers)
    named = {node for layer in layers for node in layer.nodes}
    found = []
    for layer in layers:
        covered = dict.fromkeys(layer.nodes)
        left = list(layer.nodes)
        while left:
            new = [node for node in before.get(left.pop(), ()) if node not in named and node not in covered]
            covered |= dict.fromkeys(new)
            left += new
        found.append(replace(layer, nodes=tuple(covered)))
    return tuple(found)


def kept_of(index: GraphIndex) -> list[dict[str, str]]:
    """Nodes that a conversion kept in FP32: `{"node", "op", "reason"}`."""
    return [
        {"node": node_id, "op": node.op_type, "reason": node.metadata_props[KEPT]}
        for node_id, node in index.nodes.items()
        if KEPT in node.metadata_props
    ]


def largest_of(index: GraphIndex, count: int = 5) -> list[dict[str, Any]]:
    """The nodes with most bytes of constants: `{"node", "op", "bytes", "precision"}`."""
    found: list[dict[str, Any]] = []
    for node_id, node in index.nodes.items():
        tensors = [constant_tensor(v) for v in node.inputs if v is not None and index.is_constant(v)]
        sizes = [(tensor.nbytes, str(tensor.dtype.numpy())) for tensor in tensors if tensor is not None]
        if sizes and sum(size for size, _ in sizes):
            found.append(
                {
                    "node": node_id,
                    "op": node.op_type,
                    "bytes": sum(size for size, _ in sizes),
                    "precision": max(sizes)[1],
                }
            )
    return sorted(found, key=lambda item: -item["bytes"])[:count]


def audit_report(audit: Audit, plan: Mapping[str, Any], makers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The audit against the plan: kept nodes in half (a fault), kept nodes that no layer answers for, half nodes in FP32 (findings).

    An engine of the FP32 model has no plan: no node of it may be in half, and none should be.

    Args:
        audit: what the engine runs.
        plan: what `plan.json` holds (`keep`: `{"node", "op"}`; `half`: nodes), or empty.
        makers: graph output -> its node, for an engine that names a layer after the output it makes.
    """
    found = audit.of_nodes()
    found |= {node: found[output] for output, node in (makers or {}).items() if output in found}
    report: dict[str, Any] = {
        "source": audit.source,
        "realised": audit.realised,
        "layers": audit.count_by_precision(),
    }
    if not plan:
        in_half = [layer.name for layer in audit.layers if layer.precision in HALF]
        return report | {"kept_in_half": in_half, "kept_unaccounted": [], "half_in_fp32": []}
    kept = [entry["node"] for entry in plan["keep"]]
    computing = [entry["node"] for entry in plan["keep"] if entry.get("op") not in NO_ARITHMETIC]
    return report | {
        "nodes": found,
        "kept_in_half": [node for node in kept if found.get(node) in HALF],
        "kept_unaccounted": [node for node in computing if found.get(node, "unknown") in ("mixed", "unknown")],
        "half_in_fp32": [node for node in plan.get("half", ()) if found.get(node) in ("fp32", "tf32")],
    }


def report_on(audit: Audit, kept: Sequence[Mapping[str, str]], precision: str) -> dict[str, Any]:
    """The same from what an engine's sidecar keeps of its model, without the plan's list of half nodes."""
    return audit_report(audit, {"keep": kept} if precision in HALF else {})
