"""Tensors on the wire: the data types of the Open Inference Protocol (V2), their numpy dtypes, raw bytes and JSON.

Raw: row-major, little-endian, one after another. A BYTES tensor holds, for each element, its length as uint32 and its bytes.
JSON: a flat or nested list. Beyond the protocol, FP16 and BF16 are taken as JSON numbers, and a number that is not finite is
the string "NaN", "Infinity" or "-Infinity" (as in protobuf's JSON form); `null` is read as NaN.

Every fault of a client raises BadRequestError with `where` (which tensor) in its message.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import ml_dtypes
import numpy as np

from mpdeploy.artifact import Array
from mpdeploy.errors import closest_names
from mpdeploy.serve.messages import BadRequestError

assert sys.byteorder == "little", "the wire is little-endian; this machine is not"

BF16 = np.dtype(ml_dtypes.bfloat16)
NUMPY_OF: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BF16": BF16,
    "BYTES": np.dtype(np.object_),
}
"""V2 datatype -> numpy dtype. BYTES tensors are object arrays of `bytes`."""
DATATYPE_OF: Mapping[np.dtype[Any], str] = {dtype: name for name, dtype in NUMPY_OF.items()}
MAX_RANK = 32
MAX_ELEMENTS = 2**40

Raw = bytes | bytearray | memoryview
_NOT_FINITE: Mapping[Any, float] = {None: math.nan, "NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def numpy_dtype(datatype: Any, where: str) -> np.dtype[Any]:
    """The numpy dtype of a V2 datatype.

    Raises:
        BadRequestError: there is no such datatype.
    """
    found = NUMPY_OF.get(datatype) if isinstance(datatype, str) else None
    if found is None:
        raise BadRequestError(
            f"{where}: there is no datatype {_short(datatype)}; one of {', '.join(NUMPY_OF)} was expected"
            + (f" (closest: {closest_names(datatype, NUMPY_OF, count=1)})" if isinstance(datatype, str) else "")
        )
    return found


def datatype_of(dtype: np.dtype[Any] | str) -> str:
    """The V2 datatype of a numpy dtype, or of a dtype as `TensorSpec` names it (`float32`, `bfloat16`, `object`).

    Raises:
        KeyError: the protocol has none (complex numbers, 4-bit integers, ...).
    """
    if isinstance(dtype, str):
        dtype = BF16 if dtype == "bfloat16" else np.dtype(dtype)
    return "BYTES" if dtype.kind in "SU" else DATATYPE_OF[dtype]


def item_bytes(datatype: str) -> int | None:
    """Bytes of one element; None for BYTES, where each has its own length."""
    return None if datatype == "BYTES" else NUMPY_OF[datatype].itemsize


def checked_shape(shape: Any, where: str) -> tuple[int, ...]:
    """A shape as sent: a list of whole numbers from 0 up, of a size that can be multiplied out.

    Raises:
        BadRequestError: it is something else.
    """
    if type(shape) is not list and type(shape) is not tuple:
        raise BadRequestError(f"{where}: 'shape' must be a list of whole numbers, found {_short(shape)}")
    if len(shape) > MAX_RANK:
        raise BadRequestError(f"{where}: 'shape' has {len(shape)} axes; {MAX_RANK} is the most")
    size = 1
    for axis in shape:
        if type(axis) is not int or axis < 0:
            raise BadRequestError(f"{where}: 'shape' must hold whole numbers from 0 up, found {_short(axis)}")
        size *= axis or 1
    if size > MAX_ELEMENTS:  # also where an axis is 0: numpy refuses what it could not index
        raise BadRequestError(f"{where}: 'shape' {_short(list(shape))} is too large")
    return tuple(shape)


def num_elements(shape: Sequence[int]) -> int:
    """The product of a checked shape, as a Python int: it cannot overflow."""
    return math.prod(shape)


# -- raw bytes ---------------------------------------------------------------------------------------------------------


def array_from_raw(datatype: Any, shape: Any, raw: Raw, where: str) -> Array:
    """A tensor from its raw bytes, without a copy where they lie aligned: the array is then read-only and keeps `raw` alive.

    Raises:
        BadRequestError: datatype, shape and number of bytes do not fit one another.
    """
    dtype = numpy_dtype(datatype, where)
    axes = checked_shape(shape, where)
    if datatype == "BYTES":
        return _bytes_from_raw(axes, raw, where)
    needed = math.prod(axes) * dtype.itemsize
    if len(raw) != needed:
        raise BadRequestError(
            f"{where}: {datatype}{list(axes)} takes {needed} bytes of raw data, found {len(raw)} bytes"
        )
    if datatype == "BOOL":  # a byte that is neither 0 nor 1 is no numpy bool: what computes on it is undefined
        return np.asarray(np.frombuffer(raw, np.uint8) != 0).reshape(axes)
    array: Array = np.frombuffer(raw, dtype)
    if not array.flags.aligned:  # behind a JSON header of any length, and kernels may read whole vectors
        array = np.frombuffer(
            bytes(raw), dtype
        )  # numpy's own copy would let go of the GIL for some microseconds of work
    return array.reshape(axes)


def _bytes_from_raw(shape: tuple[int, ...], raw: Raw, where: str) -> Array:
    count = math.prod(shape)
    if count * 4 > len(raw):
        raise BadRequestError(
            f"{where}: BYTES{list(shape)} takes at least {count * 4} bytes of raw data, found {len(raw)} bytes"
        )
    elements = np.empty(count, np.object_)
    content, position = bytes(raw), 0
    for index in range(count):
        start = position + 4
        if start > len(content):
            raise BadRequestError(f"{where}: the raw data ends before the length of element {index} of {count}")
        (length,) = struct.unpack_from("<I", content, position)
        position = start + length
        if position > len(content):
            raise BadRequestError(
                f"{where}: element {index} of {count} says it has {length} bytes, {len(content) - start} are left"
            )
        elements[index] = content[start:position]
    if position != len(content):
        raise BadRequestError(f"{where}: {len(content) - position} bytes of raw data are left after {count} elements")
    return elements.reshape(shape)


def raw_from_array(array: Array) -> bytes:
    """A tensor's raw bytes."""
    if array.dtype.kind in "OSU":
        parts: list[bytes] = []
        for element in array.ravel():
            content = element.encode() if isinstance(element, str) else bytes(element)
            parts += (struct.pack("<I", len(content)), content)
        return b"".join(parts)
    return array.tobytes()


