"""Numerical health: whether gradients survive the precision they are computed in, and how large activations grow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpdeploy.config.training import HealthConfig
from mpdeploy.train.exponents import ExponentHistograms
from mpdeploy.train.modules import leaves
from mpdeploy.train.precision import PrecisionChoice
from mpdeploy.train.shadow import Draws, Loss, lost_share, shadow_backward, underflow_window


@dataclass(frozen=True)
class GradientParity:
    """FP32 and AMP gradients on the same batch and weights.

    Attributes:
        excess_zeros: parameter -> share of its gradients that are exactly zero under AMP, less that share in FP32.
        cosines: parameter -> cosine between the two gradients.
    """

    excess_zeros: dict[str, float]
    cosines: dict[str, float]

    @property
    def worst_excess_zeros(self) -> float:
        """Of the worst parameter: underflow shows here and nowhere else (no NaN, no skipped step)."""
        return max(self.excess_zeros.values(), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: the worst of each, and all of them."""
        return {
            "worst_excess_zeros": self.worst_excess_zeros,
            "worst_cosine": min(self.cosines.values(), default=1.0),
            "excess_zeros": self.excess_zeros,
            "cosines": self.cosines,
        }


def compare_gradients(reference: dict[str, torch.Tensor], amp: dict[str, torch.Tensor]) -> GradientParity:
    """Compare unscaled gradients by parameter name. A gradient that is not finite has cosine 0 and counts as lost (all zero)."""
    excess, cosines = {}, {}
    for name, expected in reference.items():
        found = amp[name]
        if not bool(torch.isfinite(found).all()):
            excess[name], cosines[name] = 1.0, 0.0
            continue
        excess[name] = float((found == 0).double().mean() - (expected == 0).double().mean())
        norm = float(expected.double().norm() * found.double().norm())
        both_zero = float(expected.norm()) == 0.0 and float(found.norm()) == 0.0
        cosines[name] = (
            1.0 if both_zero else (float((expected.double() * found.double()).sum()) / norm if norm else 0.0)
        )
    return GradientParity(excess, cosines)


class ActivationRanges:
    """The largest magnitude of each leaf module's output, kept on the device while recording; with `histograms`, its exponents too."""

    def __init__(self, histograms: ExponentHistograms | None = None) -> None:
        self.amax: dict[str, torch.Tensor] = {}
        self._histograms = histograms

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record the outputs of every leaf module called within the block."""
        handles = [module.register_forward_hook(self._hook(name)) for name, module in leaves(model) if name]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
                largest = output.detach().abs().amax().float()
                self.amax[name] = torch.maximum(self.amax[name], largest) if name in self.amax else largest
                if self._histograms is not None:
                    self._histograms.add(name, output)

        return record

    def to_json(self) -> dict[str, float]:
        """Module name -> largest magnitude seen. Infinite or NaN values are kept as they are: they are what was seen."""
        return {name: float(value) for name, value in self.amax.items()}


class Watch:
    """Looks closely at some steps: exponents and magnitudes every so many, an FP32 shadow backward now and then.

    Everything stays on the device until `to_json`; a step that is not looked at costs two comparisons.
    """

    def __init__(self, config: HealthConfig, model: nn.Module, loss: Loss, device: str) -> None:
        self.config = config
        self._model, self._loss, self._device = model, loss, device
        self.activations, self.gradients = ExponentHistograms(), ExponentHistograms()
        self.ranges = ActivationRanges(self.activations)
        self.shadows: list[dict[str, Any]] = []
        self.num_sampled = 0

    def samples(self, step: int) -> bool:
        """Whether step `step` (from 0) is sampled."""
        return _is_due(step, self.config.first_step, self.config.sample_every)

    @contextmanager
    def forward(self, step: int) -> Iterator[None]:
        """Record what leaf modules answer within the block, where the step is sampled."""
        if not self.samples(step):
            yield
            return
        self.num_sampled += 1
        with self.ranges.recording(self._model):
            yield

    def backward(
        self,
        step: int,
        choice: PrecisionChoice,
        scale: torch.Tensor,
        micro_batches: list[tuple[tuple[torch.Tensor, ...], torch.Tensor]],
        before: Draws,
        *,
        is_whole: bool = True,
    ) -> None:
        """Look at unscaled gradients, where the step is sampled, and at their FP32 shadow, where one is due.

        Args:
            step: from 0.
            choice: the precision of the step.
            scale: its loss scale.
            micro_batches: the step's samples; the shadow is that of the first of them.
            before: the random numbers it began with.
            is_whole: the micro-batches are the step's whole batch, not one rank's share of it.
        """
        if self.samples(step):
            for name, parameter in self._model.named_parameters():
                if parameter.grad is not None and parameter.grad.numel():
                    self.gradients.add(name, parameter.grad)
        if choice.dtype is None or not _is_due(step, self.config.first_step, self.config.shadow_every):
            return
        inputs, labels = micro_batches[0]
        shadow, largest = shadow_backward(self._model, inputs, labels, self._loss, before, self._device)
        found = {"step": step + 1, "precision": choice.precision, **underflow_window(shadow, largest, float(scale))}
        if is_whole and len(micro_batches) == 1:
            amp = {name: item.grad for name, item in self._model.named_parameters() if item.grad is not None}
            found["lost"] = lost_share(shadow, amp)
        self.shadows.append(found)

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        return {
            "activations": self.activations.counts,
            "gradients": self.gradients.counts,
            "amax": self.ranges.amax,
            "shadows": self.shadows,
            "num_sampled": self.num_sampled,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""

        def here(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: value.to(self._device) for name, value in values.items()}

        self.activations.counts, self.gradients.counts = here(state["activations"]), here(state["gradients"])
        self.ranges.amax = here(state["amax"])
        self.shadows, self.num_sampled = list(state["shadows"]), state["num_sampled"]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: `activation_max` by module, exponent histograms, and one dict a shadow backward."""
        return {
            "num_sampled_steps": self.num_sampled,
            "activation_max": self.ranges.to_json(),
            "activation_exponents": self.activations.to_json(),
            "gradient_exponents": self.gradients.to_json(),
            "shadow_backward": self.shadows,
        }


def _is_due(step: int, first: int, every: int) -> bool:
    return every > 0 and step >= first and (step - first) % every == 0
