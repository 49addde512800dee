"""The training loop: epochs of steps, evaluation after each, and a full state that a killed run goes on from to the same weights.

What happens within a step is in `stepping`; where samples come from in `feeding`; what is watched in `health`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mpdeploy.artifact import Dataset
from mpdeploy.config import TrainConfig
from mpdeploy.train import sharded
from mpdeploy.train.checkpoint import (
    load_state,
    load_weights,
    random_state,
    restore_random_state,
    save_state,
    save_weights,
    seed_everything,
)
from mpdeploy.train.evaluation import evaluate
from mpdeploy.train.feeding import Feeder, tensors_of
from mpdeploy.train.gradients import gradients
from mpdeploy.train.memory import PeakMemory
from mpdeploy.train.modules import Inputs, answer, loss_of, make_model
from mpdeploy.train.monitoring import Monitor, monitors
from mpdeploy.train.precision import PrecisionChoice
from mpdeploy.train.ranks import ALONE, Ranks
from mpdeploy.train.result import TrainingRun
from mpdeploy.train.stepping import Settled, Stepper

__all__ = ["Inputs", "Progress", "TrainingRun", "answer", "gradients", "loss_of", "make_model", "tensors_of", "train"]

RANK_SEED = 1_000_003
"""Between the seeds of two ranks' dropout."""
Progress = Callable[[int, int, str], None]
"""Told (steps done, steps in all, text)."""


