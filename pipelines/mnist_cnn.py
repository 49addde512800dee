"""MNIST, from AMP training to gated engines: `mpdeploy train-and-export pipelines/mnist_cnn.py --set data.folder=DIR`.

DIR holds the four IDX files, gz or not. Without it they come through the package `datasets`, where it is installed.
"""

from __future__ import annotations

import torch
from torch import nn

from mpdeploy.config import DataConfig, Pipeline, TrainConfig
from mpdeploy.train.data import load_mnist


class MnistCnn(nn.Module):
    """The classic: two 3x3 convolutions, pooling, dropout, two linear layers: image [n, 1, 28, 28] -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(64 * 12 * 12, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.head(self.features(image))


def pipeline() -> Pipeline:
    """Choices only."""
    return Pipeline(
        name="mnist_cnn",
        data=DataConfig(load=load_mnist),
        train=TrainConfig(
            model=MnistCnn, epochs=6, batch_size=128, learning_rate=2e-3, precision="auto", channels_last=True
        ),
    )
