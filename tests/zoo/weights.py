"""Weights and statistics that let a signal through a network that nobody trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def give_signal(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Seed every parameter so that activations keep a variance near one; returns the model in eval mode."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(seed)

    def draw(parameter: torch.Tensor, std: float, mean: float = 0.0) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.utils.parametrize.ParametrizationList):
                continue  # weight_norm: its own initialisation is good
            for name, parameter in module.named_parameters(recurse=False):
                kind = type(module).__name__
                if "layer_scale" in name:
                    draw(parameter, 0.1, 0.5)
                elif parameter.ndim == 1 and "Norm" in kind and name == "weight":
                    draw(parameter, 0.1, 1.0)
                elif parameter.ndim == 1 and "BatchNorm" in kind:
                    # Centred at zero, ReLU after BatchNorm is chaotic in a deep random network: it multiplies the
                    # rounding of the input by 50, which no trained network does.
                    draw(parameter, 0.1, 0.5)
                elif parameter.ndim <= 1:
                    draw(parameter, 0.05) if parameter.ndim else None  # a scalar is a temperature: keep it
                elif isinstance(module, nn.Conv1d | nn.Conv2d):
                    draw(parameter, (1.5 / parameter[0].numel()) ** 0.5)
                elif isinstance(module, Conv1D):
                    draw(parameter, parameter.shape[0] ** -0.5)
                elif isinstance(module, nn.Linear):
                    draw(parameter, parameter.shape[1] ** -0.5)
                else:  # embeddings, class tokens, position tables
                    draw(parameter, 0.5)
    return model.eval()


def calibrate(model: torch.nn.Module, batches: list[torch.Tensor]) -> torch.nn.Module:
    """Give every BatchNorm, frozen ones too, the statistics of what reaches it in these batches."""
    import torch

    norms = [m for m in model.modules() if hasattr(m, "running_mean") and hasattr(m, "running_var")]
    batch = torch.cat(batches)

    def measure(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
        module.running_mean.copy_(inputs[0].mean(axes))
        module.running_var.copy_(inputs[0].var(axes))

    # Each pre-hook sees its input after all earlier norms are set: one pass calibrates the whole network.
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return model
