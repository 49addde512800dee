"""What a zoo model is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Recipe:
    """How to build one architecture and what to feed it."""

    name: str
    build: Callable[[], Any]
    """A torch module in eval mode whose forward takes the inputs in order and returns a tuple of the outputs."""
    feeds: Callable[[int, int], dict[str, np.ndarray]]
    outputs: Sequence[str]
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """input -> axis -> name of the dimension; axis 0 of every input is `batch` unless said otherwise."""
    torchscript_opset: int | None = None
    """Export by tracing to TorchScript, at this opset."""
    needs_package: str | None = None
    signal_lost_in_half: bool = False


def images(size: int, channels: int = 3, name: str = "pixel_values") -> Callable[[int, int], dict[str, np.ndarray]]:
    """Coarse patches, a gradient and noise: unlike white noise, such images differ after pooling."""

    def feeds(num_samples: int, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        block = size // 8
        coarse = rng.standard_normal((num_samples, channels, 8, 8)).repeat(block, 2).repeat(block, 3)
        ramp = np.linspace(-1, 1, size) * rng.standard_normal((num_samples, channels, 1, 1))
        level = rng.standard_normal((num_samples, channels, 1, 1))
        noise = rng.standard_normal(coarse.shape)
        return {name: (0.6 * coarse + 0.5 * ramp + 0.5 * level + 0.3 * noise).astype(np.float32)}

    return feeds


def token_ids(
    vocabulary: int, length: int, *, mask: bool, left: bool = False
) -> Callable[[int, int], dict[str, np.ndarray]]:
    """Random token ids; with `mask`, the tail of most samples is padding, or with `left` their head.

    A causal model's rows at left padding see no token at all: every score there is the mask's constant.
    """

    def feeds(num_samples: int, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        ids = rng.integers(3, vocabulary, (num_samples, length))
        if not mask:
            return {"input_ids": ids}
        lengths = rng.integers(length // 2, length + 1, (num_samples, 1))
        kept = (np.arange(length) < lengths).astype(np.int64)
        if left:
            kept = kept[:, ::-1].copy()
        return {"input_ids": ids * kept, "attention_mask": kept}

    return feeds
