"""What the table is made of: two precisions of one training, measured in turns in one process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpdeploy.artifact import Dataset
from mpdeploy.config import PARITY_GATES, TrainConfig
from mpdeploy.gates.evidence import Evidence, Place
from mpdeploy.gates.gate import decide
from mpdeploy.measure import accuracy
from mpdeploy.measure.bootstrap import median_ratio
from mpdeploy.train.health import compare_gradients
from mpdeploy.train.loop import answer, gradients, loss_of, make_model, tensors_of, train
from mpdeploy.train.memory import PeakMemory, SavedBytes
from mpdeploy.train.optimizers import make_optimizer, make_scaler
from mpdeploy.train.parity import held_out_answers, train_pair
from mpdeploy.train.precision import PrecisionChoice, autocast, choose_precision
from mpdeploy.train.splits import Splits

BLOCK = 5  # steps in a row of one side, before it is the other's turn
CONTROL_SCALE = 2.0**-14
"""The control's loss is so much smaller: a network that is deep enough, or trained long enough, gets there by itself."""


class BareLoop:
    """The shortest loop that trains as the configuration says: what the training loop is held against."""

    def __init__(self, config: TrainConfig, choice: PrecisionChoice, splits: Splits) -> None:
        self.config, self.choice = config, choice
        self.model = make_model(config, choice.device)
        self.loss, self.optimizer = loss_of(config), make_optimizer(config, self.model, choice.device)
        self.scaler = make_scaler(config, choice)
        self.inputs, self.labels = tensors_of(splits.train, choice.device)
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(config.seed))
        self.order = order.repeat(
            -(-config.batch_size // len(order))
        )  # a small training set is repeated within a batch
        self.augmentation = torch.Generator().manual_seed(config.seed)
        self.at = 0
        self.model.train()

    def step(self) -> float:
        """One optimiser step; milliseconds, the device's work included."""
        begin = time.perf_counter()
        if self.at + self.config.batch_size > len(self.order):
            self.at = 0
        chosen = self.order[self.at : self.at + self.config.batch_size]
        self.at += self.config.batch_size
        inputs = tuple(values[chosen] for values in self.inputs)
        if self.config.augment is not None and len(inputs) == 1:
            inputs = (self.config.augment(inputs[0], self.augmentation),)
        if self.config.channels_last:
            inputs = tuple(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.choice):
            outputs = answer(self.model, inputs)
        loss = self.loss(outputs, self.labels[chosen])
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        float(loss.detach())  # a loop that shows its loss waits for the device here
        return (time.perf_counter() - begin) * 1e3

    def saved_bytes(self) -> int:
        """Bytes of activations that one forward pass keeps for backward, at the configured batch."""
        saved = SavedBytes(self.model)
        inputs = tuple(values[: self.config.batch_size] for values in self.inputs)
        with saved.measuring(), autocast(self.choice):
            loss = self.loss(answer(self.model, inputs), self.labels[: self.config.batch_size])
        del loss
        return saved.num_bytes


def in_turns(a: Any, b: Any, num_steps: int) -> dict[str, Any]:
    """Times of two step functions, in blocks of `BLOCK` steps as ABBA: medians in ms, and the ratio b / a with its interval."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(2):
        a(), b()
    for number in range(max(2, num_steps // BLOCK)):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            times[side].extend((a, b)[side]() for _ in range(BLOCK))
    found = median_ratio(*(np.array(side) for side in times), block_size=BLOCK)
    return {
        "a_ms": float(np.median(times[0])), "b_ms": float(np.median(times[1])), "ratio": found.ratio,
        "interval": list(found.bounds), "steps": len(times[0]),
    }  # fmt: skip


def loop_overhead(config: TrainConfig, choice: PrecisionChoice, splits: Splits, num_steps: int) -> dict[str, Any]:
    """The training loop against the bare one, in turns: time between two calls of its progress, evaluation and saving left out.

    Each turn trains `BLOCK` steps and two to warm up. Loss, loss scale, gradient norm and skips are read at every step; the sampled
    looks at activations (one step in 100) and the FP32 shadow (one in 500) lie outside of such short turns.
    """
    bare = BareLoop(config, choice, splits)
    positions = np.resize(np.arange(len(splits.train)), (BLOCK + 2) * config.batch_size)
    part = Dataset(
        {name: array[positions] for name, array in splits.train.inputs.items()},
        np.arange(len(positions)),  # a small training set is repeated
        splits.train.labels[positions],
    )
    stopping = splits.early_stopping.take(slice(0, 2))
    short = config.model_copy(update={"epochs": 1, "reference": False})

    def ours() -> list[float]:
        stamps: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            train(
                short, choice, part, stopping, state_path=Path(folder) / "state.pt", state_key="overhead",
                progress=lambda done, total, text: stamps.append(time.perf_counter()),
            )  # fmt: skip
        return [(after - before) * 1e3 for before, after in pairwise(stamps[1:])][:BLOCK]

    length = min(BLOCK, len(ours()))
    sides: tuple[list[float], list[float]] = ([], [])
    for number in range(max(2, num_steps // BLOCK)):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            sides[side].extend([bare.step() for _ in range(length)] if side == 0 else ours()[:length])
    found = median_ratio(*(np.array(side) for side in sides), block_size=length)
    return {
        "bare_ms": float(np.median(sides[0])), "loop_ms": float(np.median(sides[1])), "ratio": found.ratio,
        "interval": list(found.bounds), "steps": len(sides[0]),
    }  # fmt: skip


def chosen_by_auto(config: TrainConfig, loops: dict[str, BareLoop]) -> dict[str, Any]:
    """What `train.precision=auto` takes where `loops` (by precision) run, and why."""
    asked = config.model_copy(update={"precision": "auto", "cpu_precision": None})
    device = next(iter(loops.values())).choice.device
    return choose_precision(asked, device, lambda precision: loops[precision].step()).to_json()


def excess_zeros(config: TrainConfig, choice: PrecisionChoice, splits: Splits) -> dict[str, float]:
    """Tier 0, for AMP and for its control: gradients of the worst parameter that are zero and in FP32 are not, as a share, in two steps.

    The control must be caught: FP16 without a loss scale, on a loss times `CONTROL_SCALE`. Nothing becomes NaN and no step is skipped there.
    """
    batch = tensors_of(splits.train.take(slice(0, config.batch_size)), choice.device)
    loss = loss_of(config)

    def small(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss(outputs, labels) * CONTROL_SCALE

    unscaled = config.model_copy(update={"loss": small, "loss_scaling": "none"})
    sides = {"amp": (config, choice), "control": (unscaled, PrecisionChoice("fp16", choice.device, "the control", {}))}
    found = {}
    for name, (settings, half) in sides.items():
        fp32 = PrecisionChoice("fp32", choice.device, "the reference", {})
        steps = (gradients(settings, precision, batch, steps=2) for precision in (fp32, half))
        found[name] = max(compare_gradients(*pair).worst_excess_zeros for pair in zip(*steps, strict=True))
    return found


def peak_bytes(command: list[str]) -> int:
    """Run `command` in a process of its own and read the peak that it prints: memory that others left behind does not count."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def print_peak(config: TrainConfig, choice: PrecisionChoice, splits: Splits, steps: int = 3) -> None:
    """What such a process does: a few steps; on a GPU what torch allocated, else growth of resident memory since before the model."""
    memory = PeakMemory(choice.device)
    loop = BareLoop(config, choice, splits)
    for _ in range(steps):
        loop.step()
    found = memory.to_json()
    peak = found.get("cuda_peak_allocated", found["rss_peak"] - found["rss_at_start"])
    print(json.dumps({"peak_bytes": peak}))


def paired_seeds(
    config: TrainConfig, choice: PrecisionChoice, splits: Splits, metric: Any, seeds: int
) -> dict[str, Any]:
    """Scores of both sides over paired seeds on the calibration split, and the verdicts of the parity gates."""
    kinds: dict[str, list[np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(seeds):
            pair = train_pair(
                config, choice, splits.train, splits.early_stopping, seed=config.seed + number, folder=Path(folder),
                state_key="table", progress=lambda done, total, text: None,
            )  # fmt: skip
            for side, model in zip(("reference", "candidate"), pair, strict=True):
                answers = held_out_answers(config, choice.device, model, splits.calibration)
                named = {"logits": answers.outputs}
                rows = {
                    "nll": answers.nll, "predictions": accuracy.predictions(metric, named),
                    "scores": accuracy.score(metric, named, splits.calibration.labels),
                }  # fmt: skip
                for kind, row in rows.items():
                    kinds.setdefault(f"parity/{side}_{kind}", []).append(np.asarray(row))
    arrays = {name: np.stack(rows) for name, rows in kinds.items()}
    place = Place("parity/seeds", "fp32", "10-train", baseline="fp32-reference", arrays=arrays,
                  facts={"parity_looks": [seeds]}, notes={"metric": "top1"})  # fmt: skip
    verdicts = decide(PARITY_GATES, Evidence({place.at: place}, {}, {}))
    by_seed = {side: arrays[f"parity/{side}_scores"].mean(axis=1) for side in ("reference", "candidate")}
    return {
        "fp32": by_seed["reference"].tolist(), "amp": by_seed["candidate"].tolist(),
        "verdict": next(item.verdict for item in verdicts if item.metric == "parity_nll"),
        "messages": [item.message for item in verdicts],
    }  # fmt: skip
