"""MNIST's format: what is written is read, and what is broken says where."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import sys

import numpy as np
import pytest

from mpdeploy.config import DataConfig
from mpdeploy.errors import ConfigError, DataError, UnavailableError
from mpdeploy.train.data import load_mnist, mnist
from mpdeploy.train.data.idx import read_idx, write_idx

RNG = np.random.default_rng(0)


def config(folder, **fields) -> DataConfig:
    return DataConfig(load=load_mnist, folder=None if folder is None else str(folder), **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """100 test and 400 training images, all different."""
    path = tmp_path_factory.mktemp("mnist")
    images = RNG.integers(0, 256, (500, 28, 28), dtype=np.uint8)
    labels = (np.arange(500) % 10).astype(np.uint8)
    for name, part in {"t10k": slice(0, 100), "train": slice(100, 500)}.items():
        write_idx(path / f"{name}-images-idx3-ubyte", images[part])
        write_idx(path / f"{name}-labels-idx1-ubyte.gz", labels[part])
    return path


def broken(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "broken")


@pytest.mark.parametrize("name", ["array", "array.gz"])
def test_what_is_written_is_read(tmp_path, name):
    array = RNG.integers(0, 256, (5, 3, 4), dtype=np.uint8)
    write_idx(tmp_path / name, array)
    found, digest = read_idx(tmp_path / name, axes=3)
    assert np.array_equal(found, array)
    raw = bytes([0, 0, 8, 3, 0, 0, 0, 5, 0, 0, 0, 3, 0, 0, 0, 4]) + array.tobytes()
    assert digest == hashlib.sha256(raw).hexdigest(), "of the unpacked bytes: packed or not, it is the same file"


def test_images_are_scaled_and_the_test_images_are_the_gates(folder):
    splits = load_mnist(config(folder))
    assert splits.sizes() == {"train": 320, "early_stopping": 40, "calibration": 40, "gate": 100}
    images, _ = read_idx(folder / "t10k-images-idx3-ubyte", axes=3)
    gate = splits.gate
    np.testing.assert_array_equal(gate.inputs["image"][:, 0], images.astype(np.float32) / 255)
    assert (gate.inputs["image"].dtype, gate.labels.dtype) == (np.float32, np.int64)
    assert list(gate.ids) == list(range(1_000_000, 1_000_100))
    assert list(gate.labels) == [n % 10 for n in range(100)]
    assert (splits.source, splits.classes, splits.notes) == ("mnist-custom", tuple("0123456789"), ())


def test_torchvision_s_folder_and_names_with_a_dot_are_found(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "MNIST" / "raw")
    raw = tmp_path / "MNIST" / "raw"
    (raw / "t10k-images-idx3-ubyte").rename(raw / "t10k-images.idx3-ubyte")
    assert load_mnist(config(tmp_path / "MNIST")).digest == load_mnist(config(folder)).digest


def test_the_official_files_are_recognised_by_their_digests(folder, monkeypatch):
    digests = {
        name: read_idx(mnist._find(folder, name, axes), axes=axes)[1]
        for name in mnist.OFFICIAL_SHA256
        for axes in [3 if name.endswith("images") else 1]
    }
    monkeypatch.setattr(mnist, "OFFICIAL_SHA256", digests)
    assert load_mnist(config(folder)).source == "mnist-official"
    monkeypatch.setitem(digests, "t10k-labels", "0" * 64)
    assert load_mnist(config(folder)).source == "mnist-custom"


def test_a_limit_takes_a_fifth_for_the_gate_and_every_class(folder):
    splits = load_mnist(config(folder, limit=200))
    assert splits.sizes() == {"train": 128, "early_stopping": 16, "calibration": 16, "gate": 40}
    assert list(np.bincount(splits.gate.labels)) == [4] * 10


def test_a_training_image_that_is_also_a_test_image_is_removed(folder, tmp_path):
    path = broken(folder, tmp_path)
    train, _ = read_idx(path / "train-images-idx3-ubyte", axes=3)
    test, _ = read_idx(path / "t10k-images-idx3-ubyte", axes=3)
    train = train.copy()
    train[:7], train[8] = test[:7], train[9]
    write_idx(path / "train-images-idx3-ubyte", train)
    splits = load_mnist(config(path))
    assert sum(splits.sizes().values()) == 500 - 8
    assert splits.notes == (
        "removed 1 of 400 samples that repeat an earlier one, 1 of them with another label",
        "removed 7 of 400 training samples that are also in the official test split",
    )
    gate = {image.tobytes() for image in splits.gate.inputs["image"]}
    for name in ("train", "early_stopping", "calibration"):
        assert not gate & {image.tobytes() for image in getattr(splits, name).inputs["image"]}


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"more")


def text(path):
    path.write_text("<html>moved</html>")


def header_only(path):
    path.write_bytes(path.read_bytes()[:7])


def labels_instead(path):
    write_idx(path, np.zeros(100, np.uint8))


def fewer(path):
    write_idx(path, np.zeros((99, 28, 28), np.uint8))


def smaller(path):
    write_idx(path, np.zeros((100, 27, 28), np.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"t10k-images-idx3-ubyte is truncated: 78,411 bytes, its header says 78,416 \(100x28x28\)"),
        (lengthen, "has bytes left over: 78,420 bytes"),
        (text, "is not an IDX file: it begins with 3c68746d"),
        (header_only, "is truncated: 7 bytes, its header alone has 16"),
        (labels_instead, "holds type 0x08 with 1 axes, expected unsigned bytes .* with 3"),
        (fewer, "holds 99 t10k images and 100 labels"),
        (smaller, "training and test images differ in size"),
        (lambda path: path.unlink(), "has no t10k-images-idx3-ubyte, nor one with .gz; it holds t10k-labels"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_file_is_an_error_that_names_it(folder, tmp_path, change, message):
    path = broken(folder, tmp_path)
    change(path / "t10k-images-idx3-ubyte")
    with pytest.raises(DataError, match=message):
        load_mnist(config(path))


def test_a_truncated_gz_is_an_error_that_names_it(folder, tmp_path):
    path = broken(folder, tmp_path)
    packed = path / "train-labels-idx1-ubyte.gz"
    packed.write_bytes(gzip.compress(gzip.decompress(packed.read_bytes()))[:-9])
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz cannot be unpacked"):
        load_mnist(config(path))


def test_a_label_that_is_no_digit_is_an_error_with_its_sample(folder, tmp_path):
    path = broken(folder, tmp_path)
    labels = np.zeros(400, np.uint8)
    labels[17] = 10
    write_idx(path / "train-labels-idx1-ubyte.gz", labels)
    with pytest.raises(DataError, match="sample 17 of the train file has the label 10"):
        load_mnist(config(path))


def test_a_folder_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match=r"data\.folder=nowhere is not a folder"):
        load_mnist(config("nowhere"))


def test_without_a_folder_and_without_datasets_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python does where a package is not installed
    with pytest.raises(UnavailableError, match=r"data\.folder is not set, and the package 'datasets' is not") as caught:
        load_mnist(config(None))
    assert "--set data.folder=DIR" in str(caught.value)
