"""The section `train`: how the network is trained (stage 10-train)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mpdeploy.config.section import Section, UserFunction

TrainPrecision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]


class TrainConfig(Section):
    """How the network is trained (stage 10-train)."""

    model: UserFunction
    """`model() -> torch.nn.Module`, freshly initialised. Called with torch's seed set."""
    loss: UserFunction | None = None
    """`loss(outputs, labels) -> scalar tensor`; cross entropy where None."""
    augment: UserFunction | None = None
    """`augment(inputs, generator) -> inputs`, on training batches only; `generator` is a torch.Generator."""
    epochs: int = Field(20, ge=1)
    """Passes over the training samples."""
    batch_size: int = Field(64, ge=1)
    """Samples a step."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(1e-2, ge=0)
    """Decoupled weight decay of AdamW."""
    schedule: Literal["constant", "cosine", "one_cycle"] = "one_cycle"
    """Learning rate over optimiser steps that were really taken: a step skipped by the loss scaler does not advance it."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the global norm of the unscaled gradients to this; None does not clip."""
    precision: TrainPrecision = "auto"
    """Autocast precision. `auto`: fp16 with a loss scaler on CUDA; on a CPU the faster of fp32 and bf16, timed before step 1."""
    cpu_precision: TrainPrecision | None = None
    """What to use instead of `precision` where training runs on a CPU."""
    loss_scaling: Literal["dynamic", "none"] = "dynamic"
    """Loss scaling under fp16. `none` exists to show what goes wrong without it."""
    reference: bool = True
    """Also train in FP32 with the same seed, order and initial weights, to compare with. A large model cannot afford it."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many epochs without a better early-stopping loss; None trains all epochs."""
    checkpoint_every_epochs: int = Field(1, ge=1)
    """How often the full state is written, so that a killed run resumes from there."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    channels_last: bool = False
    """Lay out images as NHWC in memory: faster convolutions in bf16 and fp16."""
    seed: int = 0
    """Initial weights, order of samples and augmentation."""
