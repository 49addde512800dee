"""A shadow backward: the gradients of the same batch and weights in FP32, which show what FP16 cannot hold.

The AMP gradient itself cannot: a value that was flushed to zero leaves no trace in it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mpdeploy.train.exponents import counts_to_json, exponent_counts
from mpdeploy.train.modules import Inputs, answer, leaves
from mpdeploy.train.precision import PrecisionChoice, autocast
from mpdeploy.user_code import user_call

FP16_MAX = 65504.0
FP16_SMALLEST_NORMAL = 2.0**-14
FP16_FLUSHED = 2.0**-25
"""Magnitudes up to this are rounded to zero: half of FP16's smallest number."""
HEADROOM = 4.0
"""A proposed scale leaves this factor between the largest gradient and FP16's largest number."""
SCALE_LIMIT = 2.0**24
"""No larger scale is proposed."""

Draws = tuple[torch.Tensor, torch.Tensor | None]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def draws(device: str) -> Draws:
    """State of the generators that dropout draws from. Host numbers both: nothing waits for the device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None


@contextlib.contextmanager
def as_it_was(model: nn.Module, before: Draws, device: str) -> Iterator[None]:
    """Within the block random numbers are drawn as they were after `before`; after it nothing has changed, buffers included."""
    now, buffers = draws(device), [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    _set(before)
    try:
        yield
    finally:
        _set(now)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _set(state: Draws) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def shadow_backward(
    model: nn.Module, inputs: Inputs, labels: torch.Tensor, loss: Loss, before: Draws, device: str
) -> tuple[dict[str, torch.Tensor], float]:
    """FP32 gradients by parameter (`.grad` is left alone), and the largest magnitude of a gradient of a module's output.

    Both bound a loss scale: under AMP the gradients of activations are FP16 too.
    """
    largest: list[torch.Tensor] = []

    def watch(module: nn.Module, given: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: largest.append(gradient.detach().abs().amax().float()))

    handles = [module.register_forward_hook(watch) for _, module in leaves(model)]
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        with as_it_was(model, before, device):
            with autocast(PrecisionChoice("fp32", device, "shadow backward", {})):
                outputs = answer(model, inputs)
            found = torch.autograd.grad(user_call(loss, outputs, labels), list(named.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    gradients = {name: value for name, value in zip(named, found, strict=True) if value is not None}
    return gradients, float(torch.stack(largest).max()) if largest else 0.0


def underflow_window(
    gradients: dict[str, torch.Tensor], largest_activation_gradient: float, scale: float
) -> dict[str, Any]:
    """What FP16 makes of FP32 gradients at a loss scale, and which scale would suit them.

    Shares are of all gradients that are not zero in FP32. `flushed`: become zero. `subnormal`: keep fewer than 11 bits.
    `overflowing`: exceed 65504. `proposed_scale` is the largest power of two that leaves a factor of 4 to the overflow.

    Args:
        gradients: by parameter, unscaled, FP32.
        largest_activation_gradient: largest magnitude of a gradient of an activation.
        scale: the loss scale they would have been multiplied with.
    """
    magnitudes = torch.cat([value.detach().abs().flatten().float() for value in gradients.values()])
    magnitudes = magnitudes[magnitudes > 0]
    counts = exponent_counts(magnitudes, sampled=None)
    count = max(magnitudes.numel(), 1)
    largest = max(float(magnitudes.max()) if magnitudes.numel() else 0.0, largest_activation_gradient)

    def share(low: float, high: float, by: float) -> float:
        return float(((magnitudes * by > low) & (magnitudes * by <= high)).sum()) / count

    proposed = 1.0
    if 0 < largest < math.inf:
        proposed = min(max(2.0 ** math.floor(math.log2(FP16_MAX / HEADROOM / largest)), 1.0), SCALE_LIMIT)
    by_parameter = {
        name: float(((value != 0) & (value.abs() * scale <= FP16_FLUSHED)).sum()) / max(int((value != 0).sum()), 1)
        for name, value in gradients.items()
    }
    worst = max(by_parameter, key=by_parameter.__getitem__, default=None)
    return {
        "loss_scale": scale,
        "flushed": share(0.0, FP16_FLUSHED, scale),
        "subnormal": share(FP16_FLUSHED, FP16_SMALLEST_NORMAL, scale),
        "overflowing": share(FP16_MAX, math.inf, scale),
        "flushed_unscaled": share(0.0, FP16_FLUSHED, 1.0),
        "proposed_scale": proposed,
        "flushed_at_proposed_scale": share(0.0, FP16_FLUSHED, proposed),
        "largest_gradient": float(magnitudes.max()) if magnitudes.numel() else 0.0,
        "largest_activation_gradient": largest_activation_gradient,
        "most_flushed_parameter": None if worst is None else {"name": worst, "flushed": by_parameter[worst]},
        **counts_to_json(counts),
    }


def lost_share(shadow: dict[str, torch.Tensor], amp: dict[str, torch.Tensor]) -> float:
    """Share of the gradients that are not zero in FP32 but are under AMP."""
    lost = sum(int(((value != 0) & (amp[name] == 0)).sum()) for name, value in shadow.items() if name in amp)
    return lost / max(sum(int((value != 0).sum()) for value in shadow.values()), 1)
