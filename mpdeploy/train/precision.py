"""Which precision to train in: what was asked for, checked against the device, or the faster one where `auto` was asked for."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mpdeploy.config import TrainConfig
from mpdeploy.errors import UnavailableError

CHOICE_STEPS = 6
"""Timed steps for each candidate under `auto` on a CPU."""
CHOICE_MARGIN = 0.03
"""BF16 must be faster by this share to be chosen: `auto` must not be slower than FP32."""


@dataclass(frozen=True, slots=True)
class PrecisionChoice:
    """What training runs in, and why.

    Attributes:
        precision: `fp32`, `tf32`, `bf16` or `fp16`.
        device: `cpu` or `cuda`.
        reason: in words.
        step_ms: precision -> median time of a step, where candidates were timed.
    """

    precision: str
    device: str
    reason: str
    step_ms: dict[str, float]

    @property
    def dtype(self) -> torch.dtype | None:
        """Autocast's type, or None for FP32 and TF32."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)

    @property
    def scales_loss(self) -> bool:
        """FP16 has a narrow range: its gradients need a loss scale. BF16 has FP32's range and needs none."""
        return self.precision == "fp16"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"precision": self.precision, "device": self.device, "reason": self.reason, "step_ms": self.step_ms}


def pick_device(config: TrainConfig) -> str:
    """`cpu` or `cuda`.

    Raises:
        UnavailableError: CUDA was asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(
            "train.device is 'cuda' and torch sees no CUDA device.",
            hint="mpdeploy doctor says why; or --set train.device=cpu",
        )
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def choose_precision(config: TrainConfig, device: str, run_step: Callable[[str], None]) -> PrecisionChoice:
    """Decide the precision; `run_step(precision)` runs one forward and backward pass on throw-away weights.

    Raises:
        UnavailableError: TF32 was asked for on a CPU.
    """
    asked = config.precision
    if device == "cpu" and config.cpu_precision is not None:
        asked = config.cpu_precision
    if asked == "tf32" and device == "cpu":
        raise UnavailableError(
            "TF32 is a mode of NVIDIA tensor cores; this is a CPU.", hint="--set train.cpu_precision=bf16"
        )
    if asked != "auto":
        where = "train.cpu_precision" if device == "cpu" and config.cpu_precision is not None else "train.precision"
        return PrecisionChoice(asked, device, f"{where} says so", {})
    if device == "cuda":
        return PrecisionChoice("fp16", device, "auto on CUDA: fp16 with dynamic loss scaling", {})
    step_ms = {name: _median_step_ms(lambda name=name: run_step(name)) for name in ("fp32", "bf16")}  # type: ignore[misc]
    faster = step_ms["bf16"] < step_ms["fp32"] * (1 - CHOICE_MARGIN)
    chosen = "bf16" if faster else "fp32"
    reason = (
        f"auto on a CPU: a step takes {step_ms['bf16']:.3g} ms in bf16 and {step_ms['fp32']:.3g} ms in fp32 "
        f"(median of {CHOICE_STEPS})"
    )
    return PrecisionChoice(chosen, device, reason, {name: round(value, 3) for name, value in step_ms.items()})


def _median_step_ms(step: Callable[[], None]) -> float:
    step()
    times = []
    for _ in range(CHOICE_STEPS):
        begin = time.perf_counter()
        step()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


@contextlib.contextmanager
def autocast(choice: PrecisionChoice) -> Iterator[None]:
    """The forward pass's context: autocast for the half precisions, TF32 on or off for the others."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if choice.precision == "tf32" else "highest")
    try:
        with torch.autocast(choice.device, dtype=choice.dtype, enabled=choice.dtype is not None):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
