"""`mpdeploy inspect`: precision per op, casts, and the kept nodes with their reasons, of ONNX files and built engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpdeploy.building import find_engine, is_engine
from mpdeploy.engines import backend
from mpdeploy.precision.graph_index import GraphIndex, constant_tensor


def inspect(path: Path) -> dict[str, Any]:
    """What a file runs in which precision, as `inspect --json` prints it.

    `{"kind", "ops": {OP: {precision: count}}, "casts", "kept": [{"node", "op", "reason"}], ...}`. Of an engine, `source` says where
    the precisions come from; only `inspector` and `runtime_model` are what really runs.

    Raises:
        ModelError: neither ONNX nor an engine.
    """
    return _inspect_engine(path) if is_engine(path) else _inspect_onnx(path)


def _inspect_onnx(path: Path) -> dict[str, Any]:
    from mpdeploy.precision.model_io import input_specs, load_model, output_specs, weight_bytes
    from mpdeploy.precision.rewrite import KEPT, PRECISION, count_precisions

    model = load_model(path)
    index = GraphIndex.of(model)
    counts = count_precisions(index)
    kept = [
        {"node": node_id, "op": node.op_type, "reason": node.metadata_props[KEPT]}
        for node_id, node in index.nodes.items()
        if KEPT in node.metadata_props
    ]
    return {
        "kind": "onnx",
        "file": str(path),
        "opset": model.graph.opset_imports.get("", None),
        "precision": model.metadata_props.get(PRECISION, "fp32" if not counts.half_nodes else "mixed"),
        "inputs": [str(spec) for spec in input_specs(model)],
        "outputs": [str(spec) for spec in output_specs(model)],
        "weight_bytes": weight_bytes(model),
        "nodes": counts.nodes,
        "half_nodes": counts.half_nodes,
        "ops": counts.ops,
        "casts": counts.casts,
        "kept": kept,
        "largest": _largest(index),
    }


def _largest(index: GraphIndex, count: int = 5) -> list[dict[str, Any]]:
    """The nodes with most bytes of constants, and the precision of those."""
    found: list[dict[str, Any]] = []
    for node_id, node in index.nodes.items():
        tensors = [constant_tensor(v) for v in node.inputs if v is not None and index.is_constant(v)]
        sizes = [(tensor.nbytes, tensor.dtype.name.lower()) for tensor in tensors if tensor is not None]
        if sizes:
            found.append(
                {
                    "node": node_id,
                    "op": node.op_type,
                    "bytes": sum(size for size, _ in sizes),
                    "precision": max(sizes)[1],
                }
            )
    return sorted(found, key=lambda item: -item["bytes"])[:count]


def _inspect_engine(path: Path) -> dict[str, Any]:
    engine = find_engine(path)
    audit = backend(engine.backend).audit(engine)
    ops: dict[str, dict[str, int]] = {}
    for layer in audit.layers:
        by_precision = ops.setdefault(layer.op, {})
        by_precision[layer.precision] = by_precision.get(layer.precision, 0) + 1
    return {
        "kind": engine.backend,
        "file": str(engine.path),
        "precision": engine.precision,
        "library": f"{engine.sidecar.get('library')} {engine.sidecar.get('library_version')}",
        "source": audit.source,
        "realised": audit.realised,
        "inputs": [str(spec) for spec in engine.inputs],
        "outputs": [str(spec) for spec in engine.outputs],
        "bytes": engine.path.stat().st_size,
        "layers": audit.count_by_precision(),
        "ops": {op: ops[op] for op in sorted(ops)},
        "casts": sum(
            sum(counts.values()) for op, counts in ops.items() if op.lower() in ("cast", "convert", "reorder")
        ),
        "kept": [],
    }
