"""What loaders of folders share: the folder itself, class names, and labels as class numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mpdeploy.artifact import Array
from mpdeploy.config import DataConfig
from mpdeploy.errors import ConfigError, DataError, closest_names


def data_folder(config: DataConfig, what: str) -> Path:
    """`data.folder`, which must be there.

    Args:
        config: the pipeline's.
        what: what lies in it, for the error.

    Raises:
        ConfigError: it is not given, or there is no such folder.
    """
    if config.folder is None:
        raise ConfigError(f"data.folder is not set: it names the folder with {what}.", hint="--set data.folder=DIR")
    folder = Path(config.folder)
    if not folder.is_dir():
        raise ConfigError(f"data.folder={config.folder} is not a folder.", hint=f"give the folder with {what}")
    return folder


def listed(folder: Path, limit: int = 6) -> str:
    """The first names in a folder, for an error."""
    names = sorted(item.name for item in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"


def numbered(labels: Sequence[str | int], config: DataConfig, where: Iterable[str]) -> tuple[Array, tuple[str, ...]]:
    """Labels as class numbers, and the names of the classes.

    Numbers stay what they are (0 is the first output); names are numbered in the order of `data.classes`, else in alphabetical order.

    Args:
        labels: one a sample, all numbers or all names.
        config: its `classes` are used where they are given.
        where: the place of each sample, for errors.

    Raises:
        DataError: a label that `data.classes` does not have, a negative number, or a class between others without a sample.
    """
    if all(isinstance(label, int) for label in labels):
        numbers = np.array(labels, dtype=np.int64)
        count = len(config.classes) or int(numbers.max(initial=-1)) + 1
        classes = config.classes or tuple(str(number) for number in range(count))
        _refuse((numbers < 0) | (numbers >= count), labels, where, f"labels are 0 to {count - 1}")
        if not config.classes and len(np.unique(numbers)) < count:
            missing = np.setdiff1d(np.arange(count), numbers)[0]
            raise DataError(
                f"No sample has the label {missing}, and others have labels up to {count - 1}.",
                hint="number the classes from 0 without a gap, or name them all in data.classes",
            )
        return numbers, classes
    classes = config.classes or tuple(sorted({str(label) for label in labels}))
    number_of = {name: number for number, name in enumerate(classes)}
    numbers = np.array([number_of.get(str(label), -1) for label in labels], dtype=np.int64)
    if numbers.min(initial=0) < 0:
        unknown = str(labels[int(np.argmax(numbers < 0))])
        _refuse(numbers < 0, labels, where, f"closest classes: {closest_names(unknown, classes)}")
    return numbers, classes


def _refuse(bad: Array, labels: Sequence[str | int], where: Iterable[str], hint: str) -> None:
    if not bad.any():
        return
    position = int(np.argmax(bad))
    place = next(text for number, text in enumerate(where) if number == position)
    raise DataError(
        f"{place}: the label {labels[position]!r} is no class of this data ({int(bad.sum()):,} such samples).",
        hint=hint,
    )