def train(
    config: TrainConfig,
    choice: PrecisionChoice,
    train_set: Dataset,
    stopping_set: Dataset,
    *,
    state_path: Path,
    state_key: str,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> TrainingRun:
    """Train, from the last full state at `state_path` where it has the key `state_key`, else from the start.

    Beside the state lie `log.jsonl` and, where the best epoch ships, its weights as safetensors. Of several ranks each calls this; rank 0
    writes the files and gets the model that ships.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite, or a gradient did that no loss scaler looks after.
        UserCodeError: the model, loss or augmentation raised.
    """
    return _Training(config, choice, train_set, stopping_set, state_path, state_key, progress, ranks).run()


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
        ranks: Ranks,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.device = choice.device
        self.state_path, self.state_key = state_path, state_key
        self.best_path = state_path.with_name(f"{state_path.stem}.best.safetensors")
        self.progress = progress
        self.stopping_set = stopping_set
        seed_everything(config.seed)
        self.feeder = Feeder(train_set, config, self.device, rank=ranks.data_rank, world_size=ranks.data_size)
        self.stepper = Stepper(config, choice, self.feeder.num_batches, ranks)
        if ranks.data_rank:  # the same weights on every rank, and other dropout
            torch.manual_seed(config.seed + RANK_SEED * ranks.data_rank)
        self.monitors: list[Monitor] = []
        self.result = TrainingRun(self.stepper.model)
        self.epoch = 0  # finished ones
        self.next_batch = 0  # of the epoch under way
        self.best_loss, self.epochs_since_best = math.inf, 0
        self.tally = _new_tally()

    def run(self) -> TrainingRun:
        memory, result, stepper = PeakMemory(self.device), self.result, self.stepper
        with contextlib.ExitStack() as stack:
            result.fp32_modules = stack.enter_context(stepper.ready())
            self._resume()
            if not self._finished() and self.ranks.is_first:
                done = self.epoch * self.feeder.num_batches + self.next_batch
                self.monitors = monitors(self.config.monitor, self.state_path, self.device, done)
                for monitor in self.monitors:
                    stack.callback(monitor.close)
            while not self._finished():
                self._train_epoch()
                self._end_epoch()
        result.memory = {"saved_activations": stepper.saved_activations, **memory.to_json()}
        result.health = stepper.watch.to_json()
        result.precision_events = stepper.precision.events
        self._ship()
        return result

    def _finished(self) -> bool:
        patience = self.config.early_stopping_patience
        return self.epoch >= self.config.epochs or (patience is not None and self.epochs_since_best >= patience)

    def _train_epoch(self) -> None:
        begin = time.perf_counter()
        self.stepper.model.train()
        every = self.config.checkpoint_every_steps
        for batch in self.feeder.epoch(self.next_batch):
            step = self.epoch * self.feeder.num_batches + batch.number
            self._note(self.stepper.launch(step, batch))
            saves = every is not None and (step + 1) % every == 0
            if saves or self.device == "cpu":
                self._note(self.stepper.settle())
            if saves:
                self.tally["seconds"] += time.perf_counter() - begin
                begin = time.perf_counter()
                self._save()
        self._note(self.stepper.settle())
        self.tally["seconds"] += time.perf_counter() - begin

    def _note(self, settled: Settled | None) -> None:
        """Count a step, log it and tell the caller."""
        if settled is None:
            return
        row, result = settled.row, self.result
        self.next_batch = settled.batch.number + 1
        self.tally["loss"] += row["loss"] * settled.batch.num_global
        self.tally["num_skipped"] += row["skipped"]
        result.step_ms.append(row["step_ms"])
        result.gradient_norms.append(row["gradient_norm"])
        result.note_scale(settled.step - 1, row["loss_scale"])
        if row["skipped"]:
            result.skipped_steps.append(settled.step)
        for monitor in self.monitors:
            monitor.step(row)
        text = f"epoch {self.epoch + 1}/{self.config.epochs}"
        if settled.event is not None:
            text += ", {from} -> {to}: {reason}".format(**settled.event)
        self.progress(settled.step, self.feeder.num_batches * self.config.epochs, text)

    def _end_epoch(self) -> None:
        begin = time.perf_counter()
        stepper, choice = self.stepper, self.stepper.precision.current
        self.ranks.copy(*stepper.ships.buffers())  # each has BatchNorm statistics of its own
        runs_in = stepper.autocasts(choice)
        loss, score = evaluate(stepper.ships, self.stopping_set, self.config, runs_in, self.ranks)
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "loss": self.tally["loss"] / len(self.feeder.dataset),
            "early_stopping_loss": loss,
            "early_stopping_score": score,
            "learning_rate": stepper.rate.value,
            "loss_scale": stepper.scaler.get_scale() if stepper.scaler.is_enabled() else 1.0,
            "num_skipped": int(self.tally["num_skipped"]),
            "precision": choice.precision,
        }
        if stepper.average is not None and stepper.ships is stepper.model:
            self.ranks.copy(*stepper.average.model.buffers())
            found = evaluate(stepper.average.model, self.stopping_set, self.config, runs_in, self.ranks)
            row["average_loss"], row["average_score"] = found
        row["seconds"] = self.tally["seconds"] + time.perf_counter() - begin
        self.result.history.append(row)
        for monitor in self.monitors:
            monitor.epoch(row)
        self.epoch, self.next_batch, self.tally = self.epoch + 1, 0, _new_tally()
        if loss < self.best_loss:
            self.best_loss, self.epochs_since_best, self.result.best_epoch = loss, 0, self.epoch
            if self.config.ships_best:
                weights = stepper.shipped_weights()
                if self.ranks.is_first:
                    save_weights(weights, self.best_path, metadata={"epoch": str(self.epoch)})
        else:
            self.epochs_since_best += 1
        if self.epoch % self.config.checkpoint_every_epochs == 0 or self._finished():
            self._save()

    def _ship(self) -> None:
        """Leave the weights that ship in the model. One that was changed for several ranks is made anew, on rank 0."""
        model, ships = self.stepper.model, self.stepper.ships
        if self.stepper.is_split or (self.config.parallel.sync_batchnorm and self.ranks.size > 1):
            weights = self.stepper.shipped_weights()
            if not self.ranks.is_first:
                return
            model = ships = self.result.model = make_model(self.config, self.device)
            model.load_state_dict(weights)
        if self.config.ships_best and self.result.best_epoch is not None:
            load_weights(model, self.best_path)
            self.result.shipped = "best"
        elif ships is not model:
            model.load_state_dict(ships.state_dict())
        self.result.averaged = self.stepper.ships is not self.stepper.model
        model.eval()

    def _save(self) -> None:
        """Write all that the next step depends on. Called between steps, with none launched."""
        for monitor in self.monitors:
            monitor.flush()
        random_states = self.ranks.all_of(random_state())
        parts = self._parts(self.epoch, self.next_batch)
        if self.stepper.is_split:
            self.stepper.save_parts(parts)
        if not self.ranks.is_first:
            return
        state = {
            "key": self.state_key,
            "epoch": self.epoch,
            "next_batch": self.next_batch,
            "tally": self.tally,
            "best_loss": self.best_loss,
            "epochs_since_best": self.epochs_since_best,
            "random": random_states,
            "result": self.result.state_dict(),
        }
        state |= self.feeder.state_dict(next_batch=self.next_batch)
        save_state(state | self.stepper.state_dict(), self.state_path)
        if self.stepper.is_split:
            sharded.remove_others(parts)

    def _parts(self, epoch: int, next_batch: int) -> Path:
        """Where the tensors of a split model's state lie: never in place of those that the state on the disk names."""
        return self.state_path.with_suffix(".dcp") / f"{epoch}-{next_batch}"

    def _resume(self) -> None:
        state = self.ranks.from_first(load_state(self.state_path) if self.ranks.is_first else None)
        if state is None or state.get("key") != self.state_key:
            return
        self.epoch, self.next_batch, self.tally = state["epoch"], state["next_batch"], state["tally"]
        self.best_loss, self.epochs_since_best = state["best_loss"], state["epochs_since_best"]
        self.result.load_state_dict(state["result"])
        self.feeder.load_state_dict(state)
        self.stepper.load_state_dict(state)
        if self.stepper.is_split:
            self.stepper.load_parts(self._parts(self.epoch, self.next_batch))
        rank, steps = self.ranks.rank, len(self.result.step_ms)
        if rank < len(state["random"]):
            restore_random_state(state["random"][rank])
        else:  # there are more ranks than wrote the state
            torch.manual_seed(self.config.seed + RANK_SEED * self.ranks.data_rank + steps)


def _new_tally() -> dict[str, float]:
    """Sums over the steps of an epoch."""
    return {"loss": 0.0, "num_skipped": 0.0, "seconds": 0.0}
