"""`mpdeploy init NAME`: a pipeline file that runs as it is."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from mpdeploy.errors import UsageError
from mpdeploy.files import write_text

_TEMPLATE = '''"""{name}: from AMP training to gated engines. Run it: mpdeploy train-and-export {file}

It trains on scikit-learn's digits as it is. Replace `Network` and `load`; everything else has a default
(mpdeploy/config/ documents each field) and can be set from the command line: --set train.epochs=3
"""

from __future__ import annotations

import torch
from torch import nn

from mpdeploy.config import DataConfig, Pipeline, TrainConfig
from mpdeploy.train.data import load_digits
from mpdeploy.train.splits import Splits


class Network(nn.Module):
    """image [n, 1, 8, 8] -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


def load(config: DataConfig) -> Splits:
    """Disjoint samples: train, early_stopping, calibration, gate. Yours may read config.folder."""
    return load_digits(config)


def pipeline() -> Pipeline:
    """The choices."""
    return Pipeline(
        name="{name}",
        data=DataConfig(load=load),
        train=TrainConfig(model=Network, epochs=8, precision="auto"),
    )
'''


def init(target: str) -> Path:
    """Write a pipeline file for NAME (or PATH/NAME.py) and return its path.

    Raises:
        UsageError: the name cannot name a module, or the file is there already.
    """
    path = Path(target if target.endswith(".py") else f"{target}.py")
    name = path.stem
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or keyword.iskeyword(name):
        raise UsageError(
            f"'{name}' cannot name a pipeline.", hint="use letters, digits and underscores, for example my_model"
        )
    if path.exists():
        raise UsageError(f"{path} is there already.", hint="give another name; nothing was changed")
    write_text(path, _TEMPLATE.format(name=name, file=path))
    return path
