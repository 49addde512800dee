"""The training loop: autocast forward and backward, FP32 weights and updates, resumable to the same weights.

Order within a step: scale the loss, backward, unscale, clip, step, update the scale. A step the scaler skipped is one after which the
scale dropped; the learning-rate schedule does not advance on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from mpdeploy.artifact import Dataset
from mpdeploy.config import TrainConfig
from mpdeploy.errors import ConfigError, DataError, TrainingDivergedError
from mpdeploy.train.checkpoint import load_state, save_state
from mpdeploy.train.precision import PrecisionChoice, autocast
from mpdeploy.user_code import user_call

Progress = Callable[[int, int, str], None]
"""Told (steps done, steps in all, text)."""


@dataclass
class TrainingRun:
    """One training, AMP or FP32.

    Attributes:
        model: on its device.
        history: one dict an epoch: loss, early-stopping loss and score, learning rate, loss scale, skipped steps, seconds.
        step_ms: time of each optimiser step, warm-up included.
    """

    model: nn.Module
    history: list[dict[str, float]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    @property
    def num_skipped(self) -> int:
        """Steps the loss scaler skipped."""
        return int(sum(epoch["num_skipped"] for epoch in self.history))


def make_model(config: TrainConfig, device: str) -> nn.Module:
    """The user's model with the configured seed, on its device."""
    torch.manual_seed(config.seed)
    model = user_call(config.model)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"train.model() returned {type(model).__name__}, expected torch.nn.Module.")
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def loss_of(config: TrainConfig) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The user's loss, or cross entropy. It is computed outside autocast, on FP32 outputs."""
    return config.loss or nn.functional.cross_entropy


def train(
    config: TrainConfig,
    choice: PrecisionChoice,
    train_set: Dataset,
    stopping_set: Dataset,
    *,
    state_path: Path,
    state_key: str,
    progress: Progress,
) -> TrainingRun:
    """Train, from the last full state at `state_path` where it has the key `state_key`, else from the start.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite.
        UserCodeError: the model, loss or augmentation raised.
    """
    return _Training(config, choice, train_set, stopping_set, state_path, state_key, progress).run()


