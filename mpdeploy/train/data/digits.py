"""scikit-learn's handwritten digits: real images that every machine has."""

from __future__ import annotations

import numpy as np

from mpdeploy.artifact import Dataset
from mpdeploy.config import DataConfig
from mpdeploy.errors import MissingExtraError
from mpdeploy.train.splits import Splits, stratified

SIZES = (360, 180, 180)
"""Samples for the gates, early stopping and calibration."""


def load_digits(config: DataConfig) -> Splits:
    """scikit-learn's 1,797 real 8x8 digits: 360 for the gates, 180 each for early stopping and calibration, 1,077 to train on.

    Images are float32 [n, 1, 8, 8] in [0, 1]; labels int64 [n]; a sample's id is its position in the data set. With
    `data.limit` there are fewer of each, in proportion.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError.for_extra("scikit-learn", "train") from error
    images, labels = datasets.load_digits(return_X_y=True)
    everything = Dataset(
        inputs={"image": (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)},
        ids=np.arange(len(labels), dtype=np.int64),
        labels=labels.astype(np.int64),
    )
    share = 1.0
    if config.limit is not None and config.limit < len(labels):
        share = config.limit / len(labels)
        everything = everything.take(stratified(everything.labels, (config.limit,), config.seed)[0])  # type: ignore[arg-type]
    sizes = tuple(round(size * share) for size in SIZES)
    gate, stopping, calibration, train = stratified(everything.labels, sizes, config.seed)  # type: ignore[arg-type]
    return Splits(
        everything.take(train), everything.take(stopping), everything.take(calibration), everything.take(gate),
        classes=tuple("0123456789"), source="digits",
    )  # fmt: skip
