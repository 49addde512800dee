"""Samples from outside: every way to give them, and every way to give them wrongly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpdeploy.artifact import TensorSpec
from mpdeploy.data_files import MAX_BATCH, MIN_FEEDS, FeedSet, load_feeds, load_labels
from mpdeploy.errors import DataError, UserCodeError

X = TensorSpec("x", "float32", ("N", 4))
MASK = TensorSpec("mask", "int64", ("N", "L"))
FIXED = TensorSpec("x", "float32", (2, 4))


def _npz(folder: Path, name: str = "d.npz", **arrays: Any) -> str:
    np.savez(folder / name, **arrays)
    return str(folder / name)


def _load(source: str, *specs: TensorSpec) -> FeedSet:
    return load_feeds(source, specs or (X,), where="net.onnx")


def _rows(count: int) -> np.ndarray:
    return np.arange(count * 4, dtype=np.float32).reshape(count, 4)


# ---- splitting


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100, 1000])
def test_a_symbolic_first_axis_is_split_into_feeds_that_hold_every_sample_once(tmp_path: Path, count: int) -> None:
    feeds = _load(_npz(tmp_path, x=_rows(count)))
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in feeds]), _rows(count))
    assert all(1 <= len(feed["x"]) <= MAX_BATCH for feed in feeds)
    assert len(feeds) >= min(count, MIN_FEEDS)
    assert feeds.num_samples == count
    assert feeds.batched == {"x"}


def test_all_symbolic_inputs_are_split_alike(tmp_path: Path) -> None:
    feeds = _load(_npz(tmp_path, x=_rows(20), mask=np.arange(60).reshape(20, 3)), X, MASK)
    for feed in feeds:
        assert len(feed["x"]) == len(feed["mask"])
        np.testing.assert_array_equal(feed["mask"][:, 0], feed["x"][:, 0] / 4 * 3)


def test_an_array_of_the_declared_shape_is_a_single_feed(tmp_path: Path) -> None:
    feeds = _load(_npz(tmp_path, x=_rows(2)), FIXED)
    assert len(feeds) == 1
    assert feeds.num_samples == 1
    assert feeds.feeds[0]["x"].shape == (2, 4)


def test_a_fixed_input_beside_a_split_one_is_given_whole_to_every_feed(tmp_path: Path) -> None:
    anchors = TensorSpec("anchors", "float32", (3,))
    feeds = _load(_npz(tmp_path, x=_rows(20), anchors=np.ones(3, np.float32)), X, anchors)
    assert len(feeds) > 1
    assert all(feed["anchors"].shape == (3,) for feed in feeds)


def test_first_axes_of_different_length_are_one_feed(tmp_path: Path) -> None:
    """They do not mean samples: nodes and edges of a graph, say."""
    edges = TensorSpec("e", "float32", ("E", 4))
    feeds = _load(_npz(tmp_path, x=_rows(6), e=_rows(9)), X, edges)
    assert len(feeds) == 1
    assert {name: len(array) for name, array in feeds.feeds[0].items()} == {"x": 6, "e": 9}


def test_a_scalar_and_an_input_of_unknown_rank_are_taken_as_they_are(tmp_path: Path) -> None:
    specs = (TensorSpec("t", "float32", ()), TensorSpec("u", "float32", None))
    feeds = _load(_npz(tmp_path, t=np.float32(1), u=_rows(3)), *specs)
    assert len(feeds) == 1
    assert feeds.feeds[0]["u"].shape == (3, 4)


# ---- sources


def test_a_folder_holds_a_file_a_batch_in_name_order(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        _npz(tmp_path, f"{number}.npz", x=np.full((1, 4), number, np.float32))
    assert [feed["x"][0, 0] for feed in _load(str(tmp_path))] == [0, 1, 2]


def test_files_of_a_folder_may_differ_in_length(tmp_path: Path) -> None:
    _npz(tmp_path, "a.npz", mask=np.ones((2, 5), np.int64))
    _npz(tmp_path, "b.npz", mask=np.ones((2, 9), np.int64))
    assert [feed["mask"].shape[1] for feed in _load(str(tmp_path), MASK)] == [5, 5, 9, 9]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def write(text: str) -> str:
        name = f"samples_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{name}.py").write_text(f"import numpy as np\n{text}\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return f"{name}:samples"

    return write


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ("def samples():\n    return {'x': np.zeros((5, 4), np.float32)}", 5),
        ("def samples():\n    return [{'x': np.zeros((1, 4), np.float32)}] * 3", 3),
        ("def samples():\n    for i in range(4):\n        yield {'x': np.zeros((2, 4), np.float32)}", 8),
    ],
    ids=["a dict", "a list", "a generator"],
)
def test_a_function_gives_a_dict_or_an_iterable_of_such(module: Any, body: str, count: int) -> None:
    assert _load(module(body)).num_samples == count


def test_a_function_that_gives_something_else_is_an_error(module: Any) -> None:
    with pytest.raises(DataError, match="returned int, expected a dict of arrays or an iterable of such"):
        _load(module("def samples():\n    return 3"))


def test_a_function_that_fails_shows_the_users_own_traceback(module: Any) -> None:
    with pytest.raises(UserCodeError, match="no such thing") as raised:
        _load(module("def samples():\n    raise KeyError('no such thing')"))
    assert raised.value.exit_code == 20


@pytest.mark.parametrize("source", ["no_such_module:samples", "json:no_such_function"])
def test_a_function_that_is_not_there_is_an_error(source: str) -> None:
    with pytest.raises(DataError, match=f"Cannot import {source}"):
        _load(source)


def test_nothing_at_the_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no data at .*none.npz") as raised:
        _load(str(tmp_path / "none.npz"))
    assert "module:function" in str(raised.value)
    assert raised.value.exit_code == 2


def test_a_folder_without_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no .npz file"):
        _load(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_npz_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"is not a readable .npz file"):
        _load(str(tmp_path / "d.npz"))


def test_a_truncated_npz_is_an_error(tmp_path: Path) -> None:
    path = Path(_npz(tmp_path, x=_rows(100)))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"is not a readable .npz file"):
        _load(str(path))


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a readable .npz file") as raised:
        _load(_npz(tmp_path, x=np.array([{"a": 1}], dtype=object)))
    assert "pickle" in str(raised.value).lower()


def test_a_bare_array_is_an_error_that_shows_how_to_name_it(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", _rows(3))
    with pytest.raises(DataError, match="holds a bare array") as raised:
        _load(str(tmp_path / "d.npy"))
    assert "numpy.savez(path, INPUT_NAME=array)" in str(raised.value)


def test_no_samples_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no samples"):
        _load(_npz(tmp_path, x=np.zeros((0, 4), np.float32)))


# ---- names, shapes, dtypes


def test_a_wrong_name_is_an_error_with_the_closest_one(tmp_path: Path) -> None:
    specs = (TensorSpec("pixel_values", "float32", ("N", 4)),)
    with pytest.raises(DataError, match="has no input named 'pixel_value'") as raised:
        _load(_npz(tmp_path, pixel_value=_rows(2)), *specs)
    assert "closest names: pixel_values" in str(raised.value)
    assert "net.onnx" in str(raised.value)


def test_a_missing_input_is_an_error_that_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs an array for its input 'mask: int64\[N, L\]', found: x"):
        _load(_npz(tmp_path, x=_rows(2)), X, MASK)


@pytest.mark.parametrize("shape", [(3, 5), (3,), (3, 4, 1)])
def test_a_shape_that_does_not_fit_is_an_error_with_both(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"'x: float32\[N, 4\]' of net.onnx .* was given float32\["):
        _load(_npz(tmp_path, x=np.zeros(shape, np.float32)))


@pytest.mark.parametrize(
    ("given", "declared"),
    [("float64", "float32"), ("float16", "float32"), ("float32", "float16"), ("int32", "int64"), ("int64", "int32"),
     ("uint8", "int64"), ("bool", "int64"), ("int64", "bool")],
)  # fmt: skip
def test_a_dtype_that_loses_nothing_but_float_precision_is_fitted(tmp_path: Path, given: str, declared: str) -> None:
    array = np.array([[0, 1, 1, 0]]).astype(given)
    feeds = _load(_npz(tmp_path, x=array), TensorSpec("x", declared, ("N", 4)))
    assert str(feeds.feeds[0]["x"].dtype) == declared
    np.testing.assert_array_equal(feeds.feeds[0]["x"], array)


@pytest.mark.parametrize(
    ("array", "declared"),
    [
        (np.array([[2**40, 0, 0, 0]]), "int32"),
        (np.array([[-1, 0, 0, 0]]), "uint8"),
        (np.array([[2, 0, 0, 0]]), "bool"),
        (np.array([[1, 2, 3, 4]]), "float32"),
        (np.array([[1.5, 0, 0, 0]]), "int64"),
    ],
    ids=["too large", "negative", "not a bool", "integers for floats", "floats for integers"],
)
def test_a_dtype_that_would_change_values_is_an_error(tmp_path: Path, array: np.ndarray, declared: str) -> None:
    with pytest.raises(DataError, match=f"was given {array.dtype}") as raised:
        _load(_npz(tmp_path, x=array), TensorSpec("x", declared, ("N", 4)))
    assert f"astype('{declared}')" in str(raised.value)


def test_bfloat16_is_fitted_too(tmp_path: Path) -> None:
    feeds = _load(_npz(tmp_path, x=_rows(1)), TensorSpec("x", "bfloat16", ("N", 4)))
    assert str(feeds.feeds[0]["x"].dtype) == "bfloat16"


# ---- NaN


def test_a_nan_is_reported_with_its_array_sample_and_place(tmp_path: Path) -> None:
    x = _rows(50)
    x[37, 2] = np.nan
    with pytest.raises(DataError, match=r"'x' in .*d.npz holds NaN, first in sample 37 \(index \[37, 2\]\)"):
        _load(_npz(tmp_path, x=x))


def test_a_nan_in_a_folder_names_its_file(tmp_path: Path) -> None:
    _npz(tmp_path, "a.npz", x=_rows(2))
    _npz(tmp_path, "b.npz", x=np.full((2, 4), np.nan, np.float32))
    with pytest.raises(DataError, match=r"b\.npz.*holds NaN, first in sample 0"):
        _load(str(tmp_path))


def test_a_nan_in_a_single_feed_is_reported(tmp_path: Path) -> None:
    x = _rows(2)
    x[1, 1] = np.nan
    with pytest.raises(DataError, match=r"holds NaN, first in the feed \(index \[1, 1\]\)"):
        _load(_npz(tmp_path, x=x), FIXED)


def test_infinity_is_data(tmp_path: Path) -> None:
    assert _load(_npz(tmp_path, x=np.full((2, 4), -np.inf, np.float32))).num_samples == 2


# ---- digest and labels


def test_equal_data_has_equal_digests_and_other_data_another(tmp_path: Path) -> None:
    first, again = _load(_npz(tmp_path, "a.npz", x=_rows(5))), _load(_npz(tmp_path, "b.npz", x=_rows(5)))
    other = _load(_npz(tmp_path, "c.npz", x=_rows(5) + 1))
    assert first.digest == again.digest != other.digest


def test_labels_are_one_array(tmp_path: Path) -> None:
    assert load_labels(Path(_npz(tmp_path, labels=np.arange(3)))).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="must hold one array of labels, found: a, b"):
        load_labels(Path(_npz(tmp_path, a=np.arange(3), b=np.arange(3))))
