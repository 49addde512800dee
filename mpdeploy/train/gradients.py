"""Gradients of the first steps on one batch, which two precisions can be compared by."""

from __future__ import annotations

import torch

from mpdeploy.config import TrainConfig
from mpdeploy.train.modules import Inputs, answer, loss_of, make_model, prepared
from mpdeploy.train.optimizers import make_optimizer, make_scaler
from mpdeploy.train.precision import PrecisionChoice, autocast, float32_arithmetic
from mpdeploy.user_code import user_call


def gradients(
    config: TrainConfig, choice: PrecisionChoice, batch: tuple[Inputs, torch.Tensor], *, steps: int
) -> list[dict[str, torch.Tensor]]:
    """Unscaled gradients by parameter after each of `steps` steps on one batch, from the initial weights; weights move in between."""
    model = make_model(config, choice.device)
    model.train()
    optimizer = make_optimizer(config, model, choice.device)
    scaler = make_scaler(config, choice)
    loss_function = loss_of(config)
    found: list[dict[str, torch.Tensor]] = []
    inputs, labels = batch
    with prepared(model, config), float32_arithmetic(choice):
        while len(found) < steps:
            torch.manual_seed(config.seed + len(found))  # dropout must drop the same values in both precisions
            optimizer.zero_grad(set_to_none=True)
            with autocast(choice):
                outputs = answer(model, inputs)
            loss = user_call(loss_function, outputs, labels)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            found.append(
                {
                    name: parameter.grad.detach().float().cpu().clone()
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None
                }
            )
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.is_enabled() and scaler.get_scale() < before and before > 1:
                found.pop()  # the scale was too large and the step was skipped: not what training would step with
    return found
