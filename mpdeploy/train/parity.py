"""Paired trainings: FP32 and AMP from the same seed, order and initial weights, and what both answer on held-out samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mpdeploy.artifact import Array, Dataset
from mpdeploy.config import ParityConfig, PruningConfig, TrainConfig
from mpdeploy.errors import DataError
from mpdeploy.train.loop import Progress, answer, loss_of, tensors_of, train
from mpdeploy.train.precision import PrecisionChoice, autocast
from mpdeploy.user_code import user_call


@dataclass(frozen=True)
class Answers:
    """What one trained model says of the held-out samples.

    Attributes:
        outputs: [num_samples, ...], FP32.
        nll: [num_samples], each sample's loss in nats (in the loss's own unit, where the pipeline has one).
    """

    outputs: Array
    nll: Array


def fp32_like(choice: PrecisionChoice) -> PrecisionChoice:
    """The reference's precision, on the device of `choice`."""
    return PrecisionChoice("fp32", choice.device, "the reference", {})


def train_pair(
    config: TrainConfig,
    choice: PrecisionChoice,
    train_set: Dataset,
    stopping_set: Dataset,
    *,
    seed: int,
    folder: Path,
    state_key: str,
    progress: Progress,
) -> tuple[nn.Module, nn.Module]:
    """Train (FP32, AMP) models of one seed. Each has a full state of its own in `folder`: a killed run goes on within it.

    Raises:
        TrainingDivergedError, UserCodeError: as `train`.
    """
    own = config.model_copy(
        update={"seed": seed, "reference": False, "parity": ParityConfig(), "pruning": PruningConfig()}
    )

    def trained(precision: PrecisionChoice, side: str) -> nn.Module:
        return train(
            own, precision, train_set, stopping_set,
            state_path=folder / f"state.seed{seed}.{side}.pt", state_key=f"{state_key} seed {seed} {side}",
            progress=lambda done, total, text: progress(done, total, f"seed {seed} in {precision.precision}, {text}"),
        ).model  # fmt: skip

    return trained(fp32_like(choice), "fp32"), trained(choice, "amp")


@torch.no_grad()
def held_out_answers(config: TrainConfig, device: str, model: nn.Module, samples: Dataset) -> Answers:
    """Outputs and losses of `samples`, evaluated in FP32 and eval mode: it is the trained weights that are compared.

    Raises:
        DataError: there are no labels.
    """
    if samples.labels is None:
        raise DataError("Parity over seeds wants a calibration split with labels: its held-out loss is compared.")
    model.eval()
    found = []
    with autocast(PrecisionChoice("fp32", device, "evaluation", {})):
        for start in range(0, len(samples), config.evaluation_batch_size):
            inputs, _ = tensors_of(samples.take(slice(start, start + config.evaluation_batch_size)), device)
            found.append(answer(model, inputs).cpu())
    outputs = torch.cat(found)
    return Answers(outputs.numpy(), losses(config, outputs, torch.from_numpy(samples.labels)).numpy())


def losses(config: TrainConfig, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each sample's loss in float64: cross entropy, or the pipeline's own loss on batches of one sample."""
    if config.loss is None:
        each = nn.functional.cross_entropy(outputs.double(), labels, reduction="none")
        return each.reshape(len(labels), -1).mean(dim=1)
    loss = loss_of(config)
    return torch.stack(
        [
            user_call(loss, outputs[i : i + 1], labels[i : i + 1]).detach().double().reshape(())
            for i in range(len(labels))
        ]
    )
