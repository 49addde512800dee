"""Exponent histograms: where the magnitudes of activations and gradients lie in a number format's range.

Taken from the bits of FP32 numbers: bin `e` counts values with 2^e <= |x| < 2^(e+1). FP16 keeps its full precision from e = -14 to 15,
loses digits from -15 to -24, and flushes to zero below; BF16 has FP32's range, -126 to 127.
"""

from __future__ import annotations

from typing import Any

import torch

SAMPLED = 65_536
"""Values of a tensor that are counted (evenly spaced), so that the cost of a histogram has a bound."""
_BIAS, _ZERO, _NOT_FINITE = 127, 0, 255


def exponent_counts(values: torch.Tensor, *, sampled: int | None = SAMPLED) -> torch.Tensor:
    """Counts by biased exponent, int64 [256] on the values' device: 0 for zero (FP32's subnormals with it), 255 for not finite."""
    flat = values.detach().flatten()
    if sampled is not None and flat.numel() > sampled:
        flat = flat[:: flat.numel() // sampled]
    bits = flat.float().view(torch.int32)
    return torch.bincount((bits >> 23) & 255, minlength=256)


def counts_to_json(counts: torch.Tensor) -> dict[str, Any]:
    """`zeros`, `not_finite`, and `exponents`: exponent -> count, where there are any."""
    found = counts.tolist()
    return {
        "zeros": found[_ZERO],
        "not_finite": found[_NOT_FINITE],
        "exponents": {str(place - _BIAS): count for place, count in enumerate(found) if count and 0 < place < 255},
    }


class ExponentHistograms:
    """Histograms by name, kept on the device while they are taken."""

    def __init__(self) -> None:
        self.counts: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        """Count a tensor's values (sampled)."""
        counts = exponent_counts(values)
        self.counts[name] = self.counts[name] + counts if name in self.counts else counts

    def to_json(self) -> dict[str, Any]:
        """Name -> histogram."""
        return {name: counts_to_json(counts) for name, counts in self.counts.items()}
