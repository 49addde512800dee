"""Disjoint samples for training, early stopping, calibration and the gates, and the loader of scikit-learn's digits."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mpdeploy.artifact import Dataset, digest_of_arrays
from mpdeploy.config import DataConfig
from mpdeploy.errors import DataError, MissingExtraError


@dataclass(frozen=True)
class Splits:
    """Four datasets without a sample in common: the gate's samples are seen by gates alone.

    Attributes:
        train: what weights are fitted to.
        early_stopping: what decides when to stop.
        calibration: what ranges are taken from.
        gate: what verdicts rest on.
    """

    train: Dataset
    early_stopping: Dataset
    calibration: Dataset
    gate: Dataset

    def __post_init__(self) -> None:
        named = {name: getattr(self, name) for name in ("train", "early_stopping", "calibration", "gate")}
        for (first, one), (second, other) in combinations(named.items(), 2):
            shared = np.intersect1d(one.ids, other.ids)
            if len(shared):
                raise DataError(
                    f"The splits '{first}' and '{second}' share {len(shared)} samples, for example id {shared[0]}.",
                    hint="a verdict on samples that were trained on says nothing: make the splits disjoint by sample id",
                )
        for name, dataset in named.items():
            if not len(dataset):
                raise DataError(f"The split '{name}' is empty.")

    @property
    def digest(self) -> str:
        """Digest over all four."""
        return digest_of_arrays(
            {name: np.frombuffer(bytes.fromhex(getattr(self, name).digest), np.uint8) for name in _NAMES}
        )

    def sizes(self) -> dict[str, int]:
        """Name -> number of samples."""
        return {name: len(getattr(self, name)) for name in _NAMES}


_NAMES = ("train", "early_stopping", "calibration", "gate")


def stratified(
    labels: np.ndarray[tuple[int], np.dtype[np.int64]], sizes: tuple[int, ...], seed: int
) -> list[np.ndarray]:
    """Positions for parts of the given sizes, each class spread evenly over them; the rest makes one more part.

    Samples are dealt in an order that interleaves classes, so that every prefix holds each class in proportion.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    ranks = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        ranks[members] = (np.arange(len(members)) + generator.random()) / len(members)
    dealt = np.argsort(ranks, kind="stable")
    cuts = np.cumsum(sizes)
    return [np.sort(part) for part in np.split(dealt, cuts)]


def load_digits(config: DataConfig) -> Splits:
    """scikit-learn's 1,797 real 8x8 digits: 360 for the gates, 180 each for early stopping and calibration, 1,077 to train on.

    Images are float32 [n, 1, 8, 8] in [0, 1]; labels int64 [n]; a sample's id is its position in the data set.
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
    gate, stopping, calibration, train = stratified(everything.labels, (360, 180, 180), config.seed)  # type: ignore[arg-type]
    return Splits(
        everything.take(train), everything.take(stopping), everything.take(calibration), everything.take(gate)
    )
