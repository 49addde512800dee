"""IDX files, the format of MNIST: a magic number, big-endian axes, then bytes."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from mpdeploy.artifact import Array
from mpdeploy.errors import DataError

UNSIGNED_BYTES = 0x08


def read_idx(path: Path, *, axes: int) -> tuple[Array, str]:
    """An IDX file of unsigned bytes, gz or not: (uint8 array, sha256 of the unpacked bytes).

    Args:
        path: the file; what is packed with gzip is unpacked, whatever its name.
        axes: how many the array must have (3 for images, 1 for labels).

    Raises:
        DataError: not an IDX file of bytes with that many axes, truncated, or longer than its header says.
    """
    raw = _unpacked(path)
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise DataError(
            f"{path} is not an IDX file: it begins with {raw[:4].hex() or 'nothing'}.", hint="IDX begins with 0000 08"
        )
    kind, found = raw[2], raw[3]
    if kind != UNSIGNED_BYTES or found != axes:
        raise DataError(
            f"{path} holds type 0x{kind:02x} with {found} axes, expected unsigned bytes (0x08) with {axes}.",
            hint="images have three axes and labels one: are two files mixed up?",
        )
    begin = 4 + 4 * axes
    if len(raw) < begin:
        raise DataError(f"{path} is truncated: {len(raw)} bytes, its header alone has {begin}.", hint="get it again")
    shape = struct.unpack(f">{axes}I", raw[4:begin])
    expected = begin + math.prod(shape)
    if len(raw) != expected:
        what = "is truncated" if len(raw) < expected else "has bytes left over"
        raise DataError(
            f"{path} {what}: {len(raw):,} bytes, its header says {expected:,} ({'x'.join(map(str, shape))}).",
            hint="get the file again",
        )
    return np.frombuffer(raw, np.uint8, offset=begin).reshape(shape), hashlib.sha256(raw).hexdigest()


def _unpacked(path: Path) -> bytes:
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}.", hint="get the file again") from error


def write_idx(path: Path, array: Array) -> None:
    """Write unsigned bytes as IDX, packed where the name ends with .gz (the same bytes for the same array)."""
    array = np.ascontiguousarray(array, dtype=np.uint8)
    raw = bytes([0, 0, UNSIGNED_BYTES, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
