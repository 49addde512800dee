"""Precision over time: FP32 first where that was asked for, then the half precision, and out of FP16 where it does not hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mpdeploy.config import TrainConfig
from mpdeploy.train.precision import PrecisionChoice


def computes_bf16(device: str) -> bool:
    """Whether the device multiplies BF16 itself: emulation is slower than FP32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PrecisionOverTime:
    """Which precision the next step runs in; it is told how each step went.

    Attributes:
        current: the precision of the next step.
        events: one dict a change: `step` (steps done before it), `from`, `to`, `reason`.
    """

    def __init__(self, config: TrainConfig, choice: PrecisionChoice) -> None:
        self.rules = config.precision_schedule
        self.target = choice
        self.current = choice
        self.events: list[dict[str, Any]] = []
        self._losses: list[float] = []
        self._skipped_in_a_row = 0
        waits = self.rules.fp32_steps > 0 or self.rules.fp32_until_settled
        if waits and choice.dtype is not None:
            self.current = replace(choice, precision="fp32", reason="the precision schedule starts in FP32")

    def after_step(self, step: int, loss: float, skipped: bool, scale: float | None) -> dict[str, Any] | None:
        """Say how a step went.

        Args:
            step: steps done, this one included.
            loss: its mean loss.
            skipped: whether the scaler skipped it.
            scale: the loss scale after it; None where no loss is scaled.

        Returns:
            The event, where the next step runs in another precision.
        """
        if self.current.precision != self.target.precision and self.current.reason.startswith("the precision schedule"):
            self._losses.append(loss)
            reason = self._start_of_half(step)
            return self._change(step, self.target, reason) if reason else None
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self.current.precision != "fp16" or scale is None or not self.rules.fallback:
            return None
        if self._skipped_in_a_row >= self.rules.fallback_skips:
            reason = f"{self._skipped_in_a_row} skipped steps in a row"
        elif scale < 1:
            reason = f"the loss scale fell to {scale:g}: gradients overflow FP16 unscaled"
        else:
            return None
        refuge = "bf16" if computes_bf16(self.current.device) else "fp32"
        self.target = replace(self.current, precision=refuge, reason=f"fallback from fp16: {reason}")
        return self._change(step, self.target, reason)

    def _start_of_half(self, step: int) -> str | None:
        """Why half training begins with the next step, or None where it does not yet."""
        rules, window = self.rules, self.rules.settle_window
        if step < rules.fp32_steps:
            return None
        if not rules.fp32_until_settled:
            return f"{step} steps in FP32 are done"
        self._losses = self._losses[-2 * window :]
        if len(self._losses) < 2 * window:
            return None
        earlier, later = sum(self._losses[:window]) / window, sum(self._losses[window:]) / window
        if later < earlier - rules.settle_drop * abs(earlier):
            return None
        return f"the loss settled: {earlier:.4g}, then {later:.4g} over {window} steps each"

    def _change(self, step: int, to: PrecisionChoice, reason: str) -> dict[str, Any]:
        event = {"step": step, "from": self.current.precision, "to": to.precision, "reason": reason}
        self.events.append(event)
        self.current = to
        self._losses = []
        return event

    def state_dict(self) -> dict[str, Any]:
        """All that decides what comes next."""
        return {
            "target": self.target.to_json(),
            "current": self.current.to_json(),
            "events": list(self.events),
            "losses": list(self._losses),
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.target, self.current = PrecisionChoice(**state["target"]), PrecisionChoice(**state["current"])
        self.events, self._losses = list(state["events"]), list(state["losses"])
        self._skipped_in_a_row = state["skipped_in_a_row"]
