"""The section `train.pruning`: which weights of the trained model become zero."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mpdeploy.config.section import Section


class PruningConfig(Section):
    """Magnitude pruning of the trained model, gradual, with fine-tuning in the same precision; the pruned model ships.

    It is measured against the model before pruning (`dense` in the stage's report), and every gate compares it with the FP32 reference,
    which is not pruned.
    """

    method: Literal["off", "unstructured", "channels", "2:4"] = "off"
    """`unstructured`: the smallest weights of each layer. `channels`: whole output channels, set to zero (shapes stay). `2:4`: two of
    each four neighbouring input channels, the pattern that sparse tensor cores skip; TensorRT builds with `sparse_weights` then."""
    sparsity: float = Field(0.5, gt=0, lt=1)
    """Share of each layer's weights (or channels) that is zero in the end; 0.5 by its nature for `2:4`."""
    epochs: int = Field(10, ge=1)
    """Epochs of fine-tuning."""
    ramp: float = Field(0.5, ge=0, lt=1)
    """Share of the fine-tuning over which sparsity rises, by a cubic curve (fast first); the rest trains with fixed zeros."""
    update_every: int = Field(10, ge=1)
    """Steps between two looks at which weights are the smallest, while sparsity rises."""
    learning_rate_share: float = Field(0.3, gt=0, le=1)
    """Peak learning rate of the fine-tuning, as a share of `train.learning_rate`."""
    dense: tuple[str, ...] = ()
    """Modules that stay dense: names or globs, as in `model.named_modules()`."""

    @model_validator(mode="after")
    def _half_by_nature(self) -> Self:
        if self.method == "2:4" and self.sparsity != 0.5:
            raise ValueError(f"2:4 zeroes half of the weights: sparsity is 0.5, found {self.sparsity}")
        return self
