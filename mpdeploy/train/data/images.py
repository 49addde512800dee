"""A folder of images with one sub-folder a class, decoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, Dataset
from mpdeploy.config import DataConfig
from mpdeploy.errors import DataError, MissingExtraError
from mpdeploy.files import digest_of_json
from mpdeploy.train.data.caching import cache_folder, cached, new_array
from mpdeploy.train.data.folders import data_folder, listed, numbered
from mpdeploy.train.splits import Splits, plan_splits

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
OFFICIAL_FIRST_ID = 1_000_000_000
_OFFICIAL = ("test", "val", "validation")
_FORMAT = 1  # of what is cached


def load_images(config: DataConfig) -> Splits:
    """Images of `data.folder`: `CLASS/NAME.png`, or `train/CLASS/NAME.png` with `test/` (or `val/`) for the gate.

    `image` is float32 [n, channels, height, width] in [0, 1]: resized so that `data.image_size` fits, then cut evenly (EXIF's rotation is
    applied, transparency is dropped). Labels are int64 [n]; classes are the sub-folders, in alphabetical order. A sample's id is the
    position of its file in the sorted listing, and 1,000,000,000 more for one of the official test folder.

    Decoded images are kept in `data.cache_folder` under a digest of the listing (names, sizes, times of modification) and of these choices;
    the arrays are mapped from there, so that they may be larger than the memory.

    Raises:
        ConfigError: no such folder.
        DataError: no classes, a class without images, or a file that cannot be decoded, by its name.
        MissingExtraError: Pillow is not installed.
    """
    folder = data_folder(config, "one sub-folder of images a class")
    root, judged = _roots(folder)
    classes, train = _listing(root)
    official: list[Path] = []
    if judged is not None:
        judged_classes, official = _listing(judged)
        unknown = [name for name in judged_classes if name not in classes]
        if unknown:
            raise DataError(
                f"{judged / unknown[0]} is a class that {root} does not have.",
                hint=f"its classes: {', '.join(classes)}",
            )
    files = train + official
    labels, classes = numbered([path.parent.name for path in files], config, (str(path) for path in files))
    key = digest_of_json(
        {
            "format": _FORMAT, "size": config.image_size, "channels": config.image_channels, "seed": config.seed,
            "limit": config.limit, "classes": classes, "num_official": len(official),
            "files": [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        }
    )  # fmt: skip

    def write(path: Path) -> dict[str, Any]:
        return _decode(path, files, labels, len(train), config)

    pixels, index = cached(cache_folder(config.cache_folder), f"images-{key[:24]}", write)
    parts = {name: _part(pixels, labels, len(train), begin, rows) for name, begin, rows in _parts(index)}
    return Splits(**parts, classes=classes, source="images", notes=tuple(index["notes"]))


def image_classes(config: DataConfig) -> tuple[str, ...]:
    """The classes of the images in `data.folder`, without looking into any image."""
    if config.classes:
        return config.classes
    return _listing(_roots(data_folder(config, "one sub-folder of images a class"))[0])[0]


def _roots(folder: Path) -> tuple[Path, Path | None]:
    if not (folder / "train").is_dir():
        return folder, None
    return folder / "train", next((folder / name for name in _OFFICIAL if (folder / name).is_dir()), None)


def _listing(root: Path) -> tuple[tuple[str, ...], list[Path]]:
    """Classes and files, sorted.

    Raises:
        DataError: no classes, or one without images.
    """
    classes = sorted(item for item in root.iterdir() if item.is_dir() and not item.name.startswith("."))
    if len(classes) < 2:
        raise DataError(
            f"{root} must hold one sub-folder of images a class, at least two; it holds {listed(root)}.",
            hint="for example cats/1.png and dogs/1.png",
        )
    files: list[Path] = []
    for folder in classes:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise DataError(
                f"The class {folder} has no image; it holds {listed(folder)}.",
                hint=f"images end with {', '.join(sorted(SUFFIXES))}; remove the folder if it is no class",
            )
        files += found
    return tuple(item.name for item in classes), files


def _decode(path: Path, files: Sequence[Path], labels: Array, num_train: int, config: DataConfig) -> dict[str, Any]:
    """Plan the splits on the files' content, and write the images split after split, so that each is one slice."""
    content = [hashlib.blake2b(file.read_bytes(), digest_size=16).digest() for file in files]
    official = (labels[num_train:], content[num_train:]) if num_train < len(files) else None
    plan = plan_splits(labels[:num_train], content[:num_train], seed=config.seed, limit=config.limit, official=official)
    gate = plan.gate if plan.official_gate is None else plan.official_gate + num_train
    assert gate is not None
    rows = {
        "train": plan.train, "early_stopping": plan.early_stopping, "calibration": plan.calibration, "gate": gate,
    }  # fmt: skip
    height, width = config.image_size
    pixels = new_array(path, (sum(map(len, rows.values())), config.image_channels, height, width))
    for number, position in enumerate(np.concatenate(list(rows.values()))):
        pixels[number] = decoded(files[position], config)
    pixels.flush()  # type: ignore[attr-defined]
    return {"rows": {name: part.tolist() for name, part in rows.items()}, "notes": list(plan.notes)}


def decoded(path: Path, config: DataConfig) -> Array:
    """One image: float32 [channels, height, width] in [0, 1].

    Raises:
        DataError: it cannot be decoded.
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("Pillow, which decodes images, is not installed.", hint="pip install pillow") from error
    height, width = config.image_size
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file).convert("RGB" if config.image_channels == 3 else "L")
            fitted = ImageOps.fit(upright, (width, height), method=Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded: {error}.", hint="repair it or take it away") from error
    array = np.asarray(fitted, dtype=np.float32) / 255.0
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _parts(index: dict[str, Any]) -> Iterator[tuple[str, int, Array]]:
    begin = 0
    for name, rows in index["rows"].items():
        yield name, begin, np.array(rows, dtype=np.int64)
        begin += len(rows)


def _part(pixels: Array, labels: Array, num_train: int, begin: int, rows: Array) -> Dataset:
    ids = np.where(rows < num_train, rows, rows - num_train + OFFICIAL_FIRST_ID)
    return Dataset({"image": pixels[begin : begin + len(rows)]}, ids, labels[rows])
