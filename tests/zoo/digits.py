"""A CNN trained on scikit-learn's digits in seconds, whole or with one trap for half precision planted in it.

Every trap leaves the float32 predictions as they are, and leaves an all-half version with NaN or no signal.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from .recipe import Recipe

if TYPE_CHECKING:
    import torch

EPOCHS = 12
NUM_TRAIN = 1437  # the other 360 images are held out


@dataclass(frozen=True)
class DigitsModel:
    """A trained classifier on disk and its held-out images."""

    path: Path
    trap: str
    images: np.ndarray
    """[360, 1, 8, 8] float32."""
    labels: np.ndarray
    float32_accuracy: float
    torch_parity: float

    def feeds(self, num_samples: int = 360, seed: int = 0) -> dict[str, np.ndarray]:
        """The held-out images in a seeded order."""
        return {"images": self.images[np.random.default_rng(seed).permutation(len(self.images))[:num_samples]]}


# A trap changes the activations after the first block, or the logits: (hidden -> hidden, logits -> scores).
Function = Callable[[Any], Any]


def _same(x: Any) -> Any:
    return x


def _through(factor: float, x: Any) -> Any:
    return (x * factor).relu() / factor


def _guarded_division(hidden: Any) -> Any:
    """Leaves ReLU's output as it is; 0 / (0 + 2e-8) is NaN once 2e-8 has become 0.

    Not 1e-9: torch.onnx.export takes a constant below 1e-8 for zero and drops the Add itself (onnxscript 0.7.2).
    """
    return hidden * (hidden / (hidden + 2e-8))


def _softmax_by_hand(logits: Any) -> Any:
    exponentials = logits.exp()
    return exponentials / exponentials.sum(1, keepdim=True)


def _root_mean_square(logits: Any) -> Any:
    large = logits * 100.0
    return large / (large.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()


TRAPS: dict[str, tuple[Function, Function]] = {
    "none": (_same, _same),
    "overflow": (functools.partial(_through, 3e5), _same),
    "underflow": (functools.partial(_through, 1e-9), _same),
    "epsilon": (_guarded_division, _same),
    "exp_to_sum": (_same, _softmax_by_hand),
    "pow_to_mean": (_same, _root_mean_square),
    "tiny_weights": (_same, _same),
}


def trained_digits_cnn(folder: Path, trap: str = "none") -> DigitsModel:
    """Train (once a process) and export (once a folder) the CNN with one of `TRAPS`."""
    from . import _key

    path = folder / f"digits_{trap}.onnx"
    record_path = path.with_suffix(".json")
    images, labels = _data()
    with FileLock(path.with_suffix(".lock")):
        key = _key()
        record = json.loads(record_path.read_text()) if record_path.exists() and path.exists() else {}
        if record.get("key") != key:
            from .exporting import export_to

            recipe = Recipe(f"digits_{trap}", lambda: _with_trap(trap), _feeds, ["scores"])
            record = {"key": key, **export_to(recipe, path), "float32_accuracy": _accuracy(_with_trap(trap))}
            record_path.write_text(json.dumps(record))
    held_out = slice(NUM_TRAIN, None)
    accuracy, parity = record["float32_accuracy"], record["torch_parity"]
    return DigitsModel(path, trap, images[held_out], labels[held_out], accuracy, parity)


@functools.cache
def _data() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return (digits.images[order, None] / 8 - 1).astype(np.float32), digits.target[order]


def _feeds(num_samples: int, seed: int) -> dict[str, np.ndarray]:
    images, _ = _data()
    return {"images": images[NUM_TRAIN:][np.random.default_rng(seed).permutation(360)[:num_samples]]}


def _network(hidden: Function, scores: Function) -> torch.nn.Module:
    from torch import nn

    class Digits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
            self.second = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
            self.head = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
            self.head_factor = 1.0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            features = self.second(hidden(self.first(images))).flatten(1)
            logits = self.head(features)
            return scores(logits if self.head_factor == 1.0 else logits * self.head_factor)

    return Digits()


@functools.cache
def _trained() -> dict[str, torch.Tensor]:
    import torch

    images, labels = (torch.from_numpy(a) for a in _data())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _network(_same, _same)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)
        for _ in range(EPOCHS):
            for batch in torch.randperm(NUM_TRAIN).split(64):
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimiser.step()
            schedule.step()
    return model.state_dict()


def _with_trap(trap: str) -> torch.nn.Module:
    import torch

    with torch.enable_grad():
        state = _trained()
    model = _network(*TRAPS[trap])
    model.load_state_dict(state)
    if trap == "tiny_weights":  # below half's subnormals, undone after the layer
        with torch.no_grad():
            for parameter in model.head[2].parameters():
                parameter.mul_(1e-8)
        model.head_factor = 1e8
    return model.eval()


def _accuracy(model: torch.nn.Module) -> float:
    import torch

    images, labels = _data()
    with torch.no_grad():
        predicted = model(torch.from_numpy(images[NUM_TRAIN:])).argmax(1).numpy()
    return float((predicted == labels[NUM_TRAIN:]).mean())
