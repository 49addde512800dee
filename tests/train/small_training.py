"""Small data that can be learnt in a second, and a small model that remembers what it saw."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mpdeploy.artifact import Dataset
from mpdeploy.train.precision import PrecisionChoice

CLASSES, FEATURES = 4, 16
NUM_TRAIN, BATCH = 96, 32  # three steps an epoch


def blobs(count: int, first_id: int) -> Dataset:
    """`count` points around four centres; a sample's id is written into its last feature, times 1e-6."""
    rng = np.random.default_rng(first_id)
    labels = np.arange(count) % CLASSES
    centres = np.random.default_rng(7).normal(size=(CLASSES, FEATURES)) * 2
    inputs = (centres[labels] + rng.normal(size=(count, FEATURES))).astype(np.float32)
    ids = np.arange(first_id, first_id + count)
    inputs[:, -1] = ids * 1e-6
    return Dataset({"x": inputs}, ids, labels.astype(np.int64))


def ids_in(inputs: torch.Tensor) -> list[int]:
    return [round(float(value) * 1e6) for value in inputs[:, -1].float()]


class Mlp(nn.Module):
    """x [n, 16] -> logits [n, 4]; it remembers what it saw and in which type its first layer answered."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(FEATURES, 32), nn.Dropout(0.2), nn.Linear(32, CLASSES)
        self.seen: list[int] = []
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += ids_in(x)
        hidden = self.first(x)
        self.dtypes.add(hidden.dtype)
        return self.last(self.drop(torch.relu(hidden)))


def choice_of(precision: str) -> PrecisionChoice:
    return PrecisionChoice(precision, "cpu", "the test says so", {})


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
