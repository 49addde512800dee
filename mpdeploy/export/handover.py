"""What training learnt, handed to conversion: ranges by module become ranges by tensor, through the exporter's name scopes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from mpdeploy.precision.keep_list import scopes_of


@dataclass(frozen=True)
class Handover:
    """Ranges by tensor, and the modules that could not be found in the graph."""

    tensors: Mapping[str, float]
    unmapped: tuple[str, ...]


def tensors_from_modules(onnx_path: Path, amax_of_module: Mapping[str, float]) -> Handover:
    """Map module name -> largest output magnitude onto the tensor that the module's last node makes.

    A BatchNorm that was folded into its Conv gives its name to the fused node, and the Conv's own range is then of a tensor that
    no longer exists: it is listed as unmapped, as is any module without a node. Ranges that are not finite are not handed over.
    """
    last: dict[str, str] = {}
    for node in ir.load(onnx_path).graph:
        modules = scopes_of(node)[:-1]  # the last scope is the op itself
        if modules and node.outputs[0].name:
            last[modules[-1]] = node.outputs[0].name
    tensors = {
        last[module]: value for module, value in amax_of_module.items() if module in last and math.isfinite(value)
    }
    return Handover(tensors, tuple(module for module in amax_of_module if module not in last))
