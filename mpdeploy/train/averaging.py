"""An exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class MovingAverage:
    """A second model whose weights follow those of the first; buffers (BatchNorm's statistics) are copied.

    The first step taken sets the average to the weights; each later one moves it by `1 - decay` of the way.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        for parameter in self._averaged.parameters():
            parameter.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The model that holds the average."""
        return self._averaged.module

    def update(self, model: nn.Module) -> None:
        """Follow `model` after a step that was taken."""
        self._averaged.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """Weights and the number of steps."""
        return dict(self._averaged.state_dict())

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Go on from what `state_dict` returned; where not `strict`, from a part of it."""
        self._averaged.load_state_dict(state, strict=strict)
