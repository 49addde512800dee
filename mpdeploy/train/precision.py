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
        reason = (
            "auto on CUDA: fp16 with dynamic loss scaling, since the engines that ship compute in fp16 and training then sees "
            "their range; bf16 is as fast and needs no scaler, but would hide what exceeds 65504"
        )
        return PrecisionChoice("fp16", device, reason, {})
    step_ms = _median_step_ms(("fp32", "bf16"), run_step)
    faster = step_ms["bf16"] < step_ms["fp32"] * (1 - CHOICE_MARGIN)
    chosen = "bf16" if faster else "fp32"
    reason = (
        f"auto on a CPU: a step takes {step_ms['bf16']:.3g} ms in bf16 and {step_ms['fp32']:.3g} ms in fp32 "
        f"(medians of {CHOICE_STEPS}, in turns)"
    )
    return PrecisionChoice(chosen, device, reason, {name: round(value, 3) for name, value in step_ms.items()})


def _median_step_ms(names: tuple[str, ...], run_step: Callable[[str], None]) -> dict[str, float]:
    """Median time of a step in each precision, taken in turns: what else the machine does slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        run_step(name)
    for _ in range(CHOICE_STEPS):
        for name in names:
            begin = time.perf_counter()
            run_step(name)
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


@contextlib.contextmanager
def float32_arithmetic(choice: PrecisionChoice) -> Iterator[None]:
    """How FP32 tensors are multiplied within the block, forward and backward: in TF32 where that was chosen, else in FP32.

    The default of cuDNN's convolutions is TF32, whatever is said about matrix products.
    """
    tf32 = choice.precision == "tf32"
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def autocast(choice: PrecisionChoice) -> Iterator[None]:
    """The forward pass's context: autocast for the half precisions, and `float32_arithmetic`."""
    with (
        float32_arithmetic(choice),
        torch.autocast(choice.device, dtype=choice.dtype, enabled=choice.dtype is not None),
    ):
        yield
