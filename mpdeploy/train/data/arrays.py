"""Samples that are numpy arrays already: `.npz` files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from mpdeploy.artifact import Array, Dataset
from mpdeploy.config import DataConfig
from mpdeploy.errors import DataError
from mpdeploy.train.data.folders import data_folder, listed, numbered
from mpdeploy.train.splits import Splits, split_samples

LABELS = "labels"


def load_arrays(config: DataConfig) -> Splits:
    """`train.npz` and `test.npz` (the gate's) in `data.folder`, or a single `.npz`, which is split.

    A file holds one array a model input, samples along axis 0, and `labels` [n]: class numbers from 0, or names. Shapes and dtypes are
    the model's business. A sample's id is its position in the file, and 1,000,000,000 more for one of `test.npz`.

    Raises:
        ConfigError: no such folder.
        DataError: no such files, unreadable ones, no labels, arrays of different lengths, NaN, or files that do not fit each other.
    """
    folder = data_folder(config, "the .npz files")
    files = {path.stem: path for path in sorted(folder.glob("*.npz"))}
    if "train" in files and "test" in files:
        train_path, test_path = files["train"], files["test"]
        train, test = _read(train_path), _read(test_path)
        _refuse_unlike(train, test, test_path)
        labels = [*_plain(train[LABELS], train_path), *_plain(test[LABELS], test_path)]
    elif len(files) == 1:
        train_path, test_path, test = next(iter(files.values())), None, None
        train = _read(train_path)
        labels = _plain(train[LABELS], train_path)
    else:
        raise DataError(
            f"{folder} must hold train.npz and test.npz, or one .npz file; it holds {listed(folder)}.",
            hint="write them with numpy.savez(path, INPUT_NAME=array, labels=labels)",
        )
    count = len(train[LABELS])
    where = (
        f"{train_path}, sample {n}" if n < count else f"{test_path}, sample {n - count}" for n in range(len(labels))
    )
    numbers, classes = numbered(labels, config, where)
    return split_samples(
        _dataset(train, numbers[:count], 0),
        official=None if test is None else _dataset(test, numbers[count:], 1_000_000_000),
        seed=config.seed, limit=config.limit, classes=classes, source="arrays",
    )  # fmt: skip


def _read(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable .npz file: {error}", hint="write it with numpy.savez") from error
    if LABELS not in arrays or len(arrays) < 2:
        raise DataError(
            f"{path} must hold an array 'labels' and one array a model input; it holds {', '.join(arrays) or 'none'}.",
            hint="numpy.savez(path, INPUT_NAME=array, labels=labels)",
        )
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"{path} holds arrays of different lengths along axis 0: {lengths}.")
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            position = int(np.argwhere(~np.isfinite(array))[0][0])
            raise DataError(
                f"{path}: '{name}' is NaN or infinite, first in sample {position}.", hint="repair or drop it"
            )
    return arrays


def _plain(labels: Array, path: Path) -> list[str | int]:
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise DataError(
            f"{path}: 'labels' is {labels.dtype}{list(labels.shape)}, expected one class number or name a sample."
        )
    return list(labels.tolist())


def _refuse_unlike(train: dict[str, Array], test: dict[str, Array], path: Path) -> None:
    looks = [
        {name: (str(a.dtype), a.shape[1:]) for name, a in part.items() if name != LABELS} for part in (train, test)
    ]
    if looks[0] != looks[1]:
        raise DataError(
            f"{path} holds {looks[1]}, train.npz {looks[0]}.", hint="names, dtypes and shapes must be equal"
        )


def _dataset(arrays: dict[str, Array], labels: Array, first_id: int) -> Dataset:
    inputs = {name: array for name, array in arrays.items() if name != LABELS}
    return Dataset(inputs, np.arange(first_id, first_id + len(labels), dtype=np.int64), labels)
