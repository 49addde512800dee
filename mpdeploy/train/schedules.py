"""The learning rate over the optimiser steps that were taken."""

from __future__ import annotations

import math
from typing import Any

import torch

from mpdeploy.config import TrainConfig

ONE_CYCLE_RISE = 0.3
"""Share of the steps over which one_cycle rises, from 1/25 of the peak; it falls to 1/10,000 of where it began."""


def rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate's factor after `step` of `total` steps, between 0 and 1."""
    if config.warmup_steps and step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    start = config.warmup_steps
    share = min((step - start) / max(total - start, 1), 1.0)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    if config.schedule == "exponential":
        return float(config.decay_to**share)
    if share < ONE_CYCLE_RISE:
        return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * share / ONE_CYCLE_RISE))
    low = 1 / 250_000
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * (share - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE)))


class LearningRate:
    """Sets the optimiser's learning rate; `advance` is called for steps that were taken, and for no skipped one."""

    def __init__(self, config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        self.config = config
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.taken = 0
        self._set()

    @property
    def value(self) -> float:
        """The rate of the next step."""
        return self.config.learning_rate * rate(self.config, self.taken, self.total_steps)

    def advance(self) -> None:
        """Count a step that was taken."""
        self.taken += 1
        self._set()

    def _set(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.value

    def state_dict(self) -> dict[str, Any]:
        """Steps taken."""
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.taken = state["taken"]
        self._set()
