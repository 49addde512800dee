"""MNIST and what has its format: four IDX files in a folder, or the copy that `datasets` brings."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpdeploy.artifact import Array, Dataset
from mpdeploy.config import DataConfig
from mpdeploy.errors import DataError, UnavailableError
from mpdeploy.train.data.folders import data_folder, listed
from mpdeploy.train.data.idx import read_idx
from mpdeploy.train.splits import Splits, split_samples

OFFICIAL_SHA256 = {
    "train-images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
"""Digests of the official files, unpacked: a folder with these four is recorded as `mnist-official`, any other as `mnist-custom`."""
NUM_CLASSES = 10


def load_mnist(config: DataConfig) -> Splits:
    """MNIST: the test images are the gate's, the training images are split into the other three.

    Images are float32 [n, 1, 28, 28] in [0, 1]; labels int64 [n] from 0 to 9. A sample's id is its position in the training file,
    and 1,000,000 more for one of the test file.

    The files lie in `data.folder` (or its sub-folder `raw`, where torchvision puts them), gz or not. Without a folder they come through
    the package `datasets`, which fetches them.

    Raises:
        ConfigError: no such folder.
        DataError: a file is missing, truncated, not IDX, or images and labels differ in number.
        UnavailableError: neither a folder nor the package `datasets`.
    """
    if config.folder is None:
        train, test, source = *_from_datasets(), "mnist-datasets"
    else:
        train, test, source = _from_folder(data_folder(config, "MNIST's four IDX files"))
    return split_samples(
        _samples(train, 0), official=_samples(test, 1_000_000), seed=config.seed, limit=config.limit,
        classes=config.classes or tuple("0123456789"), source=source,
    )  # fmt: skip


_Part = tuple[Array, Array]  # uint8 images [n, height, width], labels [n]


def _from_folder(folder: Path) -> tuple[_Part, _Part, str]:
    arrays, official = {}, True
    for name, digest in OFFICIAL_SHA256.items():
        axes = 3 if name.endswith("images") else 1
        path = _find(folder, name, axes)
        arrays[name], found = read_idx(path, axes=axes)
        official = official and found == digest
    for part in ("train", "t10k"):
        images, labels = arrays[f"{part}-images"], arrays[f"{part}-labels"]
        if len(images) != len(labels):
            raise DataError(
                f"{folder} holds {len(images):,} {part} images and {len(labels):,} labels.",
                hint="the files do not belong together",
            )
        if len(labels) and labels.max() >= NUM_CLASSES:
            raise DataError(
                f"{folder}: sample {int(np.argmax(labels >= NUM_CLASSES))} of the {part} file has the label {labels.max()}.",
                hint="labels are 0 to 9",
            )
    if arrays["train-images"].shape[1:] != arrays["t10k-images"].shape[1:]:
        raise DataError(f"{folder}: training and test images differ in size.", hint="the files do not belong together")
    source = "mnist-official" if official else "mnist-custom"
    return (
        (arrays["train-images"], arrays["train-labels"]), (arrays["t10k-images"], arrays["t10k-labels"]), source,
    )  # fmt: skip


def _find(folder: Path, name: str, axes: int) -> Path:
    for place in (folder, folder / "raw"):
        for separator in ("-", "."):  # some tools unpack them with a dot
            for suffix in ("", ".gz"):
                path = place / f"{name}{separator}idx{axes}-ubyte{suffix}"
                if path.is_file():
                    return path
    raise DataError(
        f"{folder} has no {name}-idx{axes}-ubyte, nor one with .gz; it holds {listed(folder)}.",
        hint="MNIST is four files: {train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte",
    )


def _from_datasets() -> tuple[_Part, _Part]:
    try:
        import datasets
    except ImportError as error:
        raise UnavailableError(
            "MNIST is not on this machine: data.folder is not set, and the package 'datasets' is not installed.",
            hint="--set data.folder=DIR with the four IDX files, or pip install datasets",
        ) from error
    try:
        found = datasets.load_dataset("ylecun/mnist")
    except Exception as error:  # of a network library that it uses, of a hub client, of a file system
        raise UnavailableError(
            f"The package 'datasets' could not bring ylecun/mnist: {type(error).__name__}: {error}",
            hint="--set data.folder=DIR with the four IDX files",
        ) from error

    def part(name: str) -> _Part:
        return np.stack([np.asarray(image) for image in found[name]["image"]]), np.array(found[name]["label"])

    return part("train"), part("test")


def _samples(part: _Part, first_id: int) -> Dataset:
    images, labels = part
    return Dataset(
        {"image": (images.astype(np.float32) / 255.0)[:, None]},
        np.arange(first_id, first_id + len(labels), dtype=np.int64),
        labels.astype(np.int64),
    )
