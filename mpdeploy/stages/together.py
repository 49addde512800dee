"""Training on the ranks that torchrun started: rank 0 runs the pipeline, the others train along and leave.

Rank 0 alone decides whether 10-train runs, in which precision, and what follows from it. So a failed gate is the exit code of one process,
and where the launcher starts all of them again, a finished training is not repeated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpdeploy import distributed
from mpdeploy.config import Pipeline, TrainConfig
from mpdeploy.errors import DataError, TrainingDivergedError
from mpdeploy.pipeline import Listener
from mpdeploy.run_dir import StageRecord
from mpdeploy.stages.common import load_splits

if TYPE_CHECKING:
    from mpdeploy.train.precision import PrecisionChoice
    from mpdeploy.train.ranks import Ranks
    from mpdeploy.train.result import TrainingRun
    from mpdeploy.train.splits import Splits

TRAIN = "10-train"
Progress = Callable[[int, int, str], None]


def train_together(
    config: TrainConfig, choice: PrecisionChoice, splits: Splits, *, key: str, folder: Path, progress: Progress
) -> tuple[TrainingRun, TrainingRun | None]:
    """Rank 0: train on all ranks, and let the others go: the AMP run, and the FP32 reference where `train.reference` asks for it.

    Args:
        config: the section `train`.
        choice: the precision.
        splits: the data.
        key: of the training's states.
        folder: where states and logs lie.
        progress: is told (steps done, steps in all, text).
    """
    from mpdeploy.train.ranks import check_ranks, order, together

    check_ranks(config, choice.device)
    order(
        {"choice": choice.to_json(), "key": key, "folder": str(folder.resolve()), "splits_sha256": splits.digest}
        if distributed.world_size() > 1
        else None
    )
    with together(config, choice.device) as ranks:
        return _trained(config, choice, splits, key, folder, progress, ranks)


def _trained(
    config: TrainConfig,
    choice: PrecisionChoice,
    splits: Splits,
    key: str,
    folder: Path,
    progress: Progress,
    ranks: Ranks,
) -> tuple[TrainingRun, TrainingRun | None]:
    from mpdeploy.train.loop import train
    from mpdeploy.train.precision import PrecisionChoice

    amp = train(
        config, choice, splits.train, splits.early_stopping, state_path=folder / "state.amp.pt", state_key=key,
        progress=lambda done, total, text: progress(done, total, f"AMP {choice.precision}, {text}"), ranks=ranks,
    )  # fmt: skip
    if not config.reference:
        return amp, None
    reference = train(
        config, PrecisionChoice("fp32", choice.device, "the reference", {}), splits.train, splits.early_stopping,
        state_path=folder / "state.fp32.pt", state_key=key,
        progress=lambda done, total, text: progress(done, total, f"FP32 reference, {text}"), ranks=ranks,
    )  # fmt: skip
    return amp, reference


def train_along(pipeline: Pipeline) -> None:
    """Ranks other than 0: do what rank 0 orders, and return when it needs no help any more.

    Raises:
        MpdeployError: what this rank alone met. Where training diverges rank 0 says so.
    """
    if distributed.world_size() == 1:
        return
    from mpdeploy.train.precision import PrecisionChoice
    from mpdeploy.train.ranks import order_of_rank_0, together

    found = order_of_rank_0()
    if found is None:
        return
    config, choice = pipeline.train, PrecisionChoice(**found["choice"])
    splits = load_splits(pipeline)
    if splits.digest != found["splits_sha256"]:
        raise DataError(
            f"Rank {distributed.rank()} loaded other samples than rank 0: digest {splits.digest[:12]}, rank 0 has "
            f"{found['splits_sha256'][:12]}.",
            hint="data.load must give the same samples in the same order on every machine",
        )
    with contextlib.suppress(TrainingDivergedError), together(config, choice.device) as ranks:
        _trained(config, choice, splits, found["key"], Path(found["folder"]), lambda *_: None, ranks)


@contextlib.contextmanager
def others_let_go(listener: Listener) -> Iterator[Listener]:
    """Rank 0: within the block the other ranks leave as soon as 10-train has ended or is kept, and at the latest at its end."""
    if distributed.world_size() == 1:
        yield listener
        return
    from mpdeploy.train.ranks import order

    try:
        yield _LetsGo(listener, order)
    finally:
        order(None)


class _LetsGo:
    """A listener that passes on what it is told."""

    def __init__(self, listener: Listener, order: Callable[[dict[str, Any] | None], None]) -> None:
        self._listener = listener
        self._order = order

    def stage_started(self, name: str) -> None:
        self._listener.stage_started(name)

    def stage_progress(self, name: str, done: int, total: int, text: str) -> None:
        self._listener.stage_progress(name, done, total, text)

    def stage_ended(self, record: StageRecord, *, cached: bool) -> None:
        if record.name == TRAIN:
            self._order(None)
        self._listener.stage_ended(record, cached=cached)

    def message(self, text: str) -> None:
        self._listener.message(text)
