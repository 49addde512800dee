"""One step of training: autocast forward and backward, FP32 weights and updates.

Order: scale the loss, backward, unscale, clip, step, update the scale. A step the scaler skipped is one after which the scale dropped;
the learning-rate schedule does not advance on it, and the moving average does not see it.

A step has two halves. `launch` hands its work to the device and reads nothing. `settle` reads what the device found, and decides: the
learning rate, the average, the precision. On a CPU one follows the other. On a GPU a step is settled after the next one's backward is
launched and before its update, so that the device never runs out of work and the next update has the right learning rate.

On several ranks each takes its share of the batch. Loss and gradients are summed before anything is decided by them, so that every rank
decides alike.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpdeploy.config import TrainConfig
from mpdeploy.config.training import HealthConfig
from mpdeploy.errors import TrainingDivergedError
from mpdeploy.train import sharded
from mpdeploy.train.averaging import MovingAverage
from mpdeploy.train.feeding import Batch
from mpdeploy.train.health import Watch
from mpdeploy.train.memory import SavedBytes
from mpdeploy.train.modules import answer, eager_backward_precision, loss_of, make_model, prepared, runnable
from mpdeploy.train.optimizers import apply_threshold, current_scale, make_optimizer, make_scaler, take_step
from mpdeploy.train.precision import PrecisionChoice, autocast, float32_arithmetic
from mpdeploy.train.precision_schedule import PrecisionOverTime
from mpdeploy.train.ranks import ALONE, Ranks
from mpdeploy.train.readings import Reading
from mpdeploy.train.replay import first_not_finite
from mpdeploy.train.schedules import LearningRate
from mpdeploy.train.shadow import Draws, draws
from mpdeploy.train.wrapping import adding_up, check, gradient_norm, replicated, split, synced_batchnorm
from mpdeploy.user_code import user_call


@dataclass(frozen=True)
class Launched:
    """A step that the device works on, and what it takes to run it again. `step` counts from 0."""

    step: int
    batch: Batch
    choice: PrecisionChoice
    scaled: bool
    draws: Draws
    learning_rate: float
    reading: Reading


@dataclass(frozen=True)
class Settled:
    """A step whose numbers are known.

    Attributes:
        step: steps done, this one included.
        batch: its samples.
        row: what is logged of it: loss, learning rate, loss scale, gradient norm, ...
        event: set where the next step runs in another precision: `step`, `from`, `to`, `reason`.
    """

    step: int
    batch: Batch
    row: dict[str, Any]
    event: dict[str, Any] | None


class Stepper:
    """The model, and all that changes with a step."""

    def __init__(self, config: TrainConfig, choice: PrecisionChoice, num_batches: int, ranks: Ranks = ALONE) -> None:
        check(config, choice, ranks)
        self.config = config
        self.ranks = ranks
        self.device = choice.device
        self.num_batches = num_batches
        self.model = synced_batchnorm(make_model(config, self.device), config, ranks)
        self.average = None if config.average.decay is None else MovingAverage(self.model, config.average.decay)
        for model in (self.model, *(() if self.average is None else (self.average.model,))):
            split(model, config, choice, ranks)
        self.whole = replicated(self.model, config, ranks)
        self.runnable = runnable(self.whole, config)
        self.loss = loss_of(config)
        self.optimizer = make_optimizer(config, self.model, self.device)
        self.rate = LearningRate(config, self.optimizer, num_batches * config.epochs)
        self.precision = PrecisionOverTime(config, choice)
        self.scaler = make_scaler(config, self.precision.current)
        health = config.health
        if self.is_split:  # a second backward through gathered weights is not possible
            health = HealthConfig(sample_every=0, shadow_every=0, saved_bytes=False, replay=False)
        self.health = health
        self.watch = Watch(health, self.model, self.loss, self.device)
        self.saved_activations: int | None = None
        self._launched: Launched | None = None

    @property
    def is_split(self) -> bool:
        """Whether each rank holds a part of the model only (FSDP2), whose half precision is not autocast's."""
        return self.ranks.mesh is not None

    def autocasts(self, choice: PrecisionChoice) -> PrecisionChoice:
        """What autocast is to do where the step runs in `choice`: nothing where the split model casts by itself."""
        return replace(choice, precision="fp32") if self.is_split and choice.dtype is not None else choice

    @property
    def ships(self) -> nn.Module:
        """The model whose weights are evaluated, stopped by and shipped."""
        return self.average.model if self.average is not None and self.config.average.ships else self.model

    @contextlib.contextmanager
    def ready(self) -> Iterator[list[str]]:
        """Within the block the model can be stepped; yields the names of modules that stay FP32."""
        with contextlib.ExitStack() as stack:
            in_fp32 = stack.enter_context(prepared(self.model, self.config))
            if self.average is not None:
                stack.enter_context(prepared(self.average.model, self.config))
            stack.enter_context(eager_backward_precision(self.config))
            yield in_fp32

    def launch(self, step: int, batch: Batch) -> Settled | None:
        """Forward, backward and update of one step, counted from 0; nothing of it is read.

        Returns:
            The step before, where it was not settled yet.
        """
        choice, scaler = self.precision.current, self.scaler  # the step before, settled below, may change both
        reading, before = Reading(self.device), draws(self.device)
        micro_batches = list(batch.micro_batches(self.config.accumulation))
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        with self.watch.forward(step), float32_arithmetic(choice):
            for number, (inputs, labels) in enumerate(micro_batches, start=1):
                share = len(labels) / batch.num_global if batch.counts else 0.0  # a smaller micro-batch counts less
                with adding_up(self.whole, is_last=number == len(micro_batches)):
                    loss += self._forward_backward(step, inputs, labels, share, choice, scaler)
        self.ranks.add(loss)
        settled = self.settle()
        scale = current_scale(scaler, self.device)
        norm = self._ready_gradients(scaler)
        self.watch.backward(step, choice, scale, micro_batches, before, is_whole=self.ranks.data_size == 1)
        learning_rate = self.rate.value
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        skipped = take_step(scaler, self.optimizer, finite, self.config)
        reading.take([loss, norm, scale, current_scale(scaler, self.device), skipped])
        self._launched = Launched(step, batch, choice, scaler.is_enabled(), before, learning_rate, reading)
        return settled

    def _forward_backward(
        self,
        step: int,
        inputs: tuple[torch.Tensor, ...],
        labels: torch.Tensor,
        share: float,
        choice: PrecisionChoice,
        scaler: torch.amp.GradScaler,
    ) -> torch.Tensor:
        """The share of the step's loss that one micro-batch has; its gradients are added to `.grad`.

        Gradients are averaged over the ranks, and are to be summed: the loss is multiplied by their number before.
        """
        model = self.whole if self.watch.samples(step) else self.runnable  # compiled modules call no hooks
        measures = self.health.saved_bytes and self.saved_activations is None
        saved = SavedBytes(self.model)
        with saved.measuring() if measures else contextlib.nullcontext():
            with autocast(self.autocasts(choice)):
                outputs = answer(model, inputs)
            loss = user_call(self.loss, outputs, labels) * share
        if measures:
            self.saved_activations = saved.num_bytes
        scaler.scale(loss * self.ranks.data_size).backward()
        return loss.detach()

    def _ready_gradients(self, scaler: torch.amp.GradScaler) -> torch.Tensor:
        """Unscale gradients, then apply what acts on their true size; returns their global norm before clipping."""
        scaler.unscale_(self.optimizer)
        if self.is_split and scaler.is_enabled():  # each rank saw its parts alone, and all must skip alike
            self.ranks.largest(*scaler._found_inf_per_device(self.optimizer).values())
        apply_threshold(self.model, self.config.gradient_threshold)
        return gradient_norm(self.model.parameters(), self.config.max_grad_norm, self.ranks)

    def settle(self) -> Settled | None:
        """Read what the last launched step found, and decide what follows from it; None where none is launched.

        Raises:
            TrainingDivergedError: its loss is not finite, or a gradient that no loss scaler looks after.
        """
        launched, self._launched = self._launched, None
        if launched is None:
            return None
        loss, norm, scale, new_scale, was_skipped = launched.reading.values()
        if not math.isfinite(loss) or not (math.isfinite(norm) or launched.scaled):
            raise self._diverged(launched, loss, norm, scale)
        step, skipped = launched.step + 1, bool(was_skipped)
        if not skipped:
            self.rate.advance()
            if self.average is not None:
                self.average.update(self.model)
        event = self.precision.after_step(step, loss, skipped, new_scale if launched.scaled else None)
        if event is not None and self.is_split:
            raise TrainingDivergedError(
                f"FP16 does not hold in step {step}: {event['reason']}. FSDP2 cannot change the precision of a training under way.",
                hint="--set train.precision=bf16",
            )
        if event is not None:
            self.scaler = make_scaler(self.config, self.precision.current)
        row = {
            "step": step,
            "epoch": launched.step // self.num_batches + 1,
            "loss": loss,
            "learning_rate": launched.learning_rate,
            "loss_scale": scale,
            "gradient_norm": norm,
            "skipped": skipped,
            "step_ms": round(launched.reading.milliseconds, 4),
            "precision": launched.choice.precision,
        }
        return Settled(step, launched.batch, row, event)

    def _diverged(self, launched: Launched, loss: float, norm: float, scale: float) -> TrainingDivergedError:
        what = f"loss became {loss}" if not math.isfinite(loss) else f"gradient norm became {norm}"
        epoch, number = divmod(launched.step, self.num_batches)
        cause = ""
        if self.health.replay:
            parts = list(launched.batch.micro_batches(self.config.accumulation))
            found = first_not_finite(self.model, parts, self.loss, launched.choice, scale, launched.draws)
            everywhere = self.ranks.from_first(self.ranks.all_of(found))
            found = next((text for text in everywhere if not text.startswith("nothing")), found)
            cause = f" First not finite, when the step was run again: {found}."
        return TrainingDivergedError(
            f"The {what} in epoch {epoch + 1}, step {number + 1} ({launched.choice.precision}).{cause}",
            hint="lower train.learning_rate, or train in another precision (--set train.precision=fp32); "
            "the state that was saved last is kept",
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on. Nothing may be launched. Of a split model, all but `save_parts`."""
        assert self._launched is None
        averaged = None if self.average is None else self.average.state_dict()
        tensors = {"model": self.model.state_dict(), "average": averaged, "optimizer": self.optimizer.state_dict()}
        if self.is_split:
            tensors = {"average_steps": None if averaged is None else averaged["n_averaged"]}
        return tensors | {
            "schedule": self.rate.state_dict(),
            "precision": self.precision.state_dict(),
            "scaler": self.scaler.state_dict(),
            "watch": self.watch.state_dict(),
            "saved_activations": self.saved_activations,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        if not self.is_split:
            self.model.load_state_dict(state["model"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
        elif self.average is not None:
            self.average.load_state_dict({"n_averaged": state["average_steps"]}, strict=False)
        self.rate.load_state_dict(state["schedule"])
        self.precision.load_state_dict(state["precision"])
        self.scaler = make_scaler(self.config, self.precision.current)
        self.scaler.load_state_dict(state["scaler"])
        self.watch.load_state_dict(state["watch"])
        self.saved_activations = state["saved_activations"]

    def save_parts(self, folder: Path) -> None:
        """Write the tensors of a split model's state, every rank its own."""
        average = None if self.average is None else self.average.model
        sharded.save(self.model, average, self.optimizer, folder, self.ranks)

    def load_parts(self, folder: Path) -> None:
        """Go on from what `save_parts` wrote."""
        sharded.load(self.model, None if self.average is None else self.average.model, self.optimizer, folder)

    def shipped_weights(self) -> dict[str, torch.Tensor]:
        """The weights that ship, whole on rank 0. Every rank calls it."""
        return sharded.gathered(self.ships) if self.is_split else self.ships.state_dict()
