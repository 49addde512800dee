"""Tensors on the wire: every datatype there and back, and every way in which bytes, shapes and JSON can disagree."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdeploy.serve.dtypes import (
    NUMPY_OF,
    array_from_json,
    array_from_raw,
    datatype_of,
    json_from_array,
    raw_from_array,
)
from mpdeploy.serve.messages import BadRequestError


def sample(datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(len(shape))
    count = int(np.prod(shape))
    if datatype == "BYTES":
        array = np.empty(count, np.object_)
        array[:] = (
            [b"", "ä€".encode(), b"x" * 300][:1] * count
            if count < 3
            else [b"", "ä€".encode(), b"x" * (count - 2)] * (count // 3) + [b"y"] * (count % 3)
        )
        return array.reshape(shape)
    if datatype == "BOOL":
        return (rng.integers(0, 2, count) > 0).reshape(shape)
    if "INT" in datatype:
        limits = np.iinfo(NUMPY_OF[datatype])
        return rng.integers(limits.min, limits.max, count, dtype=NUMPY_OF[datatype], endpoint=True).reshape(shape)
    return rng.standard_normal(count).astype(NUMPY_OF[datatype]).reshape(shape)


@pytest.mark.parametrize("shape", [(3,), (2, 6), (0, 4), (), (1, 1, 1, 7)])
@pytest.mark.parametrize("datatype", list(NUMPY_OF))
def test_every_datatype_survives_raw_bytes_and_json(datatype, shape):
    array = sample(datatype, shape)
    raw = array_from_raw(datatype, list(shape), raw_from_array(array), "x")
    assert raw.dtype == array.dtype
    np.testing.assert_array_equal(raw, array)
    data = json.loads(json.dumps(json_from_array(array, "x")))
    back = array_from_json(datatype, list(shape), data, "x")
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_a_datatype_has_one_numpy_dtype_and_back():
    assert [datatype_of(dtype) for dtype in NUMPY_OF.values()] == list(NUMPY_OF)
    assert [datatype_of(name) for name in ("float32", "bfloat16", "object", "bool")] == [
        "FP32",
        "BF16",
        "BYTES",
        "BOOL",
    ]


def test_numbers_that_are_not_finite_survive_json():
    array = np.array([np.nan, np.inf, -np.inf, 1.5], np.float32)
    data = json_from_array(array, "x")
    assert data == ["NaN", "Infinity", "-Infinity", 1.5]
    np.testing.assert_array_equal(array_from_json("FP32", [4], data, "x"), array)
    np.testing.assert_array_equal(array_from_json("FP16", [1], [None], "x"), np.array([np.nan], np.float16))


def test_nested_json_is_read_where_it_is_nested_as_the_shape_says():
    np.testing.assert_array_equal(array_from_json("INT8", [2, 2], [[1, 2], [3, 4]], "x"), [[1, 2], [3, 4]])
    with pytest.raises(BadRequestError, match=r"nested as \[2, 2\], 'shape' says \[4\]"):
        array_from_json("INT8", [4], [[1, 2], [3, 4]], "x")


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "message"),
    [
        ("FP32", [1], ["1.5"], "'1.5' in 'data' is no FP32"),
        ("FP32", [1], [1e39], "is no FP32"),
        ("FP16", [1], [65520], "is no FP16"),
        ("FP64", [1], [10**400], "over 300 digits"),
        ("FP32", [1], [True], "True in 'data' is no FP32"),
        ("INT8", [1], [128], "128 in 'data' is no INT8"),
        ("INT8", [1], [1.0], "1.0 in 'data' is no INT8"),
        ("UINT64", [2], [2**63, -1], "-1 in 'data' is no UINT64"),
        ("INT64", [1], [2**63], "is no INT64"),
        ("BOOL", [1], [1], "1 in 'data' is no BOOL"),
        ("BYTES", [1], [{}], "in 'data' is no BYTES"),
        ("FP32", [2], [[1], [1, 2]], "not evenly nested"),
        ("FP32", [2], [1, [2]], "not evenly nested"),
        ("FP32", [3], [1, 2], "takes 3 elements, 'data' has 2"),
        ("FP32", [1], 1, "'data' must be a list"),
        ("FP33", [1], [1], "no datatype 'FP33'"),
        (7, [1], [1], "no datatype 7"),
        ("FP32", [-1], [1], "whole numbers from 0 up"),
        ("FP32", [True], [1], "whole numbers from 0 up"),
        ("FP32", [1.0], [1], "whole numbers from 0 up"),
        ("FP32", "3", [1], "'shape' must be a list"),
        ("FP32", [2**40, 2**40], [1], "too large"),
        ("FP32", [0, 2**62, 2**62], [], "too large"),
        ("FP32", [1] * 33, [1], "33 axes"),
    ],
)
def test_json_that_does_not_fit_is_refused_by_name(datatype, shape, data, message):
    with pytest.raises(BadRequestError, match=message.replace("[", r"\[")) as caught:
        array_from_json(datatype, shape, data, "input 'x'")
    assert caught.value.message.startswith("input 'x'")
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "message"),
    [
        ("FP32", [2], b"1234", "takes 8 bytes of raw data, found 4 bytes"),
        ("FP32", [0], b"1234", "takes 0 bytes"),
        ("BYTES", [1], b"\x05\0\0\0abc", "says it has 5 bytes, 3 are left"),
        ("BYTES", [2], b"\0\0\0\0", "at least 8 bytes"),
        ("BYTES", [1], b"\0\0\0\0x", "1 bytes of raw data are left"),
        ("BYTES", [2], b"\x04\0\0\0abcd", "ends before the length of element 1"),
        ("BYTES", [1], b"\xff\xff\xff\xff", "4294967295 bytes"),
    ],
)
def test_raw_bytes_that_do_not_fit_are_refused(datatype, shape, raw, message):
    with pytest.raises(BadRequestError, match=message):
        array_from_raw(datatype, shape, raw, "x")


def test_raw_bytes_at_an_odd_address_become_an_aligned_array():
    wanted = np.arange(9, dtype=np.float64)
    body = memoryview(b"x" + wanted.tobytes())
    array = array_from_raw("FP64", [9], body[1:], "x")
    assert array.flags.aligned
    np.testing.assert_array_equal(array, wanted)


def test_a_bool_byte_that_is_neither_0_nor_1_is_true():
    np.testing.assert_array_equal(array_from_raw("BOOL", [3], b"\x00\x02\xff", "x"), [False, True, True])


def test_bytes_that_are_no_text_are_for_binary_only():
    array = np.array([b"\xff"], np.object_)
    with pytest.raises(BadRequestError, match="no UTF-8 text"):
        json_from_array(array, "output 'y'")


def test_bf16_keeps_its_bits():
    array = np.array([1.0, 3.140625, -0.0], ml_dtypes.bfloat16)
    assert raw_from_array(array) == array.view(np.uint16).tobytes()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(datatype=st.sampled_from([*NUMPY_OF, "FP8"]), shape=JSON, data=JSON)
def test_whatever_json_is_sent_is_an_array_or_a_refusal(datatype, shape, data):
    try:
        array = array_from_json(datatype, shape, data, "x")
    except BadRequestError:
        return
    assert list(array.shape) == list(shape)
    assert array.dtype == NUMPY_OF[datatype]
