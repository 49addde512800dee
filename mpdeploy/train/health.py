"""Numerical health: whether gradients survive the precision they are computed in, and how large activations grow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class GradientParity:
    """FP32 and AMP gradients on the same batch and weights.

    Attributes:
        excess_zeros: parameter -> share of its gradients that are exactly zero under AMP, less that share in FP32.
        cosines: parameter -> cosine between the two gradients.
    """

    excess_zeros: dict[str, float]
    cosines: dict[str, float]

    @property
    def worst_excess_zeros(self) -> float:
        """Of the worst parameter: underflow shows here and nowhere else (no NaN, no skipped step)."""
        return max(self.excess_zeros.values(), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: the worst of each, and all of them."""
        return {
            "worst_excess_zeros": self.worst_excess_zeros,
            "worst_cosine": min(self.cosines.values(), default=1.0),
            "excess_zeros": self.excess_zeros,
            "cosines": self.cosines,
        }


def compare_gradients(reference: dict[str, torch.Tensor], amp: dict[str, torch.Tensor]) -> GradientParity:
    """Compare unscaled gradients by parameter name. A gradient that is not finite has cosine 0 and counts as lost (all zero)."""
    excess, cosines = {}, {}
    for name, expected in reference.items():
        found = amp[name]
        if not bool(torch.isfinite(found).all()):
            excess[name], cosines[name] = 1.0, 0.0
            continue
        excess[name] = float((found == 0).double().mean() - (expected == 0).double().mean())
        norm = float(expected.double().norm() * found.double().norm())
        both_zero = float(expected.norm()) == 0.0 and float(found.norm()) == 0.0
        cosines[name] = (
            1.0 if both_zero else (float((expected.double() * found.double()).sum()) / norm if norm else 0.0)
        )
    return GradientParity(excess, cosines)


class ActivationRanges:
    """The largest magnitude of each leaf module's output, kept on the device while recording."""

    def __init__(self) -> None:
        self._amax: dict[str, torch.Tensor] = {}

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record the outputs of every leaf module called within the block."""
        handles = [
            module.register_forward_hook(self._hook(name))
            for name, module in model.named_modules()
            if name and not any(True for _ in module.children())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
                largest = output.detach().abs().amax().float()
                self._amax[name] = torch.maximum(self._amax[name], largest) if name in self._amax else largest

        return record

    def to_json(self) -> dict[str, float]:
        """Module name -> largest magnitude seen. Infinite or NaN values are kept as they are: they are what was seen."""
        return {name: float(value) for name, value in self._amax.items()}