# -- JSON --------------------------------------------------------------------------------------------------------------


def array_from_json(datatype: Any, shape: Any, data: Any, where: str) -> Array:
    """A tensor from its JSON data, flat or nested.

    Raises:
        BadRequestError: the data are of another type, number or nesting, or do not fit the datatype.
    """
    dtype = numpy_dtype(datatype, where)
    axes = checked_shape(shape, where)
    if type(data) is not list:
        raise BadRequestError(f"{where}: 'data' must be a list, found {_short(data)}")
    values, kinds, nesting = _flattened(data, where)
    if len(values) != math.prod(axes):
        raise BadRequestError(
            f"{where}: {datatype}{list(axes)} takes {math.prod(axes)} elements, 'data' has {len(values)}"
        )
    if len(nesting) > 1 and nesting != axes:
        raise BadRequestError(f"{where}: 'data' is nested as {list(nesting)}, 'shape' says {list(axes)}")
    return _READ[dtype.kind](values, kinds, datatype, where).reshape(axes)


def json_from_array(array: Array, where: str) -> list[Any]:
    """A tensor as a flat list for JSON.

    Raises:
        BadRequestError: bytes that are no UTF-8: they can only be answered in binary.
    """
    kind = array.dtype.kind
    if kind in "OSU":
        try:
            return [item if isinstance(item, str) else bytes(item).decode() for item in array.ravel()]
        except UnicodeDecodeError as error:
            raise BadRequestError(
                f"{where}: an element is no UTF-8 text ({error.reason}); ask for it with 'binary_data': true"
            ) from error
    if kind in "biu":
        return list(array.ravel().tolist())
    flat = array.ravel() if kind == "f" and array.dtype.itemsize > 2 else array.astype(np.float32).ravel()
    values: list[Any] = flat.tolist()
    finite = np.isfinite(flat)
    if not finite.all():
        for index in np.flatnonzero(~finite).tolist():
            value = values[index]
            values[index] = "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return values


