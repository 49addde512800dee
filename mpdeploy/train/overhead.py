"""What the loop costs beyond a bare torch loop, and what watching numerical health costs, measured in turns in one process.

A round takes one step of each of five loops: bare torch, this one with health off, with health on at an ordinary step, at a sampled
step, and at a step with a shadow backward. All are compared within a round, so what else the machine does slows all of them alike.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpdeploy.artifact import Dataset
from mpdeploy.config import TrainConfig
from mpdeploy.config.training import HealthConfig
from mpdeploy.train.feeding import Feeder
from mpdeploy.train.modules import loss_of, make_model
from mpdeploy.train.monitoring import StepLog
from mpdeploy.train.precision import PrecisionChoice
from mpdeploy.train.stepping import Stepper
from mpdeploy.user_code import user_call

_NEVER = 2**62
_OFF = {"sample_every": 0, "shadow_every": 0, "saved_bytes": False, "replay": False}
_VARIANTS: dict[str, dict[str, Any]] = {
    "off": _OFF,
    "ordinary": {"first_step": _NEVER, "saved_bytes": False},
    "sampled": {"first_step": 0, "sample_every": 1, "shadow_every": 0, "saved_bytes": False},
    "shadow": {"first_step": 0, "sample_every": 0, "shadow_every": 1, "saved_bytes": False},
}


def measure_overhead(
    config: TrainConfig,
    choice: PrecisionChoice,
    dataset: Dataset,
    folder: Path,
    *,
    rounds: int,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Steps in turns, and what their times say.

    Args:
        config: what is trained; its `health` says at which cadence the cost of watching is reckoned.
        choice: the precision.
        dataset: what is trained on; it needs no more than a few batches, which are gone through again and again.
        folder: for logs.
        rounds: rounds that count.
        warm_up: rounds before them.
        clock: seconds; `time.process_time` counts this process's own work, on a CPU that others use too.

    Returns:
        `step_ms` by variant (medians), and as shares of a step, each `{"median", "interval"}` with a 95 % interval for the median over
        rounds: `loop` (beyond the bare loop), `health` (all of it, at the cadence), `sampled_step` and `shadow_step` (one of them).
    """
    times: dict[str, list[float]] = {name: [] for name in ("bare", *_VARIANTS)}
    with contextlib.ExitStack() as stack:
        steps = {"bare": _bare(config, choice, dataset)}
        for name, fields in _VARIANTS.items():
            changed = config.model_copy(update={"health": HealthConfig(**fields), "schedule": "constant"})
            steps[name] = _ours(changed, choice, dataset, folder / f"{name}.jsonl", stack)
        names = list(steps)
        for number in range(warm_up + rounds):
            for place in range(len(names)):  # another one begins each round: none always follows the same one
                name = names[(place + number) % len(names)]
                begin = clock()
                steps[name]()
                if choice.device == "cuda":
                    torch.cuda.synchronize()
                if number >= warm_up:
                    times[name].append((clock() - begin) * 1e3)
    every = config.health

    def shares(value: Callable[[dict[str, float]], float]) -> dict[str, Any]:
        found = [value(dict(zip(times, row, strict=True))) for row in zip(*times.values(), strict=True)]
        return {"median": statistics.median(found), "interval": median_interval(found)}

    def health(row: dict[str, float]) -> float:
        extra = row["ordinary"] - row["off"]
        if every.sample_every:
            extra += (row["sampled"] - row["ordinary"]) / every.sample_every
        if every.shadow_every and choice.dtype is not None:
            extra += (row["shadow"] - row["ordinary"]) / every.shadow_every
        return extra / row["off"]

    return {
        "step_ms": {name: statistics.median(found) for name, found in times.items()},
        "rounds": rounds,
        "loop": shares(lambda row: row["off"] / row["bare"] - 1),
        "health": shares(health),
        "sampled_step": shares(lambda row: row["sampled"] / row["ordinary"] - 1),
        "shadow_step": shares(lambda row: row["shadow"] / row["ordinary"] - 1),
    }


def median_interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval for the median, from order statistics (no distribution is assumed)."""
    ordered, half = sorted(values), 1.96 * math.sqrt(len(values)) / 2
    low = max(math.floor(len(values) / 2 - half), 0)
    high = min(math.ceil(len(values) / 2 + half), len(values) - 1)
    return ordered[low], ordered[high]


def _ours(
    config: TrainConfig, choice: PrecisionChoice, dataset: Dataset, log: Path, stack: contextlib.ExitStack
) -> Callable[[], None]:
    feeder = Feeder(dataset, config, choice.device)
    stepper = Stepper(config, choice, feeder.num_batches)
    stack.enter_context(stepper.ready())
    monitor = StepLog(log, 0)
    stack.callback(monitor.close)
    stepper.model.train()

    def steps() -> Iterator[None]:
        for epoch in itertools.count():
            for batch in feeder.epoch():
                stepper.launch(epoch * feeder.num_batches + batch.number, batch)
                settled = stepper.settle()
                assert settled is not None
                monitor.step(settled.row)
                yield

    running = steps()
    return lambda: next(running)


def _bare(config: TrainConfig, choice: PrecisionChoice, dataset: Dataset) -> Callable[[], None]:
    """What one would write by hand: the same arithmetic and nothing else."""
    model = make_model(config, choice.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(choice.device, enabled=choice.scales_loss)
    loss_function, generator = loss_of(config), torch.Generator().manual_seed(config.seed)
    arrays = [torch.from_numpy(array) for array in (*dataset.inputs.values(), dataset.labels)]

    def batches() -> Iterator[list[torch.Tensor]]:
        while True:
            for chosen in torch.randperm(len(dataset), generator=generator).split(config.batch_size):
                *inputs, labels = (values[chosen] for values in arrays)
                if config.augment is not None:
                    inputs = [user_call(config.augment, inputs[0], generator)]
                if config.channels_last:
                    inputs = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]
                yield [values.to(choice.device, non_blocking=True) for values in (*inputs, labels)]

    source = batches()
    model.train()

    def step() -> None:
        *inputs, labels = next(source)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(choice.device, dtype=choice.dtype, enabled=choice.dtype is not None):
            outputs = model(*inputs)
        scaler.scale(loss_function(outputs.float(), labels)).backward()
        if config.max_grad_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()

    return step
