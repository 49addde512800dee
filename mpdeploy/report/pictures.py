"""Samples as small pictures: PNG written by hand (it is a header and a zlib stream), as data URIs."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping

import numpy as np

from mpdeploy.artifact import Array

MAX_SIDE = 64
"""Longer sides are thinned out to this many pixels."""


def image_input(inputs: Mapping[str, Array]) -> str | None:
    """The first input whose samples look like pictures, or None."""
    return next((name for name, array in inputs.items() if _planes(array[0]) is not None), None) if inputs else None


def picture_of(sample: Array) -> str | None:
    """A `data:image/png` URI of one sample, its own range stretched from black to white; None where it is no picture.

    Args:
        sample: [height, width], [1 or 3, height, width] or [height, width, 1 or 3].
    """
    planes = _planes(sample)
    if planes is None:
        return None
    step = max(1, -(-max(planes.shape[:2]) // MAX_SIDE))
    values = np.asarray(planes[::step, ::step], dtype=np.float64)
    finite = np.where(np.isfinite(values), values, 0.0)
    low, high = float(finite.min()), float(finite.max())
    pixels = np.round((finite - low) * (255.0 / (high - low) if high > low else 0.0)).astype(np.uint8)
    return "data:image/png;base64," + base64.b64encode(_png(pixels)).decode("ascii")


def _planes(sample: Array) -> Array | None:
    """The sample as [height, width, 1 or 3], or None."""
    if not np.issubdtype(sample.dtype, np.number) or np.issubdtype(sample.dtype, np.complexfloating):
        return None
    if sample.ndim == 2 and np.issubdtype(sample.dtype, np.floating):
        sample = sample[:, :, None]
    elif sample.ndim == 3 and sample.shape[0] in (1, 3):
        sample = np.moveaxis(sample, 0, 2)
    if sample.ndim != 3 or sample.shape[2] not in (1, 3) or not all(4 <= side <= 4096 for side in sample.shape[:2]):
        return None
    return sample


def _png(pixels: Array) -> bytes:
    height, width, channels = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)  # 0: no row filter

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
