"""Handwritten digits, from AMP training to gated engines: `mpdeploy train-and-export pipelines/digits_cnn.py`.

1,797 real 8x8 images (they ship with scikit-learn) and a small CNN. Copy this file to start your own.
"""

from __future__ import annotations

import torch
from torch import nn

from mpdeploy.config import DataConfig, Pipeline, TrainConfig
from mpdeploy.train.data import load_digits


class DigitsCnn(nn.Module):
    """Three 3x3 convolutions with BatchNorm and a linear head: image [n, 1, 8, 8] -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*_block(1, 16), *_block(16, 32), nn.MaxPool2d(2), *_block(32, 64), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(64 * 4 * 4, 10))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.head(self.features(image))


def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()


def shift_and_rotate(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to one pixel and rotate it by up to 10 degrees. Never flip: a mirrored digit is another sign."""
    n = len(images)
    angle = (torch.rand(n, generator=generator) * 2 - 1) * (10 * torch.pi / 180)
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * (2 / images.shape[-1])
    cosine, sine = angle.cos(), angle.sin()
    theta = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], dim=1).view(n, 2, 3).to(images.device)
    grid = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def pipeline() -> Pipeline:
    """Choices only."""
    return Pipeline(
        name="digits_cnn",
        data=DataConfig(load=load_digits),
        train=TrainConfig(
            model=DigitsCnn,
            augment=shift_and_rotate,
            epochs=20,
            batch_size=64,
            learning_rate=3e-3,
            precision="auto",
            cpu_precision="bf16",  # `auto` may find FP32 faster (a CPU without BF16 units): here AMP is to run
            channels_last=True,
        ),
    )
