"""Paired trainings and what they answer: the same start, the same order, and losses of single samples."""

from __future__ import annotations

import pytest
import torch
from small_training import BATCH, NUM_TRAIN, Mlp, blobs, choice_of, same, weights_of
from torch import nn

from mpdeploy.artifact import Dataset
from mpdeploy.config import ParityConfig, TrainConfig
from mpdeploy.errors import DataError
from mpdeploy.train.parity import held_out_answers, losses, train_pair


class Interrupted(BaseException):
    """Stands for a kill."""


def pair(folder, *, seed=0, precision="bf16", stop_at=None):
    config = TrainConfig(model=Mlp, epochs=2, batch_size=BATCH, learning_rate=1e-2)
    told = []

    def progress(done, total, text):
        told.append(text)
        if len(told) == stop_at:
            raise Interrupted

    models = train_pair(
        config, choice_of(precision), blobs(NUM_TRAIN, 0), blobs(40, 1000),
        seed=seed, folder=folder, state_key="key", progress=progress,
    )  # fmt: skip
    return models, told


def test_both_sides_see_the_same_samples_in_the_same_order(tmp_path):
    (reference, amp), told = pair(tmp_path)
    assert reference.seen[: 2 * NUM_TRAIN] == amp.seen[: 2 * NUM_TRAIN]
    assert (reference.dtypes, amp.dtypes) == ({torch.float32}, {torch.bfloat16})
    assert told[0].startswith("seed 0 in fp32")


def test_a_pair_in_fp32_is_twice_the_same_and_another_seed_is_not(tmp_path):
    (reference, amp), _ = pair(tmp_path, precision="fp32")
    assert same(weights_of(reference), weights_of(amp))
    (other, _), _ = pair(tmp_path, precision="fp32", seed=1)
    assert not same(weights_of(reference), weights_of(other))


def test_a_killed_pair_goes_on_and_trains_nothing_twice(tmp_path):
    (reference, amp), told = pair(tmp_path / "whole")
    with pytest.raises(Interrupted):
        pair(tmp_path / "killed", stop_at=len(told) - 1)
    (again, amp_again), rest = pair(tmp_path / "killed")
    assert same(weights_of(reference), weights_of(again))
    assert same(weights_of(amp), weights_of(amp_again))
    assert len(rest) < len(told) / 2
    assert pair(tmp_path / "killed")[1] == []


def test_held_out_losses_are_of_single_samples_in_fp32(tmp_path):
    (_, amp), _ = pair(tmp_path)
    samples = blobs(50, 2000)
    config = TrainConfig(model=Mlp, evaluation_batch_size=16)
    amp.dtypes.clear()
    found = held_out_answers(config, "cpu", amp, samples)
    assert amp.dtypes == {torch.float32}
    with torch.no_grad():
        outputs = amp(torch.from_numpy(samples.inputs["x"]))
    expected = nn.functional.cross_entropy(outputs, torch.from_numpy(samples.labels), reduction="none")
    assert torch.allclose(torch.from_numpy(found.nll).float(), expected, atol=1e-5)
    assert found.outputs.shape == (50, 4)


def test_a_loss_of_the_user_s_own_is_called_on_one_sample_at_a_time():
    def loss(outputs, labels):
        return ((outputs - labels) ** 2).mean()

    outputs, labels = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([[1.0], [4.0], [2.0]])
    config = TrainConfig(model=Mlp, loss=loss)
    assert losses(config, outputs, labels).tolist() == [0.0, 4.0, 9.0]


def test_samples_without_labels_are_refused(tmp_path):
    bare = Dataset(blobs(8, 0).inputs, blobs(8, 0).ids)
    with pytest.raises(DataError, match="a calibration split with labels"):
        held_out_answers(TrainConfig(model=Mlp), "cpu", Mlp(), bare)


def test_looks_rise():
    assert ParityConfig().looks == ()
    assert ParityConfig(tier=1).looks == (3,)
    assert ParityConfig(tier=2).looks == (3, 5, 10)
    with pytest.raises(ValueError, match="more_seeds must rise"):
        ParityConfig(tier=2, seeds=5)
