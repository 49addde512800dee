"""On a GPU: steps settle one behind, batches are pinned and copied ahead, and the loss scaler's state still decides each update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_training import BATCH, NUM_TRAIN, Mlp, blobs, choice_of, same, weights_of
from torch import nn

from mpdeploy.config import TrainConfig
from mpdeploy.errors import TrainingDivergedError
from mpdeploy.train.feeding import Feeder
from mpdeploy.train.loop import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")]
STEPS_AN_EPOCH = NUM_TRAIN // BATCH


class Plain(nn.Module):
    """An `Mlp` that looks at nothing: looking would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(16, 32), nn.Dropout(0.2), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.relu(self.first(x))))


def fit(folder, precision="fp16", progress=lambda *_: None, **fields):
    config = TrainConfig(**{"model": Plain, "epochs": 4, "batch_size": BATCH, "learning_rate": 1e-2, **fields})
    choice = replace(choice_of(precision), device="cuda")
    return train(
        config, choice, blobs(NUM_TRAIN, 0), blobs(40, 1000),
        state_path=folder / "state.pt", state_key="key", progress=progress,
    )  # fmt: skip


def large_loss(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels) * 64


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_it_learns(tmp_path, precision):
    run = fit(tmp_path, precision, epochs=8)
    assert run.history[-1]["early_stopping_score"] > 0.9
    assert run.memory["cuda_peak_allocated"] > 0
    assert all(milliseconds > 0 for milliseconds in run.step_ms)


@pytest.mark.parametrize("fused", ["on", "off"])
def test_the_schedule_waits_for_skipped_steps_although_they_are_read_one_step_later(tmp_path, fused):
    run = fit(tmp_path, loss=large_loss, fused=fused)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert run.num_skipped > 0
    assert state["schedule"]["taken"] == 4 * STEPS_AN_EPOCH - run.num_skipped
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {state["schedule"]["taken"]}


def test_a_killed_run_ends_in_the_same_weights(tmp_path):
    class Interrupted(BaseException):
        pass

    def stop(done, total, text):
        if done == 8:
            raise Interrupted

    def augment(inputs, generator):
        return inputs + 0.1 * torch.randn(inputs.shape, generator=generator).to(inputs.device)

    options = {"loss": large_loss, "checkpoint_every_steps": 2, "augment": augment, "average": {"decay": 0.9}}
    (tmp_path / "a").mkdir()
    whole = fit(tmp_path / "a", **options)
    with pytest.raises(Interrupted):
        fit(tmp_path / "b", progress=stop, **options)
    assert same(weights_of(whole.model), weights_of(fit(tmp_path / "b", **options).model))


def test_batches_that_are_copied_ahead_are_those_of_the_host():
    config = TrainConfig(model=Mlp, batch_size=BATCH)
    on_device, on_host = Feeder(blobs(NUM_TRAIN, 0), config, "cuda"), Feeder(blobs(NUM_TRAIN, 0), config, "cpu")
    assert on_device.prefetch == 2
    for one, two in zip(on_device.epoch(), on_host.epoch(), strict=True):
        assert torch.equal(one.inputs[0].cpu(), two.inputs[0])
        assert torch.equal(one.labels.cpu(), two.labels)


@pytest.mark.parametrize("fused", ["on", "off"])
def test_a_nan_that_is_read_one_step_later_poisons_nothing_and_is_traced(tmp_path, fused):
    calls = []

    class NanLater(nn.Module):
        def forward(self, x):
            calls.append(0)
            return x * float("nan") if self.training and len(calls) > 4 else x

    model = nn.Sequential(nn.Linear(16, 4), NanLater())
    with pytest.raises(TrainingDivergedError, match=r"'1' \(NanLater"):
        fit(tmp_path, "bf16", model=lambda: model, fused=fused)
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
