"""Magnitude pruning: masks over the trained weights, gradual by a cubic schedule, put on again after every optimiser step.

The masks are buffers of the modules they belong to, and so is the number of steps taken. They lie in every state of the training loop
with the weights, and a killed run goes on to the same zeros. After fine-tuning the buffers are taken off: what is saved and exported are
plain weights with zeros in them, under the names they always had. (torch.nn.utils.prune renames parameters and computes
weight * mask in every forward pass, which fused optimisers, moving averages and the exporter would all see.)

2:4 runs along the input channels, as TensorRT wants it for sparse tensor cores: of four neighbouring input channels, at each output
channel and each position of the kernel, at most two weights are not zero; for a linear layer along its inputs. Layers whose input
channels are no multiple of four, and grouped convolutions, stay dense. `channels` zeroes whole output channels and their bias; shapes
stay as they are, and a BatchNorm behind them turns such a channel into a constant.

Zhu and Gupta, "To prune, or not to prune" (2017), for the schedule.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mpdeploy.config import ParityConfig, PruningConfig, TrainConfig
from mpdeploy.errors import ConfigError

MASK, STEP = "pruning_mask", "pruning_step"
GROUP = 4
_PRUNED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def pruned_layers(model: nn.Module, config: PruningConfig) -> dict[str, nn.Module]:
    """Module name -> linear and convolution layers that are pruned.

    Raises:
        ConfigError: there are none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _PRUNED)
        and not any(fnmatchcase(name, pattern) for pattern in config.dense)
        and (config.method != "2:4" or (module.weight.shape[1] % GROUP == 0 and getattr(module, "groups", 1) == 1))
    }
    if not found:
        raise ConfigError(
            f"train.pruning.method is '{config.method}' and no layer of the model can be pruned so.",
            hint="2:4 wants linear or ungrouped convolution layers whose input channels are a multiple of 4"
            if config.method == "2:4"
            else "does train.pruning.dense name every layer?",
        )
    return found


def mask_of(weight: torch.Tensor, method: str, share: float) -> torch.Tensor:
    """Which weights [outputs, inputs, ...] stay (bool), where `share` of all are to be zero; 2:4 reaches its pattern at 0.5."""
    size = weight.detach().abs().float()
    if method == "channels":
        norms = size.flatten(1).norm(dim=1)
        count = min(round(share * len(norms)), len(norms) - 1)
        keep = torch.ones(len(norms), dtype=torch.bool, device=weight.device)
        keep[norms.argsort(stable=True)[:count]] = False
        return keep.view(-1, *[1] * (weight.ndim - 1)).expand_as(weight).clone()
    count = round(share * weight.numel())
    if method == "2:4":
        by_group = size.transpose(1, -1)  # input channels last: [outputs, ..., inputs]
        groups = by_group.reshape(-1, GROUP)
        rank = groups.argsort(dim=1, stable=True).argsort(dim=1)
        candidates = (rank < GROUP // 2).reshape(by_group.shape).transpose(1, -1)
        size = torch.where(candidates, size, torch.inf)
    keep = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    keep[size.flatten().argsort(stable=True)[:count]] = False
    return keep.view(weight.shape)


def is_2_4(weight: torch.Tensor) -> bool:
    """Whether of each four neighbouring input channels at most two are not zero."""
    if weight.ndim < 2 or weight.shape[1] % GROUP:
        return False
    groups = weight.detach().transpose(1, -1).reshape(-1, GROUP)
    return bool(((groups != 0).sum(dim=1) <= GROUP // 2).all())


def sparsity_at(config: PruningConfig, step: int, total: int) -> float:
    """Share of zeros after `step` of `total` steps: rises fast, then slowly, and stays."""
    ramp = max(1, round(config.ramp * total))
    return config.sparsity * (1.0 - (1.0 - min(step / ramp, 1.0)) ** 3)


def add_masks(model: nn.Module, config: PruningConfig) -> None:
    """Put masks that let everything through, and the count of steps, on a model."""
    for module in pruned_layers(model, config).values():
        assert isinstance(module.weight, torch.Tensor)
        module.register_buffer(MASK, torch.ones_like(module.weight, dtype=torch.bool))
    model.register_buffer(STEP, torch.zeros((), dtype=torch.int64))


def remove_masks(model: nn.Module) -> nn.Module:
    """Set masked weights to zero once more and take the masks off: the model is plain again."""
    _apply(model)
    for module in model.modules():
        for name in (MASK, STEP):
            if name in module._buffers:
                del module._buffers[name]
    return model


@torch.no_grad()
def _apply(model: nn.Module) -> None:
    for module in model.modules():
        mask = module._buffers.get(MASK)
        if mask is None:
            continue
        module.weight.mul_(mask)
        bias = getattr(module, "bias", None)
        if bias is not None and bias.ndim == 1:
            bias.mul_(mask.flatten(1).any(dim=1))  # a channel without weights has no bias either


def after_step(model: nn.Module, config: PruningConfig, total: int) -> None:
    """Count a step that was really taken, look for the smallest weights anew while sparsity rises, and zero them."""
    step = model._buffers[STEP]
    assert step is not None
    step += 1
    number, ramp = int(step), max(1, round(config.ramp * total))
    if number <= ramp and (number % config.update_every == 0 or number == ramp):
        for module in pruned_layers(model, config).values():
            assert isinstance(module.weight, torch.Tensor)
            module._buffers[MASK] = mask_of(module.weight, config.method, sparsity_at(config, number, total))
    _apply(model)


@contextmanager
def masked_models(
    config: PruningConfig, total_steps: int, dense: Callable[[], nn.Module]
) -> Iterator[Callable[[], nn.Module]]:
    """Within the block, models that the yielded function makes are pruned after each step of any optimiser of their parameters.

    Args:
        config: how.
        total_steps: optimiser steps of the fine-tuning.
        dense: makes a model with the weights to start from.
    """
    made: list[nn.Module] = []

    def make() -> nn.Module:
        model = dense()
        add_masks(model, config)
        made.append(model)
        return model

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        first = optimizer.param_groups[0]["params"][0]
        for model in made:
            if any(parameter is first for parameter in model.parameters()):
                after_step(model, config, total_steps)

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield make
    finally:
        handle.remove()


def fine_tuning(config: TrainConfig, model: Callable[[], nn.Module]) -> TrainConfig:
    """The training's config for the fine-tuning: its last weights ship, for earlier ones are less sparse."""
    return config.model_copy(
        update={
            "model": model,
            "epochs": config.pruning.epochs,
            "learning_rate": config.learning_rate * config.pruning.learning_rate_share,
            "early_stopping_patience": None,
            "ship": "last",
            "reference": False,
            "parity": ParityConfig(),
        }
    )


def sizes(model: nn.Module) -> dict[str, Any]:
    """Bytes of a model's FP32 weights: dense, gzipped, and at best (values that are not zero and one bit for each weight)."""
    tensors = [value.detach().float().cpu().contiguous() for value in model.parameters()]
    dense = sum(4 * value.numel() for value in tensors)
    nonzero = sum(int(torch.count_nonzero(value)) for value in tensors)
    weights = sum(value.numel() for value in tensors)
    return {
        "dense_bytes": dense,
        "gzip_bytes": sum(len(gzip.compress(value.numpy().tobytes(), 6, mtime=0)) for value in tensors),
        "sparse_bytes": 4 * nonzero + (weights + 7) // 8,
        "zeros": (weights - nonzero) / max(weights, 1),
    }
