"""The optimiser, the loss scaler that guards it, and what may be done to gradients before a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mpdeploy.config import TrainConfig
from mpdeploy.config.training import GradientThreshold
from mpdeploy.train.precision import PrecisionChoice


def make_optimizer(config: TrainConfig, model: nn.Module, device: str) -> torch.optim.Optimizer:
    """AdamW or SGD over the FP32 weights, as one fused kernel where that was asked for (`auto`: on CUDA)."""
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():  # a kernel takes split parameters of one device mesh
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    groups = [{"params": found} for found in by_mesh.values()]
    fused = True if config.fused == "on" or (config.fused == "auto" and device == "cuda") else None
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)


def make_scaler(config: TrainConfig, choice: PrecisionChoice) -> torch.amp.GradScaler:
    """The loss scaler: enabled under FP16 alone, unless `train.loss_scaling` is `none`."""
    return torch.amp.GradScaler(
        choice.device,
        enabled=choice.scales_loss and config.loss_scaling != "none",
        init_scale=config.loss_scale.initial,
        growth_interval=config.loss_scale.growth_interval,
    )


def current_scale(scaler: torch.amp.GradScaler, device: str) -> torch.Tensor:
    """The loss scale as a tensor on its device (1 without a scaler); reading it waits for nothing."""
    one = torch.ones((), device=device)
    return scaler.scale(one) if scaler.is_enabled() else one


def take_step(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, finite: torch.Tensor, config: TrainConfig
) -> torch.Tensor:
    """Take an optimiser step, unless something is not finite: weights are never poisoned.

    Args:
        scaler: its gradients are unscaled already.
        optimizer: steps.
        finite: whether loss and gradients are, a boolean scalar on their device. A scaler looks at gradients itself.
        config: says whether the scale is dynamic.

    Returns:
        Whether the step was skipped, a boolean scalar on the device.
    """
    if not scaler.is_enabled():
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = (~finite).float()
            optimizer.grad_scale = None
            optimizer.step()  # its kernel looks at found_inf: nothing waits for the device
            del optimizer.found_inf, optimizer.grad_scale
        elif bool(finite):
            optimizer.step()
        return ~finite
    device = finite.device.type
    before = current_scale(scaler, device)
    scaler.step(optimizer)
    scaler.update()
    skipped = current_scale(scaler, device) < before  # and not "step was not called": fused optimisers skip within
    if config.loss_scaling == "static":
        scaler.update(config.loss_scale.initial)
    return skipped


@torch.no_grad()
def apply_threshold(model: nn.Module, threshold: GradientThreshold) -> None:
    """Replace unscaled gradients whose magnitude lies below the threshold (see `GradientThreshold`)."""
    if threshold.kind == "off":
        return
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is None or not gradient.numel():
            continue
        magnitude = gradient.abs()
        limit: torch.Tensor | float = threshold.value
        if threshold.kind == "relative":
            limit = threshold.value * magnitude.max()
        elif threshold.kind == "quantile":
            place = int(threshold.value * magnitude.numel())  # so many are smaller
            limit = magnitude.flatten().kthvalue(place + 1).values
        replacement = torch.sign(gradient) * threshold.constant
        gradient.copy_(torch.where(magnitude < limit, replacement, gradient))
