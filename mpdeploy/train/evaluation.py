"""Evaluation during training: no gradients, in batches, in the training's precision or in FP32."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from mpdeploy.artifact import Dataset
from mpdeploy.config import TrainConfig
from mpdeploy.train.feeding import laid_out, tensors_of
from mpdeploy.train.modules import answer, loss_of
from mpdeploy.train.precision import PrecisionChoice, autocast
from mpdeploy.user_code import user_call


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, config: TrainConfig, choice: PrecisionChoice) -> tuple[float, float]:
    """Mean loss over the samples, and the share classified right (NaN where outputs are not [samples, classes])."""
    model.eval()
    if config.evaluate_in == "fp32":
        choice = replace(choice, precision="fp32")
    total = torch.zeros((), dtype=torch.float64, device=choice.device)
    correct = torch.zeros((), dtype=torch.float64, device=choice.device)
    for start in range(0, len(dataset), config.evaluation_batch_size):
        part = dataset.take(slice(start, start + config.evaluation_batch_size))
        inputs, labels = tensors_of(part, choice.device)
        with autocast(choice):
            outputs = answer(model, tuple(laid_out(values, config) for values in inputs))
        total += user_call(loss_of(config), outputs, labels).double() * len(labels)
        correct += (outputs.argmax(-1) == labels).sum() if outputs.ndim == 2 and labels.ndim == 1 else math.nan
    return float(total) / len(dataset), float(correct) / len(dataset)
