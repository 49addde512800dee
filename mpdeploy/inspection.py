"""`mpdeploy inspect`: precision per op, casts, and the kept nodes with their reasons, of ONNX files and built engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpdeploy.building import engine_bytes, find_engine, is_engine
from mpdeploy.engines import backend
from mpdeploy.engines.accounting import kept_of, largest_of, report_on
from mpdeploy.precision.graph_index import GraphIndex

CASTS = ("cast", "convert", "reorder", "reformat")


def inspect(path: Path) -> dict[str, Any]:
    """What a file runs in which precision, as `inspect --json` prints it.

    `{"kind", "ops": {OP: {precision: count}}, "casts", "kept": [{"node", "op", "reason"}], ...}`. Of an engine, `source` says where
    the precisions come from (only `inspector` and `runtime_model` are what really runs), each kept node has the `precision` of its
    layers, or null where no layer names it, and `kept_in_half` and `kept_unaccounted` list those that are not as planned.

    Raises:
        ModelError: neither ONNX nor an engine.
    """
    return _inspect_engine(path) if is_engine(path) else _inspect_onnx(path)


def _inspect_onnx(path: Path) -> dict[str, Any]:
    from mpdeploy.precision.model_io import input_specs, load_model, output_specs, weight_bytes
    from mpdeploy.precision.rewrite import PRECISION, count_precisions

    model = load_model(path)
    index = GraphIndex.of(model)
    counts = count_precisions(index)
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
        "kept": kept_of(index),
        "largest": largest_of(index),
    }


def _inspect_engine(path: Path) -> dict[str, Any]:
    engine = find_engine(path)
    audit = backend(engine.backend).audit(engine)
    ops: dict[str, dict[str, int]] = {}
    for layer in audit.layers:
        by_precision = ops.setdefault(layer.op, {})
        by_precision[layer.precision] = by_precision.get(layer.precision, 0) + 1
    precisions = audit.of_nodes()
    kept = [{**entry, "precision": precisions.get(entry["node"])} for entry in engine.sidecar["kept"]]
    report = report_on(audit, engine.sidecar["kept"], engine.precision)
    return {
        "kind": engine.backend,
        "file": str(engine.path),
        "precision": engine.precision,
        "library": f"{engine.sidecar.get('library')} {engine.sidecar.get('library_version')}",
        "source": audit.source,
        "realised": audit.realised,
        "inputs": [str(spec) for spec in engine.inputs],
        "outputs": [str(spec) for spec in engine.outputs],
        "bytes": engine_bytes(engine),
        "layers": audit.count_by_precision(),
        "ops": {op: ops[op] for op in sorted(ops)},
        "casts": sum(sum(counts.values()) for op, counts in ops.items() if op.lower() in CASTS),
        "kept": kept,
        "kept_in_half": report["kept_in_half"],
        "kept_unaccounted": report["kept_unaccounted"],
        "options": {name: value for name, value in engine.sidecar["options"].items() if value not in (None, [])},
        "largest": engine.sidecar["largest"],
    }
