"""Raise the opset where the ops of a model have no form in the half format at the opset it has."""

from __future__ import annotations

import logging

import onnx_ir as ir

from mpdeploy.precision.flow import has_float
from mpdeploy.precision.formats import HalfFormat
from mpdeploy.precision.graph_index import GraphIndex
from mpdeploy.precision.op_rules import keeps
from mpdeploy.precision.schema import signature

RAISED = 22
"""Conv, pooling, LSTM and InstanceNormalization admit BF16 from this opset on."""


def needs_raise(index: GraphIndex, half: HalfFormat) -> list[str]:
    """Op types that have no half form at the model's opset and have one at `RAISED`."""
    opset = index.model.graph.opset_imports.get("", 0)
    if half.name != "bf16" or opset >= RAISED:
        return []
    ops = {
        node.op_type
        for node in index.nodes.values()
        if node.domain in ("", "ai.onnx") and has_float(index, node) and not keeps(node.op_type, half)
    }
    return sorted(op for op in ops if not _has_half(op, opset, half) and _has_half(op, RAISED, half))


def _has_half(op: str, opset: int, half: HalfFormat) -> bool:
    form = signature("", op, opset)
    return form is not None and any(form.admits(name, half.onnx) for name in form.admitted)


class RaiseOpsetPass(ir.passes.InPlacePass):
    """Raise the default opset to `RAISED` with ONNX's version converter; big constants are set aside while it runs.

    Where the converter has no path for an op, the model is left as it was and `failure` says why.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raise."""
        if model.graph.opset_imports.get("", 0) >= RAISED:
            return ir.passes.PassResult(model, modified=False)
        from onnxscript import version_converter

        trial = model.clone()
        logger = logging.getLogger("onnxscript.version_converter")
        level = logger.level
        logger.setLevel(logging.ERROR)  # a path that is missing is told through `failure`
        try:
            version_converter.convert_version(trial, target_version=RAISED, fallback=True)
        except Exception as error:  # the converter raises whatever its adapters raise; the model is untouched
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            return ir.passes.PassResult(model, modified=False)
        finally:
            logger.setLevel(level)
        if trial.graph.opset_imports.get("") != RAISED:
            self.failure = "ONNX's version converter has no path"
            return ir.passes.PassResult(model, modified=False)
        model.graph = trial.graph
        return ir.passes.PassResult(model, modified=True)
