"""The section `train`: how the network is trained (stage 10-train), and its parts: `--set train.monitor.tensorboard=true`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mpdeploy.config.parallel import ParallelConfig
from mpdeploy.config.parity import ParityConfig
from mpdeploy.config.pruning import PruningConfig
from mpdeploy.config.section import Section, UserFunction

TrainPrecision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]


class LossScale(Section):
    """The factor that lifts FP16 gradients above its smallest number. All three of its numbers act under fp16 alone."""

    initial: float = Field(65536.0, gt=0)
    """First factor (dynamic), or the factor of every step (static). A power of two: it then changes no digit."""
    growth_interval: int = Field(2000, ge=1)
    """Dynamic: double it after so many steps without an overflow. An overflow halves it and skips the step."""

    @model_validator(mode="after")
    def _power_of_two(self) -> Self:
        numerator, denominator = self.initial.as_integer_ratio()
        if numerator & (numerator - 1) or denominator & (denominator - 1):
            raise ValueError(f"a loss scale is a power of two, so that scaling rounds nothing; found {self.initial}")
        return self


class PrecisionSchedule(Section):
    """Precision over time: a start in FP32, and what to do when FP16 does not hold. Has no effect where training is in FP32."""

    fp32_steps: int = Field(0, ge=0)
    """Take so many optimiser steps in FP32 before the half precision begins."""
    fp32_until_settled: bool = False
    """Stay in FP32 until the loss settles: the mean of the last `settle_window` losses is no more than `settle_drop` (as a share)
    below the mean of the `settle_window` before them. First looked at after two windows (and after `fp32_steps`)."""
    settle_window: int = Field(50, ge=2)
    """Steps in each of the two windows that are compared."""
    settle_drop: float = Field(0.01, ge=0, lt=1)
    """The loss has settled when it drops by no more than this share from one window to the next."""
    fallback: bool = True
    """Leave fp16 after `fallback_skips` skipped steps in a row or a loss scale below 1: for bf16 where the device computes in it, else fp32."""
    fallback_skips: int = Field(20, ge=1)
    """Skipped steps in a row that are too many. From a scale of 65,536 the 17th brings it below 1."""


class GradientThreshold(Section):
    """Replace gradients of small magnitude. Off by default, and it rarely helps: loss scaling already keeps small gradients from vanishing.

    Adam divides by the gradient's own size, so small gradients are not noise to it. Compared is |g|: `if g < threshold: g = 0` would
    delete every negative gradient. It acts on unscaled gradients, before clipping.
    """

    kind: Literal["off", "absolute", "relative", "quantile"] = "off"
    """`absolute`: below `value`. `relative`: below `value` times its tensor's largest. `quantile`: the smallest share `value` of each tensor."""
    value: float = Field(0.0, ge=0)
    """See `kind`."""
    constant: float = Field(0.0, ge=0)
    """The magnitude that such a gradient gets, its sign kept; 0 deletes it."""

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        if self.kind in ("relative", "quantile") and self.value >= 1:
            raise ValueError(f"a {self.kind} threshold is a share below 1, found {self.value}")
        return self


class Average(Section):
    """An exponential moving average of the weights."""

    decay: float | None = Field(None, gt=0, lt=1)
    """Weight of the old average at each step taken, for example 0.999. None keeps no average."""
    ships: bool = True
    """The average is what is evaluated, stopped by and shipped. False: it is evaluated beside the weights, which ship."""


class HealthConfig(Section):
    """How closely numbers are watched. Loss, loss scale, skips and gradient norm are kept at every step, whatever is chosen here."""

    first_step: int = Field(16, ge=0)
    """The step that is looked at first: a dynamic loss scale has come down by then."""
    sample_every: int = Field(100, ge=0)
    """Every so many steps: exponents of activations and gradients and the largest magnitude of each leaf module. 0: never."""
    shadow_every: int = Field(500, ge=0)
    """Every so many steps of half training: the same gradients in FP32, which show what FP16 flushes to zero. 0: never."""
    saved_bytes: bool = True
    """Measure, on the first step, how many bytes of activations are kept for backward."""
    replay: bool = True
    """After a NaN: run the saved batch again to name the module that made it. Keeps the last batch alive."""


class MonitorConfig(Section):
    """Where the numbers of each step go. A change here trains nothing anew."""

    step_log: bool = True
    """Write `log.*.jsonl` into the stage's folder: one line a step."""
    tensorboard: bool = False
    """Write TensorBoard events into `tensorboard/` in the stage's folder."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: `offline` writes into the stage's folder and needs no account."""
    wandb_project: str = "mpdeploy"
    """Its project."""
    profile_steps: int = Field(0, ge=0)
    """Trace so many steps with torch.profiler into `trace.*.json` (open in ui.perfetto.dev), after five steps of warm-up."""