def _flattened(data: list[Any], where: str) -> tuple[list[Any], set[type], tuple[int, ...]]:
    """The elements of a flat or evenly nested list, their types, and the shape it is nested as."""
    values, nesting = data, [len(data)]
    kinds = set(map(type, values))
    while kinds == {list}:
        lengths = set(map(len, values))
        nesting.append(lengths.pop())
        if lengths or len(nesting) > MAX_RANK:
            raise BadRequestError(f"{where}: 'data' is not evenly nested")
        values = list(chain.from_iterable(values))
        kinds = set(map(type, values))
    if list in kinds:
        raise BadRequestError(f"{where}: 'data' is not evenly nested")
    return values, kinds, tuple(nesting)


def _bools(values: list[Any], kinds: set[type], datatype: str, where: str) -> Array:
    if not kinds <= {bool}:
        raise _wrong_element(values, (bool,), datatype, where)
    return np.array(values, np.bool_)


def _integers(values: list[Any], kinds: set[type], datatype: str, where: str) -> Array:
    if not kinds <= {int}:
        raise _wrong_element(values, (int,), datatype, where)
    dtype = NUMPY_OF[datatype]
    limits = np.iinfo(dtype)
    if values and not limits.min <= (low := min(values)) <= (high := max(values)) <= limits.max:
        raise BadRequestError(f"{where}: {_short(low if low < limits.min else high)} in 'data' is no {datatype}")
    return np.array(values, dtype)


def _floats(values: list[Any], kinds: set[type], datatype: str, where: str) -> Array:
    if not kinds <= {float, int}:
        values = [_NOT_FINITE.get(value, value) if type(value) in (str, type(None)) else value for value in values]
        if not set(map(type, values)) <= {float, int}:
            raise _wrong_element(values, (float, int), datatype, where)
    dtype = NUMPY_OF[datatype]
    try:
        with np.errstate(over="ignore"):
            rounded = np.array(values, np.float64 if dtype is BF16 else dtype).astype(dtype, copy=False)
        if np.isfinite(rounded).all():
            return rounded
        array = np.array(values, np.float64)
    except OverflowError as error:
        raise BadRequestError(f"{where}: {_short(max(values, key=abs))} in 'data' is no {datatype}") from error
    if (lost := np.isinf(rounded) & np.isfinite(array)).any():
        raise BadRequestError(f"{where}: {float(array[lost][0])!r} in 'data' is no {datatype}")
    return rounded


def _texts(values: list[Any], kinds: set[type], datatype: str, where: str) -> Array:
    if not kinds <= {str}:
        raise _wrong_element(values, (str,), datatype, where)
    array = np.empty(len(values), np.object_)
    for index, value in enumerate(values):
        array[index] = value.encode("utf-8", "surrogatepass")
    return array


_READ: Mapping[str, Callable[[list[Any], set[type], str, str], Array]] = {
    "b": _bools,
    "i": _integers,
    "u": _integers,
    "f": _floats,
    BF16.kind: _floats,
    "O": _texts,
}
"""Kind of numpy dtype -> what reads it."""


def _wrong_element(values: list[Any], kinds: tuple[type, ...], datatype: str, where: str) -> BadRequestError:
    other = next(value for value in values if type(value) not in kinds)
    return BadRequestError(f"{where}: {_short(other)} in 'data' is no {datatype}")


def _short(value: Any) -> str:
    """What was found, for a message: never longer than a line, never slow to write."""
    if isinstance(value, dict | list | tuple) and (len(value) > 8 or any(isinstance(i, dict | list) for i in value)):
        return f"a {'nested ' if len(value) <= 8 else ''}{type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to write out very long whole numbers
        return "a whole number of over 300 digits"
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
