"""What rounding to half does to a constant: nothing, a little, or enough that its users must stay in FP32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from mpdeploy.precision.formats import HalfFormat
from mpdeploy.precision.ranges import TensorStats

SCALAR_VALUES = 16
"""Up to this many values, each one counts (an epsilon, a bound); above, the tensor's energy does (a weight matrix)."""
LOSS_LIMIT = 2.0**-9
"""Relative error a constant may suffer from the format's range, four times FP16's unit roundoff."""


@dataclass(frozen=True, slots=True)
class ConstantFault:
    """Why a constant cannot be rounded.

    Attributes:
        kind: `overflow` (a finite value becomes infinite), `underflow` (a value is lost or rounded coarsely).
        text: the values, for the reason.
        coarse_error: absolute error where a value is only rounded coarsely (it lies below the smallest normal one and does not
            vanish); None where more than that is wrong.
    """

    kind: str
    text: str
    coarse_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"kind": self.kind, "text": self.text}


def examine(tensor: ir.TensorProtocol, half: HalfFormat) -> ConstantFault | None:
    """Find out whether rounding `tensor` to `half` loses what matters; None where it does not."""
    fault = _examine(tensor, half)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()  # mapped pages count as memory until they are let go
    return fault


def _examine(tensor: ir.TensorProtocol, half: HalfFormat) -> ConstantFault | None:
    array = np.asarray(tensor.numpy(), dtype=np.float32)
    if array.size == 0:
        return None
    if array.size <= SCALAR_VALUES:
        return _examine_each(array.reshape(-1), half)
    largest = _finite_amax(array)
    if largest >= half.overflow_from:
        return _overflow(largest, half)
    if half.min_exponent <= -126 or _surely_held(array, half):
        return None
    stats = TensorStats()
    stats.add(array, 0)
    loss = stats.rounding_loss(half)
    if loss > LOSS_LIMIT:
        return ConstantFault("underflow", f"rounding loses {100 * loss:.2g} % of it (largest value {largest:.3g})")
    return None


def _surely_held(array: np.ndarray[Any, Any], half: HalfFormat) -> bool:
    """Whether even half a grid step of error in every value would be within the limit: so it is for the weights of most layers."""
    flat = array.reshape(-1)
    energy = float(np.dot(flat, flat))  # too small where squares underflow: then a closer look follows
    # infinite or NaN where a value is: it would outweigh everything that is lost beside it
    return math.isfinite(energy) and flat.size * (half.min_subnormal / 2) ** 2 <= LOSS_LIMIT**2 * energy


def _finite_amax(array: np.ndarray[Any, Any]) -> float:
    largest = max(abs(float(array.max())), abs(float(array.min())))  # NaN where any value is
    if math.isfinite(largest):
        return largest
    finite = np.abs(array[np.isfinite(array)])
    return float(finite.max(initial=0.0))


def _examine_each(values: np.ndarray[Any, Any], half: HalfFormat) -> ConstantFault | None:
    coarse: ConstantFault | None = None
    for before, after in zip(values.tolist(), half.rounded(values).tolist(), strict=True):
        if not math.isfinite(before) or before == 0:
            continue
        if not math.isfinite(after):
            return _overflow(abs(before), half)
        if after == 0:
            return ConstantFault(
                "underflow", f"{before:.4g} becomes 0 (smallest value held is {half.min_subnormal:.3g})"
            )
        error = abs(after - before)
        if abs(before) < half.min_normal and error > LOSS_LIMIT / 4 * abs(before):
            text = f"{before:.4g} becomes {after:.4g} (below the smallest normal value, {half.min_normal:.3g})"
            coarse = ConstantFault("underflow", text, max(error, (coarse.coarse_error or 0.0) if coarse else 0.0))
    return coarse


def _overflow(value: float, half: HalfFormat) -> ConstantFault:
    return ConstantFault("overflow", f"|{value:.4g}| is above the largest value held, {half.max:.6g}")
