"""Arrays in a JSON file that is committed with the code: compressed, and exact to the last bit."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import Array
from mpdeploy.errors import NotComparableError


def packed(array: Array) -> dict[str, Any]:
    """An array as compressed text in JSON; values of 0 and 1 alone take one bit each."""
    array = np.asarray(array)
    is_bits = array.ndim == 1 and bool(((array == 0) | (array == 1)).all())
    if np.issubdtype(array.dtype, np.integer) and len(array):
        array = array.astype(np.result_type(np.min_scalar_type(array.min()), np.min_scalar_type(array.max())))
    content = np.packbits(array.astype(bool)).tobytes() if is_bits else np.ascontiguousarray(array).tobytes()
    return {
        "dtype": "bits" if is_bits else array.dtype.str,
        "shape": list(array.shape),
        "data": base64.b64encode(zlib.compress(content, 9)).decode("ascii"),
    }


def unpacked(value: Mapping[str, Any], path: Path) -> Array:
    """What `packed` wrote; bits come back as float64.

    Raises:
        NotComparableError: it does not unpack; `path` is the file that it stands in.
    """
    try:
        content = zlib.decompress(base64.b64decode(value["data"], validate=True))
        shape = tuple(int(length) for length in value["shape"])
        if value["dtype"] == "bits":
            return np.unpackbits(np.frombuffer(content, dtype=np.uint8), count=shape[0]).astype(np.float64)
        return np.frombuffer(content, dtype=np.dtype(value["dtype"])).reshape(shape).copy()
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise NotComparableError(
            f"The baseline file {path} cannot be read: {error}.", hint="restore it from git"
        ) from error
