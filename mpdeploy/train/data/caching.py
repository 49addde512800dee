"""Decoded samples kept on disk, so that they are decoded once: a memory-mapped array and a small index, found again by a digest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import Array
from mpdeploy.files import atomic_folder, remove_partials, write_json

_ARRAY, _INDEX = "samples.npy", "index.json"
Write = Callable[[Path], dict[str, Any]]
"""Write the array at the path with `new_array`; returns the index."""


def cache_folder(given: str | None) -> Path:
    """Where decoded samples are kept: what was given, else `mpdeploy` in the user's cache folder."""
    if given is not None:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpdeploy"


def cached(folder: Path, name: str, write: Write) -> tuple[Array, dict[str, Any]]:
    """The array and index kept under `name`, written first where they are not there.

    An entry appears whole or not at all: a process that is killed while it decodes leaves nothing that a later one would take for
    finished, and the later one removes what was left. The array is mapped from the file; what is written to it stays in memory.

    Args:
        folder: the cache.
        name: a digest of all that the content depends on.
        write: makes the content; called only where it is not there.
    """
    entry = folder / name
    if not (entry / _INDEX).is_file():
        remove_partials(folder)
        with atomic_folder(entry) as temporary:
            index = write(temporary / _ARRAY)
            write_json(temporary / _INDEX, index)
    index = json.loads((entry / _INDEX).read_text(encoding="utf-8"))
    return np.load(entry / _ARRAY, mmap_mode="c", allow_pickle=False), index


def new_array(path: Path, shape: tuple[int, ...]) -> Array:
    """A float32 array in a new file, to be filled in."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