class _Training:
    def __init__(
        self,
        config: TrainConfig,
        choice: PrecisionChoice,
        train_set: Dataset,
        stopping_set: Dataset,
        state_path: Path,
        state_key: str,
        progress: Progress,
    ) -> None:
        self.config = config
        self.choice = choice
        self.device = choice.device
        self.state_path = state_path
        self.state_key = state_key
        self.progress = progress
        self.inputs, self.labels = _tensors(train_set, self.device)
        self.stopping = _tensors(stopping_set, self.device)
        self.model = make_model(config, self.device)
        self.loss = loss_of(config)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.steps_an_epoch = math.ceil(len(self.labels) / config.batch_size)
        total = self.steps_an_epoch * config.epochs
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _rate(config.schedule, step, total)
        )
        scales = choice.scales_loss and config.loss_scaling == "dynamic"
        self.scaler = torch.amp.GradScaler(self.device, enabled=scales)
        self.order = torch.Generator().manual_seed(config.seed)
        self.augmentation = torch.Generator().manual_seed(config.seed + 1)
        self.epoch = 0
        self.result = TrainingRun(self.model)
        self.best_loss = math.inf
        self.epochs_since_best = 0

    def run(self) -> TrainingRun:
        self._resume()
        patience = self.config.early_stopping_patience
        while self.epoch < self.config.epochs:
            if patience is not None and self.epochs_since_best >= patience:
                break
            self._train_epoch()
            self.epoch += 1
            if self.epoch % self.config.checkpoint_every_epochs == 0 or self.epoch == self.config.epochs:
                self._save()
        self.model.eval()
        return self.result

    def _train_epoch(self) -> None:
        begin = time.perf_counter()
        self.model.train()
        total_loss = torch.zeros((), dtype=torch.float64)
        skipped = 0
        for number, (inputs, labels) in enumerate(self._batches()):
            started = time.perf_counter()
            loss = self._step(inputs, labels)
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() < before:
                skipped += 1
            else:
                self.schedule.step()
            self.result.step_ms.append((time.perf_counter() - started) * 1e3)
            total_loss += loss.detach().double().cpu() * len(labels)
            if not math.isfinite(float(total_loss)):
                raise TrainingDivergedError(
                    f"The loss became {float(loss.detach())} in epoch {self.epoch + 1}, step {number + 1} ({self.choice.precision}).",
                    hint="lower train.learning_rate, or train in another precision (--set train.precision=fp32); "
                    f"the state before this epoch is kept in {self.state_path}",
                )
            done = self.epoch * self.steps_an_epoch + number + 1
            self.progress(
                done, self.steps_an_epoch * self.config.epochs, f"epoch {self.epoch + 1}/{self.config.epochs}"
            )
        stopping_loss, score = self._evaluate()
        self.result.history.append(
            {
                "epoch": self.epoch + 1,
                "loss": float(total_loss) / len(self.labels),
                "early_stopping_loss": stopping_loss,
                "early_stopping_score": score,
                "learning_rate": self.schedule.get_last_lr()[0],
                "loss_scale": self.scaler.get_scale() if self.scaler.is_enabled() else 1.0,
                "num_skipped": skipped,
                "seconds": time.perf_counter() - begin,
            }
        )
        if stopping_loss < self.best_loss:
            self.best_loss, self.epochs_since_best = stopping_loss, 0
        else:
            self.epochs_since_best += 1

    def _step(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Forward and backward; gradients are unscaled and clipped when this returns."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.choice):
            outputs = _answer(self.model, inputs)
        loss = user_call(self.loss, outputs, labels)
        self.scaler.scale(loss).backward()
        if self.config.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        return loss

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(self.labels), generator=self.order)
        for start in range(0, len(order), self.config.batch_size):
            chosen = order[start : start + self.config.batch_size]
            inputs = self.inputs[chosen]
            if self.config.augment is not None:
                inputs = user_call(self.config.augment, inputs, self.augmentation)
            yield self._laid_out(inputs), self.labels[chosen]

    def _laid_out(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.config.channels_last and inputs.ndim == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        self.model.eval()
        inputs, labels = self.stopping
        with autocast(self.choice):
            outputs = _answer(self.model, self._laid_out(inputs))
        loss = float(user_call(self.loss, outputs, labels))
        correct = (outputs.argmax(-1) == labels).double().mean() if outputs.ndim == 2 else torch.tensor(math.nan)
        return loss, float(correct)

    def _save(self) -> None:
        save_state(
            {
                "key": self.state_key,
                "epoch": self.epoch,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
                "scaler": self.scaler.state_dict(),
                "order": self.order.get_state(),
                "augmentation": self.augmentation.get_state(),
                "torch_rng": torch.get_rng_state(),
                "history": self.result.history,
                "step_ms": self.result.step_ms,
                "best_loss": self.best_loss,
                "epochs_since_best": self.epochs_since_best,
            },
            self.state_path,
        )

    def _resume(self) -> None:
        state = load_state(self.state_path)
        if state is None or state.get("key") != self.state_key:
            return
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"] | {"lr_lambdas": [None]})
        self.scaler.load_state_dict(state["scaler"])
        self.order.set_state(state["order"])
        self.augmentation.set_state(state["augmentation"])
        torch.set_rng_state(state["torch_rng"])
        self.result.history = state["history"]
        self.result.step_ms = state["step_ms"]
        self.best_loss = state["best_loss"]
        self.epochs_since_best = state["epochs_since_best"]


def _answer(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What the user's model answers, in FP32."""
    outputs = user_call(model, inputs)
    if not isinstance(outputs, torch.Tensor):
        raise ConfigError(f"train.model answered {type(outputs).__name__}, training expects one tensor.")
    return outputs.float()


def _rate(schedule: str, step: int, total: int) -> float:
    """The learning rate's factor at a step."""
    share = min(step / max(total, 1), 1.0)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    warm = 0.3  # one cycle: rise over 30 % of the steps from 1/25 of the peak, fall to 1/10,000 of that
    if share < warm:
        return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * share / warm))
    low = 1 / 250_000
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * (share - warm) / (1 - warm)))


def _tensors(dataset: Dataset, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    if len(dataset.inputs) != 1 or dataset.labels is None:
        raise DataError(
            f"Training wants datasets with one input and labels, found inputs {list(dataset.inputs)} "
            f"and {'no ' if dataset.labels is None else ''}labels."
        )
    array = next(iter(dataset.inputs.values()))
    return torch.from_numpy(array).to(device), torch.from_numpy(dataset.labels).to(device)


def gradients(
    config: TrainConfig, choice: PrecisionChoice, batch: tuple[torch.Tensor, torch.Tensor], *, steps: int
) -> list[dict[str, torch.Tensor]]:
    """Unscaled gradients by parameter after each of `steps` steps on one batch, from the initial weights; weights move in between."""
    model = make_model(config, choice.device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    scaler = torch.amp.GradScaler(choice.device, enabled=choice.scales_loss and config.loss_scaling == "dynamic")
    loss_function = loss_of(config)
    found: list[dict[str, torch.Tensor]] = []
    inputs, labels = batch
    while len(found) < steps:
        torch.manual_seed(config.seed + len(found))  # dropout must drop the same values in both precisions
        optimizer.zero_grad(set_to_none=True)
        with autocast(choice):
            outputs = _answer(model, inputs)
        loss = user_call(loss_function, outputs, labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found.append(
            {name: p.grad.detach().float().cpu().clone() for name, p in model.named_parameters() if p.grad is not None}
        )
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.is_enabled() and scaler.get_scale() < before and before > 1:
            found.pop()  # the scale was too large and the step was skipped: not what training would step with
    return found
