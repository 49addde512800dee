"""Image folders: decoded once, mapped from a cache that is whole or not there, and no broken file without its name."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpdeploy.config import DataConfig
from mpdeploy.errors import ConfigError, DataError
from mpdeploy.train.data import images, load_images
from mpdeploy.train.data.caching import cache_folder, cached, new_array
from mpdeploy.train.data.images import decoded, image_classes

NAMES = ("train", "early_stopping", "calibration", "gate")


def paint(folder: Path, name: str, count: int, *, start: int = 0, size: tuple[int, int] = (12, 8)) -> None:
    """Grey images whose upper left pixel is their number."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        pixels = np.full((size[1], size[0]), number, np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{number:03}.png")


@pytest.fixture
def folder(tmp_path):
    paint(tmp_path / "data", "cats", 30)
    paint(tmp_path / "data", "dogs", 30, start=100)
    return tmp_path / "data"


@pytest.fixture
def config(folder, tmp_path):
    def make(**fields) -> DataConfig:
        base = {
            "folder": str(folder),
            "cache_folder": str(tmp_path / "cache"),
            "image_size": (8, 8),
            "image_channels": 1,
        }
        return DataConfig(load=load_images, **(base | fields))

    return make


def test_images_labels_and_ids_belong_together(config):
    splits = load_images(config())
    assert splits.sizes() == {"train": 36, "early_stopping": 6, "calibration": 6, "gate": 12}
    assert splits.classes == image_classes(config()) == ("cats", "dogs")
    for name in NAMES:
        part = getattr(splits, name)
        pixels = part.inputs["image"]
        assert (pixels.shape[1:], pixels.dtype) == ((1, 8, 8), np.float32)
        numbers = np.round(pixels[:, 0, 0, 0] * 255).astype(int)
        assert list(part.labels) == list((numbers >= 100).astype(int))
        assert list(part.ids) == [n if n < 100 else n - 70 for n in numbers], "positions in the sorted listing"


def test_the_second_load_decodes_nothing_and_gives_the_same(config, monkeypatch):
    first = load_images(config())
    monkeypatch.setattr(images, "decoded", None)
    assert load_images(config()).digest == first.digest


def test_the_arrays_are_mapped_and_torch_takes_them_as_they_are(config, tmp_path):
    pixels = load_images(config()).train.inputs["image"]
    assert isinstance(pixels, np.memmap)
    torch.from_numpy(pixels).mul_(0)  # a warning would be an error here
    assert load_images(config()).train.inputs["image"].max() > 0, "what was written stayed in memory"


@pytest.mark.parametrize("change", ["a file", "the size", "the seed"])
def test_other_files_or_choices_are_decoded_anew(config, folder, change):
    first = load_images(config())
    if change == "a file":
        paint(folder, "cats", 1, start=77)
    other = load_images(config(**{"the size": {"image_size": (4, 4)}, "the seed": {"seed": 5}}.get(change, {})))
    assert other.digest != first.digest


def test_an_official_test_folder_is_the_gates(tmp_path, config):
    root = tmp_path / "official"
    for name, start in (("cats", 0), ("dogs", 100)):
        paint(root / "train", name, 20, start=start)
        paint(root / "test", name, 5, start=start + 50)
    shutil.copy(root / "test" / "cats" / "050.png", root / "train" / "cats" / "again.png")
    splits = load_images(config(folder=str(root)))
    assert splits.sizes() == {"train": 32, "early_stopping": 4, "calibration": 4, "gate": 10}
    assert splits.gate.ids.min() >= 1_000_000_000
    assert splits.notes == ("removed 1 of 41 training samples that are also in the official test split",)
    paint(root / "test", "birds", 3)
    with pytest.raises(DataError, match=r"birds is a class that .*train does not have"):
        load_images(config(folder=str(root)))


def test_images_are_fitted_turned_upright_and_converted(tmp_path, config):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20, 0] = 255  # the middle third is red
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = decoded(tmp_path / "wide.png", config(image_size=(10, 10), image_channels=3))
    assert (found[0].min(), found[1].max(), found[2].max()) == (1.0, 0.0, 0.0), "cut to the middle, channels first"
    assert found.shape == (3, 10, 10)
    turned = Image.fromarray(np.vstack([np.zeros((4, 8), np.uint8), np.full((4, 8), 255, np.uint8)]))
    turned.save(
        tmp_path / "turned.png",
        exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x03\x00\x00\x00\x00\x00\x00",
    )
    found = decoded(tmp_path / "turned.png", config())
    assert (found[0, 0, 0], found[0, -1, 0]) == (1.0, 0.0), "EXIF says: turned by 180 degrees"
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(tmp_path / "clear.png")
    assert decoded(tmp_path / "clear.png", config(image_channels=3)).shape == (3, 8, 8)


@pytest.mark.parametrize("content", [b"", b"GIF89a nonsense", b"\x89PNG\r\n\x1a\n truncated"])
def test_a_file_that_cannot_be_decoded_is_named_and_nothing_is_kept(config, folder, tmp_path, content):
    (folder / "dogs" / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match=r"dogs/broken\.png cannot be decoded"):
        load_images(config())
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_class_without_images_is_an_error(config, folder):
    (folder / "birds").mkdir()
    (folder / "birds" / "notes.txt").write_text("none yet")
    with pytest.raises(DataError, match=r"The class .*birds has no image; it holds notes\.txt"):
        load_images(config())


def test_a_folder_without_classes_is_an_error(config, folder):
    with pytest.raises(DataError, match=r"must hold one sub-folder of images a class, at least two; it holds 000\.png"):
        load_images(config(folder=str(folder / "cats")))


def test_a_class_that_is_not_among_those_given_is_an_error(config):
    with pytest.raises(DataError, match="the label 'cats' is no class of this data"):
        load_images(config(classes=("dogs", "horses")))


def test_no_folder_is_an_error(config):
    with pytest.raises(
        ConfigError, match=r"data\.folder is not set: it names the folder with one sub-folder of images"
    ):
        load_images(config(folder=None))


def _write_slowly(folder: Path, begun: Path) -> None:
    def write(path: Path) -> dict:
        new_array(path, (4, 2))[:] = 7
        begun.touch()
        time.sleep(60)
        return {}

    cached(folder, "entry", write)


def test_a_process_killed_while_it_decodes_leaves_nothing_that_counts(tmp_path):
    folder, begun = tmp_path / "cache", tmp_path / "begun"
    process = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(folder, begun))
    process.start()
    while not begun.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [path.name.endswith(".partial") for path in folder.iterdir()] == [True]

    def write(path: Path) -> dict:
        new_array(path, (4, 2))[:] = 3
        return {"n": 1}

    array, index = cached(folder, "entry", write)
    assert (array.tolist(), index) == ([[3, 3]] * 4, {"n": 1})
    assert [path.name for path in folder.iterdir()] == ["entry"]


def test_the_cache_lies_where_the_user_s_caches_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "mpdeploy"
    assert cache_folder("here") == Path("here")
