"""The small constants that keep a division from a division by zero, and whether the exporter's optimiser deleted them.

It takes `x + c` for `x` where c is within 1e-8 of zero, so that `x / (x + 1e-9)` becomes `x / x`: NaN at zero, and the same as before
on ordinary samples, which is why parity does not show it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

SMALL = 1e-7
"""Constants below this magnitude are looked at; the optimiser's own limit is 1e-8."""
_ADDITIVE = ("Add", "Sub")
_CASTS = ("Cast", "CastLike", "Identity")


def small_addends(model: ir.Model) -> dict[float, str]:
    """Every constant below `SMALL` that is added or subtracted, zero left out -> a node that does it."""
    found: dict[float, str] = {}
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        for node in graph:
            if node.op_type not in _ADDITIVE or node.domain not in ("", "ai.onnx"):
                continue
            for value in node.inputs:
                constant = _constant(value)
                if constant is not None and 0 < abs(constant) < SMALL:
                    found.setdefault(constant, node.name or node.op_type)
    return found


def _constant(value: ir.Value | None) -> float | None:
    """The number that a value always is, or None."""
    while value is not None:
        tensor: Any = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            array = tensor.numpy()
            return float(array.reshape(-1)[0]) if array.size == 1 and np.issubdtype(array.dtype, np.floating) else None
        node = value.producer()
        if node is None or node.op_type not in _CASTS:
            return None
        value = node.inputs[0]
    return None
