"""The number formats: what FP16 and BF16 can hold, and where rounding starts to lose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

HalfName = Literal["fp16", "bf16"]


@dataclass(frozen=True, slots=True)
class HalfFormat:
    """A half-precision format.

    Attributes:
        name: `fp16` or `bf16`.
        onnx: its ONNX data type.
        max: largest finite value.
        min_exponent: exponent of the smallest normal value, 2**min_exponent.
        mantissa_bits: explicit bits of the significand.
    """

    name: HalfName
    onnx: ir.DataType
    max: float
    min_exponent: int
    mantissa_bits: int

    @property
    def min_normal(self) -> float:
        """Smallest value held with full precision."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def min_subnormal(self) -> float:
        """Smallest value above zero."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding a normal value: 2**-(mantissa_bits + 1)."""
        return math.ldexp(1.0, -self.mantissa_bits - 1)

    @property
    def overflow_from(self) -> float:
        """Magnitudes from here on round to infinity: half a unit above the largest finite value."""
        return self.max * (1 + self.unit_roundoff / (2 - 2 * self.unit_roundoff))

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """The numpy dtype (of ml_dtypes for BF16)."""
        return np.dtype(np.float16) if self.name == "fp16" else np.dtype(ml_dtypes.bfloat16)

    def rounded(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """The array rounded to this format (to nearest, ties to even, subnormals kept) and widened to float32 again."""
        with np.errstate(over="ignore", invalid="ignore"):
            return array.astype(self.numpy).astype(np.float32)


FORMATS: dict[str, HalfFormat] = {
    "fp16": HalfFormat("fp16", ir.DataType.FLOAT16, 65504.0, -14, 10),
    "bf16": HalfFormat("bf16", ir.DataType.BFLOAT16, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), -126, 7),
}
HALF_TYPES = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
FLOAT = ir.DataType.FLOAT
