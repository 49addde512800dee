"""Where the numbers of each step go: a JSON log, TensorBoard, Weights & Biases, and a trace of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch

from mpdeploy.config.training import MonitorConfig
from mpdeploy.errors import MissingExtraError
from mpdeploy.files import finite_json, write_text

TRACE_AFTER = 5
"""Steps before the traced ones; the last of them warms the profiler up."""


class Monitor(Protocol):
    """Something that is told of steps and epochs."""

    def step(self, row: dict[str, Any]) -> None:
        """A step was taken or skipped: `step`, `epoch`, `loss`, `learning_rate`, `loss_scale`, `gradient_norm`, ..."""

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch ended: a row of the history."""

    def flush(self) -> None:
        """Write what is held back: the state is about to be saved."""

    def close(self) -> None:
        """Training ended, well or not."""


class StepLog:
    """One JSON object a line and step. A run that resumes at step n drops the lines after it first."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self._path = path
        kept = [line for line in _lines(path) if _step_of(line) <= resumed_at] if resumed_at else []
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def step(self, row: dict[str, Any]) -> None:
        """One line."""
        self._file.write(json.dumps(finite_json(row)) + "\n")

    def epoch(self, row: dict[str, Any]) -> None:
        """Nothing: epochs are in the stage's report."""

    def flush(self) -> None:
        """To the file."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _step_of(line: str) -> float:
    """The step of a line; infinity for one that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class TensorBoard:
    """Scalars as TensorBoard events, tags `step/loss`, `epoch/early_stopping_loss`, ...; x is the step."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError.for_extra("tensorboard", "monitor") from error
        self._writer = SummaryWriter(str(folder), purge_step=resumed_at + 1 if resumed_at else None)
        self._step = resumed_at

    def step(self, row: dict[str, Any]) -> None:
        """Every number of the row."""
        self._step = row["step"]
        self._add("step", row)

    def epoch(self, row: dict[str, Any]) -> None:
        """Every number of the row, at its last step."""
        self._add("epoch", row)

    def _add(self, prefix: str, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                self._writer.add_scalar(f"{prefix}/{name}", value, self._step)

    def flush(self) -> None:
        """To the file."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run. `offline` writes a folder that `wandb sync` can upload later, and needs no account."""

    def __init__(self, config: MonitorConfig, folder: Path, name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError.for_extra("wandb", "monitor") from error
        folder.mkdir(parents=True, exist_ok=True)
        mode: Any = config.wandb
        self._run = wandb.init(
            project=config.wandb_project, name=name, mode=mode, dir=str(folder),
            settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip

    def step(self, row: dict[str, Any]) -> None:
        """Every value of the row."""
        self._run.log({f"step/{name}": value for name, value in row.items() if name != "step"}, step=row["step"])

    def epoch(self, row: dict[str, Any]) -> None:
        """Every value of the row, at its last step."""
        self._run.log({f"epoch/{name}": value for name, value in row.items() if name != "epoch"})

    def flush(self) -> None:
        """Nothing: its own process writes."""

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class Trace:
    """A torch.profiler trace of some steps, after a few of warm-up."""

    def __init__(self, path: Path, num_steps: int, device: str) -> None:
        kinds = torch.profiler.ProfilerActivity
        self._profiler = torch.profiler.profile(
            activities=[kinds.CPU, kinds.CUDA] if device == "cuda" else [kinds.CPU],
            schedule=torch.profiler.schedule(wait=TRACE_AFTER - 1, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
            record_shapes=True,
            profile_memory=True,
        )
        self._profiler.start()

    def step(self, row: dict[str, Any]) -> None:
        """Count a step."""
        self._profiler.step()

    def epoch(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Write the trace if its steps were not all taken."""
        self._profiler.stop()


def monitors(config: MonitorConfig, state_path: Path, device: str, resumed_at: int) -> list[Monitor]:
    """What the config asks for. Files lie beside the state: `state.amp.pt` gets `log.amp.jsonl` and `trace.amp.json`.

    Args:
        config: which of them.
        state_path: where the full state lies.
        device: what a trace looks at.
        resumed_at: steps that were done before.
    """
    folder, name = state_path.parent, state_path.stem.removeprefix("state").strip(".")
    infix = f".{name}" if name else ""
    found: list[Monitor] = []
    if config.step_log:
        found.append(StepLog(folder / f"log{infix}.jsonl", resumed_at))
    if config.tensorboard:
        found.append(TensorBoard(folder / "tensorboard" / (name or "run"), resumed_at))
    if config.wandb != "off":
        found.append(WeightsAndBiases(config, folder, name or "run"))
    if config.profile_steps:
        found.append(Trace(folder / f"trace{infix}.json", config.profile_steps, device))
    return found
