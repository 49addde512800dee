"""What a training leaves: the model, and every number that was seen on the way."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn


@dataclass
class TrainingRun:
    """One training, AMP or FP32.

    Attributes:
        model: on its device, with the weights that ship.
        history: one dict an epoch: loss, early-stopping loss and score, learning rate, loss scale, skipped steps, precision, seconds.
        step_ms: time of each optimiser step, warm-up included; on CUDA from GPU events.
        gradient_norms: global norm of the unscaled gradients of each step, before clipping; not finite where it was skipped.
        loss_scales: the loss scale over time: `[steps done before, scale]` for each change, the first scale included.
        skipped_steps: numbers (from 1) of the steps that the loss scaler skipped.
        precision_events: changes of precision: `step`, `from`, `to`, `reason`.
        fp32_modules: modules that stayed FP32 in half training.
        memory: bytes: `saved_activations` (kept for backward in one step), `rss_peak`, `cuda_peak_allocated`, ...
        health: what was seen of activations and gradients (see `Watch.to_json`).
        best_epoch: the epoch with the best early-stopping loss, from 1.
        shipped: `last` or `best`: which weights the model holds.
        averaged: whether these are a moving average.
    """

    model: nn.Module
    history: list[dict[str, Any]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    loss_scales: list[tuple[int, float]] = field(default_factory=list)
    skipped_steps: list[int] = field(default_factory=list)
    precision_events: list[dict[str, Any]] = field(default_factory=list)
    fp32_modules: list[str] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)
    best_epoch: int | None = None
    shipped: str = "last"
    averaged: bool = False

    @property
    def num_skipped(self) -> int:
        """Steps the loss scaler skipped."""
        return int(sum(epoch["num_skipped"] for epoch in self.history))

    def note_scale(self, step: int, scale: float) -> None:
        """Note the scale of the step after `step` others, where it changed."""
        if not self.loss_scales or self.loss_scales[-1][1] != scale:
            self.loss_scales.append((step, scale))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model, and what the run keeps elsewhere until its end."""
        kept_elsewhere = ("model", "health", "precision_events", "fp32_modules", "shipped", "averaged")
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in kept_elsewhere}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON for the stage's report; of step times and gradient norms the median."""
        finite = [value for value in self.gradient_norms if math.isfinite(value)]
        return {
            "history": self.history,
            "step_ms": round(statistics.median(self.step_ms), 4) if self.step_ms else None,
            "num_steps": len(self.step_ms),
            "num_skipped": self.num_skipped,
            "skipped_steps": self.skipped_steps,
            "gradient_norm": {"median": statistics.median(finite), "largest": max(finite)} if finite else None,
            "loss_scales": [list(item) for item in self.loss_scales],
            "precision_events": self.precision_events,
            "fp32_modules": self.fp32_modules,
            "memory": self.memory,
            "health": self.health,
            "best_epoch": self.best_epoch,
            "shipped": self.shipped,
            "averaged": self.averaged,
        }
