"""Splits: no sample in two of them, every class in each, and the same today as tomorrow."""

from __future__ import annotations

import numpy as np
import pytest
from small_training import blobs

from mpdeploy.artifact import Dataset
from mpdeploy.config import DataConfig
from mpdeploy.errors import DataError
from mpdeploy.train.data import load_digits
from mpdeploy.train.splits import Splits, content_digests, plan_splits, split_samples, stratified

NAMES = ("train", "early_stopping", "calibration", "gate")


def four(**changes: Dataset) -> Splits:
    parts = {name: blobs(8, 100 * number) for number, name in enumerate(NAMES)}
    return Splits(**{**parts, **changes})


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_split_that_shares_a_sample_with_the_gates_is_refused(name):
    shared = blobs(8, 300)
    with pytest.raises(DataError, match=f"The splits '{name}' and 'gate' share 8 samples, for example id 300"):
        four(**{name: shared})


def test_one_shared_sample_is_enough():
    one = blobs(8, 0)
    with pytest.raises(DataError, match="share 1 samples, for example id 7"):
        four(calibration=blobs(8, 7), train=one)


def test_an_empty_split_is_refused():
    with pytest.raises(DataError, match="The split 'calibration' is empty"):
        four(calibration=blobs(8, 200).take(slice(0, 0)))


def test_ids_that_repeat_within_a_split_are_refused():
    data = blobs(8, 0)
    with pytest.raises(DataError, match="Sample ids repeat"):
        Dataset(data.inputs, np.zeros(8, dtype=np.int64), data.labels)


@pytest.mark.parametrize("name", NAMES)
def test_the_digest_sees_every_split(name):
    other = blobs(8, 100 * NAMES.index(name))
    other.inputs["x"][3, 2] += 1
    assert four().digest == four().digest != four(**{name: other}).digest


@pytest.fixture(scope="module")
def digits() -> Splits:
    return load_digits(DataConfig(load=load_digits))


def test_the_digits_are_all_there_and_in_one_split_each(digits):
    assert digits.sizes() == {"train": 1077, "early_stopping": 180, "calibration": 180, "gate": 360}
    ids = np.concatenate([getattr(digits, name).ids for name in NAMES])
    assert sorted(ids) == list(range(1797))


@pytest.mark.parametrize("name", NAMES)
def test_every_split_of_the_digits_holds_each_class_in_proportion(digits, name):
    labels = getattr(digits, name).labels
    counts = np.bincount(labels, minlength=10)
    assert counts.min() >= 0.8 * len(labels) / 10
    assert counts.max() <= 1.2 * len(labels) / 10


def test_digits_are_images_in_0_to_1(digits):
    images = digits.gate.inputs["image"]
    assert (images.shape, images.dtype) == ((360, 1, 8, 8), np.float32)
    assert (images.min(), images.max()) == (0.0, 1.0)


def test_the_same_seed_gives_the_same_digits_and_another_seed_others(digits):
    again, other = (load_digits(DataConfig(load=load_digits, seed=seed)) for seed in (0, 1))
    assert digits.digest == again.digest != other.digest
    assert len(np.intersect1d(digits.gate.ids, other.gate.ids)) < 180


@pytest.mark.parametrize("sizes", [(10,), (10, 20), (1, 1, 1)])
def test_stratified_parts_are_disjoint_and_complete(sizes):
    labels = np.arange(100) % 7
    parts = stratified(labels, sizes, seed=3)
    assert [len(part) for part in parts] == [*sizes, 100 - sum(sizes)]
    assert sorted(np.concatenate(parts)) == list(range(100))


def test_a_limit_on_the_digits_keeps_every_share(digits):
    fewer = load_digits(DataConfig(load=load_digits, limit=300))
    assert fewer.sizes() == {"train": 180, "early_stopping": 30, "calibration": 30, "gate": 60}
    assert np.isin(fewer.gate.ids, range(1797)).all()
    assert (fewer.classes, fewer.source) == (tuple("0123456789"), "digits")


def test_content_is_told_by_inputs_alone():
    one = blobs(8, 0)
    other = Dataset(one.inputs, one.ids + 50, one.labels[::-1].copy())
    assert content_digests(one) == content_digests(other)
    other.inputs["x"][3, 2] += 1
    assert [a == b for a, b in zip(content_digests(blobs(8, 0)), content_digests(other), strict=True)] == [True] * 3 + [
        False
    ] + [True] * 4


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("limit", [None, 60])
def test_no_content_is_in_two_splits(official, limit):
    """Whatever repeats: within the samples, and between them and the official ones."""
    rng = np.random.default_rng(0)
    content = [bytes([value]) for value in rng.integers(0, 120, 300)]
    labels = np.arange(300) % 3
    judged = (np.arange(30) % 3, [bytes([value]) for value in range(100, 130)]) if official else None
    plan = plan_splits(labels, content, seed=1, limit=limit, official=judged)
    used = [content[i] for part in (plan.train, plan.early_stopping, plan.calibration) for i in part]
    gate = [judged[1][i] for i in plan.official_gate] if judged else [content[i] for i in plan.gate]
    assert len(set(used)) == len(used)
    assert not set(used) & set(judged[1] if judged else gate)
    assert limit is None or len(used) + len(gate) == limit
    assert "of 300 samples that repeat an earlier one" in plan.notes[0]


def test_samples_without_labels_are_refused():
    data = blobs(40, 0)
    with pytest.raises(DataError, match="have no labels"):
        split_samples(Dataset(data.inputs, data.ids), seed=0)
