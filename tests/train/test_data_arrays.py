"""`.npz` files: split, official, and refused with their place."""

from __future__ import annotations

import numpy as np
import pytest

from mpdeploy.config import DataConfig
from mpdeploy.errors import DataError
from mpdeploy.train.data import load_arrays

RNG = np.random.default_rng(0)


def config(folder, **fields) -> DataConfig:
    return DataConfig(load=load_arrays, folder=str(folder), **fields)


def arrays(count: int, **changes):
    base = {
        "x": RNG.random((count, 3), np.float32),
        "y": np.arange(count * 2).reshape(count, 2),
        "labels": np.arange(count) % 4,
    }
    return {name: value for name, value in {**base, **changes}.items() if value is not None}


def test_one_file_is_split_and_arrays_stay_as_they_are(tmp_path):
    found = arrays(100)
    np.savez(tmp_path / "all.npz", **found)
    splits = load_arrays(config(tmp_path))
    assert splits.sizes() == {"train": 60, "early_stopping": 10, "calibration": 10, "gate": 20}
    assert list(splits.gate.inputs) == ["x", "y"]
    for name in ("x", "y"):
        np.testing.assert_array_equal(splits.train.inputs[name], found[name][splits.train.ids])
    assert list(splits.train.labels) == list(splits.train.ids % 4)
    assert splits.classes == ("0", "1", "2", "3")


def test_test_npz_is_the_gates_and_names_are_labels_too(tmp_path):
    names = np.array(["no", "yes"])
    np.savez(tmp_path / "train.npz", **arrays(50, labels=names[np.arange(50) % 2]))
    np.savez(
        tmp_path / "test.npz", **arrays(10, y=np.arange(1000, 1020).reshape(10, 2), labels=names[np.arange(10) % 2])
    )
    splits = load_arrays(config(tmp_path))
    assert (len(splits.gate), splits.classes) == (10, ("no", "yes"))
    assert list(splits.gate.labels) == [0, 1] * 5


def test_samples_that_repeat_are_in_one_split_only(tmp_path):
    found = arrays(100)
    found["x"][50:], found["y"][50:] = found["x"][:50], found["y"][:50]
    np.savez(tmp_path / "all.npz", **found)
    splits = load_arrays(config(tmp_path))
    assert sum(splits.sizes().values()) == 50
    assert splits.notes == ("removed 50 of 100 samples that repeat an earlier one, 50 of them with another label",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "must hold an array 'labels' and one array a model input; it holds x, y"),
        ({"x": None, "y": None}, "must hold an array 'labels' and one array a model input; it holds labels"),
        ({"x": np.zeros((9, 3))}, "arrays of different lengths along axis 0: {'x': 9, 'y': 40, 'labels': 40}"),
        ({"x": np.full((40, 3), np.nan)}, "'x' is NaN or infinite, first in sample 0"),
        ({"labels": np.zeros((40, 2), int)}, r"'labels' is int64\[40, 2\], expected one class number or name a sample"),
        ({"labels": np.linspace(0, 1, 40)}, r"'labels' is float64\[40\]"),
        ({"labels": np.arange(40) - 1}, r"all\.npz, sample 0: the label -1 is no class"),
        ({"labels": np.arange(40) % 2 * 2}, "No sample has the label 1"),
        ({"x": np.array([{}] * 40)}, "is not a readable .npz file"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    np.savez(tmp_path / "all.npz", **arrays(40, **changes))
    with pytest.raises(DataError, match=message):
        load_arrays(config(tmp_path))


def test_files_that_do_not_fit_each_other_are_refused(tmp_path):
    np.savez(tmp_path / "train.npz", **arrays(40))
    np.savez(tmp_path / "test.npz", **arrays(40, x=np.zeros((40, 4), np.float32)))
    with pytest.raises(DataError, match=r"test\.npz holds .*\(4,\).*train\.npz .*\(3,\)"):
        load_arrays(config(tmp_path))


@pytest.mark.parametrize("names", [(), ("a.npz", "b.npz")])
def test_a_folder_with_none_or_too_many_files_is_refused(tmp_path, names):
    for name in names:
        np.savez(tmp_path / name, **arrays(40))
    with pytest.raises(DataError, match=r"must hold train\.npz and test\.npz, or one \.npz file; it holds"):
        load_arrays(config(tmp_path))


def test_a_truncated_file_is_refused(tmp_path):
    np.savez(tmp_path / "all.npz", **arrays(40))
    (tmp_path / "all.npz").write_bytes((tmp_path / "all.npz").read_bytes()[:200])
    with pytest.raises(DataError, match=r"all\.npz is not a readable \.npz file"):
        load_arrays(config(tmp_path))


def test_a_class_of_the_gate_that_is_not_trained_is_refused(tmp_path):
    np.savez(tmp_path / "train.npz", **arrays(40, labels=np.arange(40) % 3))
    np.savez(tmp_path / "test.npz", **arrays(10, y=np.arange(2000, 2020).reshape(10, 2), labels=np.full(10, 3)))
    with pytest.raises(DataError, match="The gate holds samples of class 3, and the training split has none of it"):
        load_arrays(config(tmp_path))
