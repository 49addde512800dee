"""After a NaN: run the step again with the same weights, samples and random numbers, and name what made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mpdeploy.train.modules import answer
from mpdeploy.train.precision import PrecisionChoice, autocast
from mpdeploy.train.shadow import Draws, Loss, as_it_was
from mpdeploy.user_code import user_call


def first_not_finite(
    model: nn.Module,
    micro_batches: list[tuple[tuple[torch.Tensor, ...], torch.Tensor]],
    loss: Loss,
    choice: PrecisionChoice,
    scale: float,
    before: Draws,
) -> str:
    """Name the first thing that was not finite: an input, a weight, a module's output, the loss, or a gradient.

    Args:
        model: with the weights the step began with.
        micro_batches: inputs and labels of the step.
        loss: the loss function.
        choice: the precision it ran in.
        scale: the loss scale it ran with.
        before: the random numbers it ran with.
    """
    for number, values in enumerate(micro_batches[0][0]):
        if values.is_floating_point() and not all(_finite(inputs[number]) for inputs, _ in micro_batches):
            return f"input {number} of the batch, before any module ran"
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"the weight '{name}', before the step began"
    forward: list[str] = []
    backward: list[str] = []
    handles = [module.register_forward_hook(_watch(name, forward, backward)) for name, module in model.named_modules()]
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        with as_it_was(model, before, choice.device), torch.enable_grad():
            for inputs, labels in micro_batches:
                with autocast(choice):
                    outputs = answer(model, inputs)
                if forward:
                    return forward[0]
                value = user_call(loss, outputs, labels)
                if not _finite(value):
                    return f"the loss function; the model's outputs were finite, the largest {float(outputs.detach().abs().max()):.4g}"
                found = torch.autograd.grad(value * scale, list(named.values()), allow_unused=True)
                if backward:
                    return backward[0]
                for name, gradient in reversed(list(zip(named, found, strict=True))):
                    if gradient is not None and not _finite(gradient):
                        return f"the gradient of '{name}'"
    finally:
        for handle in handles:
            handle.remove()
    return "nothing: run again, every output and every gradient was finite (is something drawn from a generator of its own?)"


def _watch(name: str, forward: list[str], backward: list[str]) -> Callable[..., None]:
    """A hook that notes the first output that is not finite, and the first gradient. A module ends after its children."""

    def gradient(gradient: torch.Tensor) -> None:
        if not backward and not _finite(gradient):
            backward.append(f"the gradient that reached the output of the module {shown}")

    shown = f"'{name}'" if name else "at the top"

    def watch(module: nn.Module, given: Any, output: Any) -> None:
        values = output if isinstance(output, tuple | list) else (output,)
        for value in values:
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            if not forward and not _finite(value):
                sizes = [
                    f"{float(item.detach().abs().max()):.4g}"
                    for item in given
                    if isinstance(item, torch.Tensor) and item.numel() and item.is_floating_point()
                ]
                largest = f"; the largest magnitude in what it was given: {', '.join(sizes)}" if sizes else ""
                forward.append(
                    f"the output of the module {shown} ({type(module).__name__}, {str(value.dtype)[6:]}){largest}"
                )
            if value.requires_grad:
                value.register_hook(gradient)

    return watch


def _finite(values: torch.Tensor) -> bool:
    return bool(torch.isfinite(values.detach()).all())
