"""Evaluation during training: no gradients, in batches, in the training's precision or in FP32."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from mpdeploy.artifact import Dataset
from mpdeploy.config import TrainConfig
from mpdeploy.train.feeding import laid_out, share_of, tensors_of
from mpdeploy.train.modules import answer, loss_of
from mpdeploy.train.precision import PrecisionChoice, autocast
from mpdeploy.train.ranks import ALONE, Ranks
from mpdeploy.user_code import user_call


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Dataset, config: TrainConfig, choice: PrecisionChoice, ranks: Ranks = ALONE
) -> tuple[float, float]:
    """Mean loss over the samples, and the share classified right (NaN where outputs are not [samples, classes]).

    Each rank takes its share of each batch, and all get the same numbers.
    """
    model.eval()
    if config.evaluate_in == "fp32":
        choice = replace(choice, precision="fp32")
    total = torch.zeros((), dtype=torch.float64, device=choice.device)
    correct = torch.zeros((), dtype=torch.float64, device=choice.device)
    for start in range(0, len(dataset), config.evaluation_batch_size):
        stop = min(start + config.evaluation_batch_size, len(dataset))
        share, counts = share_of(stop - start, ranks.data_rank, ranks.data_size)
        part = dataset.take(slice(start + share.start, start + share.stop))
        inputs, labels = tensors_of(part, choice.device)
        with autocast(choice):
            outputs = answer(model, tuple(laid_out(values, config) for values in inputs))
        if not counts:
            continue
        total += user_call(loss_of(config), outputs, labels).double() * len(labels)
        correct += (outputs.argmax(-1) == labels).sum() if outputs.ndim == 2 and labels.ndim == 1 else math.nan
    loss, score = (ranks.add(torch.stack([total, correct])) / len(dataset)).tolist()
    return loss, score
