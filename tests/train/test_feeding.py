"""Feeding: the same samples in the same order, ahead or not, on one rank or several, and on from any batch."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from small_training import Mlp, blobs

from mpdeploy.artifact import Dataset
from mpdeploy.config import TrainConfig
from mpdeploy.errors import ConfigError, UserCodeError
from mpdeploy.train.feeding import Feeder, tensors_of

COUNT, BATCH = 22, 5  # five batches, the last one of two


def jitter(inputs, generator):
    return inputs + torch.randn(inputs.shape, generator=generator)


def feeder(dataset: Dataset | None = None, *, rank: int = 0, world_size: int = 1, **fields: object) -> Feeder:
    config = TrainConfig(**{"model": Mlp, "batch_size": BATCH, "augment": jitter, **fields})
    return Feeder(dataset or blobs(COUNT, 0), config, "cpu", rank=rank, world_size=world_size)


def content(batches) -> list[tuple]:
    return [
        (b.number, b.ids.tolist(), b.labels.tolist(), [x.tolist() for x in b.inputs], b.num_global) for b in batches
    ]


def test_batches_name_their_samples():
    dataset = blobs(COUNT, 100)
    for batch in feeder(dataset, augment=None).epoch():
        rows = batch.ids - 100
        assert torch.equal(batch.inputs[0], torch.from_numpy(dataset.inputs["x"][rows]))
        assert batch.labels.tolist() == dataset.labels[rows].tolist()


@pytest.mark.parametrize("prefetch", [1, 2, 50])
def test_a_thread_that_works_ahead_changes_nothing(prefetch):
    here, ahead = feeder(prefetch=0), feeder(prefetch=prefetch)
    for _ in range(3):
        assert content(here.epoch()) == content(ahead.epoch())


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_it_goes_on_after_any_batch_in_another_process(prefetch, stop):
    whole = feeder()
    expected = [content(whole.epoch()) for _ in range(3)]
    first = feeder(prefetch=prefetch)
    list(first.epoch())
    if stop:
        running = first.epoch()
        seen = [next(running) for _ in range(stop)]
        assert content(seen) == expected[1][:stop]
        state = first.state_dict(next_batch=stop)
        running.close()
    else:
        state = first.state_dict(next_batch=0)
    second = feeder(prefetch=prefetch)
    second.load_state_dict(state)
    assert content(second.epoch(stop)) == expected[1][stop:]
    assert content(second.epoch()) == expected[2]


def test_a_feeder_that_is_left_leaves_no_thread():
    before = threading.active_count()
    running = feeder(prefetch=2).epoch()
    next(running), next(running)
    assert threading.active_count() == before + 1
    running.close()
    assert threading.active_count() == before


def fails_later(inputs, generator):
    if torch.rand((), generator=generator) > 0.5:
        raise KeyError("theirs")
    return inputs


@pytest.mark.parametrize("prefetch", [0, 2])
def test_what_augmentation_raises_is_raised_where_the_batch_is_wanted(prefetch):
    with pytest.raises(UserCodeError, match="KeyError: 'theirs'"):
        list(feeder(augment=fails_later, prefetch=prefetch).epoch())


def test_augmentation_that_draws_from_a_global_generator_is_not_run_ahead():
    def augment(inputs, generator):
        return inputs * float(np.random.rand())

    running = feeder(augment=augment, prefetch=2)
    before = threading.active_count()
    for _ in running.epoch():
        assert threading.active_count() == before
    assert running.prefetch == 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_shares_of_all_ranks_make_up_the_batch_augmented_alike(world_size):
    whole = list(feeder().epoch())
    shares = [list(feeder(rank=rank, world_size=world_size).epoch()) for rank in range(world_size)]
    for batch, *ranks in zip(whole, *shares, strict=True):
        parts = [part for part in ranks if part.counts]  # of two samples one of three ranks has none
        assert torch.equal(batch.inputs[0], torch.cat([part.inputs[0] for part in parts]))
        assert torch.equal(batch.labels, torch.cat([part.labels for part in parts]))
        assert batch.ids.tolist() == [int(i) for part in parts for i in part.ids]
        assert {part.num_global for part in parts} == {len(batch.labels)}


def test_arrays_may_lie_on_disk_and_be_read_only(tmp_path):
    dataset = blobs(COUNT, 0)
    np.save(tmp_path / "x.npy", dataset.inputs["x"])
    mapped = Dataset({"x": np.load(tmp_path / "x.npy", mmap_mode="r")}, dataset.ids, dataset.labels)
    assert content(feeder(mapped).epoch()) == content(feeder(dataset).epoch())
    inputs, labels = tensors_of(mapped.take(slice(0, 4)), "cpu")
    assert torch.equal(inputs[0], torch.from_numpy(dataset.inputs["x"][:4]))
    assert labels.tolist() == dataset.labels[:4].tolist()


def test_augmentation_of_several_inputs_must_return_them_all():
    dataset = blobs(COUNT, 0)
    two = Dataset({"a": dataset.inputs["x"], "b": dataset.inputs["x"]}, dataset.ids, dataset.labels)
    with pytest.raises(ConfigError, match=r"train\.augment returned \['a'\], expected a dict with \['a', 'b'\]"):
        list(feeder(two, augment=lambda inputs, generator: {"a": inputs["a"]}).epoch())


def test_only_images_are_laid_out_as_nhwc():
    images = np.zeros((COUNT, 3, 4, 4), np.float32)
    dataset = Dataset({"image": images, "ids": images.astype(np.int64)}, np.arange(COUNT), np.zeros(COUNT, np.int64))
    image, ids = next(iter(feeder(dataset, augment=None, channels_last=True).epoch())).inputs
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert ids.is_contiguous()
    assert ids.dtype == torch.int64