class TrainConfig(Section):
    """How the network is trained (stage 10-train)."""

    model: UserFunction
    """`model() -> torch.nn.Module`, freshly initialised. Called with torch's seed set, and with the dataset's inputs in their order."""
    loss: UserFunction | None = None
    """`loss(outputs, labels) -> scalar tensor`, a mean over samples; cross entropy where None."""
    augment: UserFunction | None = None
    """`augment(inputs, generator) -> inputs`, on training batches only; `generator` is a torch.Generator. `inputs` is a tensor where the
    model has one input, else a dict by name."""
    epochs: int = Field(20, ge=1)
    """Passes over the training samples."""
    batch_size: int = Field(64, ge=1)
    """Samples a step, over all ranks and micro-batches."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches a step: each batch is split into so many, whose gradients add up to those of the whole batch."""
    evaluation_batch_size: int = Field(256, ge=1)
    """Samples a forward pass in evaluation."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(1e-2, ge=0)
    """Weight decay: decoupled in AdamW, L2 in SGD."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with `momentum`."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD."""
    fused: Literal["auto", "on", "off"] = "auto"
    """One kernel for the whole update. `auto`: on CUDA."""
    schedule: Literal["constant", "cosine", "exponential", "one_cycle"] = "one_cycle"
    """Learning rate over optimiser steps that were really taken: a step skipped by the loss scaler does not advance it."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate first rises from near 0 to its peak. one_cycle has a warm-up of its own."""
    decay_to: float = Field(0.01, gt=0, le=1)
    """Share of the peak that `exponential` ends at."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the global norm of the unscaled gradients to this; None does not clip."""
    gradient_threshold: GradientThreshold = GradientThreshold()
    """Replace gradients of small magnitude (off)."""
    precision: TrainPrecision = "auto"
    """Autocast precision. `auto`: fp16 with a loss scaler on CUDA; on a CPU the faster of fp32 and bf16, timed before step 1."""
    cpu_precision: TrainPrecision | None = None
    """What to use instead of `precision` where training runs on a CPU."""
    fp32_modules: tuple[str, ...] = ()
    """Modules that stay FP32 in half training: names or globs over them, as in `model.named_modules()`. Conversion keeps their nodes."""
    precision_schedule: PrecisionSchedule = PrecisionSchedule()
    """Precision over time."""
    loss_scaling: Literal["dynamic", "static", "none"] = "dynamic"
    """Loss scaling under fp16. `none` exists to show what goes wrong without it."""
    loss_scale: LossScale = LossScale()
    """The scale's numbers."""
    checkpoint_modules: tuple[str, ...] = ()
    """Activation checkpointing: modules (names or globs) whose inner activations are computed again in backward instead of kept."""
    compile: str | None = None
    """torch.compile with this backend, for example `inductor`. None: eager."""
    average: Average = Average()
    """A moving average of the weights (none)."""
    reference: bool = True
    """Also train in FP32 with the same seed, order and initial weights, to compare with. A large model cannot afford it."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many epochs without a better early-stopping loss; None trains all epochs."""
    ship: Literal["auto", "last", "best"] = "auto"
    """Which weights ship: the last, or those of the epoch with the best early-stopping loss. `auto`: best where early stopping is on."""
    evaluate_in: Literal["training", "fp32"] = "training"
    """Precision of the evaluation after each epoch: the one that training is in, or FP32."""
    checkpoint_every_epochs: int = Field(1, ge=1)
    """How often the full state is written, so that a killed run resumes from there."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Also write it after every so many steps, within an epoch too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    channels_last: bool = False
    """Lay out images as NHWC in memory: faster convolutions in bf16 and fp16."""
    prefetch: int | None = Field(None, ge=0)
    """Batches that a thread makes ready ahead of the step. None: 2 on CUDA, 0 on a CPU, where it would take cores from the step."""
    health: HealthConfig = HealthConfig()
    """How closely numbers are watched."""
    monitor: MonitorConfig = MonitorConfig()
    """Where the numbers of each step go."""
    parallel: ParallelConfig = ParallelConfig()
    """How training is spread over the ranks that torchrun starts."""
    parity: ParityConfig = ParityConfig()
    """How far "AMP equals FP32" is proven."""
    pruning: PruningConfig = PruningConfig()
    """Which weights become zero (none)."""
    seed: int = 0
    """Initial weights, order of samples and augmentation."""

    @property
    def ships_best(self) -> bool:
        """Whether the best epoch's weights ship, not the last one's."""
        return self.ship == "best" or (self.ship == "auto" and self.early_stopping_patience is not None)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.warmup_steps and self.schedule == "one_cycle":
            raise ValueError("one_cycle has a warm-up of its own: leave warmup_steps at 0 or choose another schedule")
        return self
