"""A way to call the training loop with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_training import BATCH, NUM_TRAIN, Mlp, blobs, choice_of

from mpdeploy.artifact import Dataset
from mpdeploy.config import TrainConfig
from mpdeploy.train.loop import TrainingRun, train


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., TrainingRun]:
    """Train an `Mlp` on blobs: `fit(precision="bf16", epochs=2, ...)`; the state lies in tmp_path."""

    def run(
        precision: str = "fp32",
        *,
        progress: Callable[[int, int, str], None] = lambda done, total, text: None,
        state: str = "state.pt",
        key: str = "key",
        train_set: Dataset | None = None,
        stopping_set: Dataset | None = None,
        **fields: object,
    ) -> TrainingRun:
        config = TrainConfig(**{"model": Mlp, "epochs": 3, "batch_size": BATCH, "learning_rate": 1e-2, **fields})
        return train(
            config,
            choice_of(precision),
            train_set or blobs(NUM_TRAIN, 0),
            stopping_set or blobs(40, 1000),
            state_path=tmp_path / state,
            state_key=key,
            progress=progress,
        )

    return run
