"""Which weights ship: the last, the best epoch's, or a moving average."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small_training import BATCH, FEATURES, Mlp, blobs, same, weights_of
from torch import nn

from mpdeploy.artifact import Dataset
from mpdeploy.train.averaging import MovingAverage
from mpdeploy.train.checkpoint import load_state


def test_an_average_follows_the_weights_by_its_decay_and_copies_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = MovingAverage(model, 0.75)
    expected = None
    for step in range(1, 4):
        with torch.no_grad():
            model[0].weight.fill_(float(step))
            model[1].running_mean.fill_(float(step))
        average.update(model)
        expected = step if expected is None else 0.75 * expected + 0.25 * step
        assert average.model[0].weight.flatten().tolist() == pytest.approx([expected] * 4)
        assert average.model[1].running_mean.tolist() == [step] * 2


def test_the_average_is_evaluated_and_shipped(fit):
    plain, averaged = fit(state="a"), fit(state="b", average={"decay": 0.9})
    assert not same(weights_of(plain.model), weights_of(averaged.model))
    assert plain.history[0]["loss"] == averaged.history[0]["loss"], "training itself is the same"
    assert plain.history[0]["early_stopping_loss"] != averaged.history[0]["early_stopping_loss"]
    assert (plain.averaged, averaged.averaged) == (False, True)


def test_an_average_that_does_not_ship_is_evaluated_beside_the_weights(fit):
    plain = fit(state="a")
    beside, shipped = (fit(state=str(ships), average={"decay": 0.9, "ships": ships}) for ships in (False, True))
    assert same(weights_of(plain.model), weights_of(beside.model))
    for one, two, three in zip(plain.history, beside.history, shipped.history, strict=True):
        assert one["early_stopping_loss"] == two["early_stopping_loss"]
        assert two["average_loss"] == three["early_stopping_loss"]
        assert two["average_score"] == three["early_stopping_score"]


def test_the_average_does_not_see_skipped_steps(fit, tmp_path):
    fit("fp16", loss_scale={"initial": 2.0**40}, average={"decay": 0.9}, epochs=2)
    state = load_state(tmp_path / "state.pt")
    assert int(state["average"]["n_averaged"]) == state["schedule"]["taken"] == 0


def overfits(count: int, first_id: int) -> Dataset:
    """Labels that have nothing to do with the inputs: the early-stopping loss is best at the start."""
    dataset = blobs(count, first_id)
    return Dataset(dataset.inputs, dataset.ids, np.roll(dataset.labels, 1))


def test_with_early_stopping_the_best_epoch_ships_and_its_weights_are_safetensors(fit, tmp_path):
    run = fit(epochs=30, early_stopping_patience=2, stopping_set=overfits(40, 1000))
    losses = [epoch["early_stopping_loss"] for epoch in run.history]
    assert run.shipped == "best"
    assert run.best_epoch == losses.index(min(losses)) + 1 < len(losses)
    with safe_open(tmp_path / "state.best.safetensors", "pt") as file:
        assert file.metadata() == {"epoch": str(run.best_epoch)}
        assert same({name: file.get_tensor(name) for name in file.keys()}, weights_of(run.model))  # noqa: SIM118
    last = load_state(tmp_path / "state.pt")["model"]
    assert not same(last, weights_of(run.model)), "the last weights are kept too, in the state"
    upto = fit(epochs=30, early_stopping_patience=2, stopping_set=overfits(40, 1000), ship="last", state="other")
    assert upto.shipped == "last"
    assert same(last, weights_of(upto.model))


def test_the_best_of_an_average_ships_where_both_are_asked_for(fit):
    options = {"average": {"decay": 0.5}, "stopping_set": overfits(40, 1000)}
    best = fit(epochs=6, ship="best", state="best", schedule="constant", **options)
    alone = fit(epochs=best.best_epoch, state="alone", schedule="constant", **options)
    assert same(weights_of(best.model), weights_of(alone.model))
    assert best.averaged


def test_a_finished_run_ships_the_same_weights_again(fit):
    options = {"epochs": 4, "ship": "best", "stopping_set": overfits(40, 1000)}
    first, again = fit(**options), fit(**options)
    assert same(weights_of(first.model), weights_of(again.model))
    assert first.to_json() | {"memory": 0} == again.to_json() | {"memory": 0}


class RemembersTypes(Mlp):
    def forward(self, x):
        hidden = self.first(x)
        if not self.training:
            self.dtypes.add(hidden.dtype)
        return self.last(torch.relu(hidden))


@pytest.mark.parametrize(("where", "dtype"), [("training", torch.bfloat16), ("fp32", torch.float32)])
def test_evaluation_runs_in_the_precision_that_was_asked_for_without_gradients(fit, where, dtype):
    run = fit("bf16", model=RemembersTypes, evaluate_in=where, epochs=1)
    assert run.model.dtypes == {dtype}


def test_evaluation_in_batches_is_that_of_the_whole_set(fit):
    whole, parts = fit(state="a", epochs=1), fit(state="b", epochs=1, evaluation_batch_size=7)
    for name in ("early_stopping_loss", "early_stopping_score"):
        assert whole.history[0][name] == pytest.approx(parts.history[0][name], rel=1e-6)


def test_saved_activations_are_counted_in_bytes_and_half_training_keeps_fewer(fit):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)
            )

        def forward(self, x):
            return self.layers(x)

    fp32, bf16 = (fit(name, model=Wide, state=name, epochs=1).memory["saved_activations"] for name in ("fp32", "bf16"))
    labels, log_softmax = BATCH * 8, BATCH * 4 * 4
    assert fp32 == BATCH * (FEATURES + 64 + 64) * 4 + labels + log_softmax + 4
    assert bf16 < fp32


def test_peaks_of_memory_are_those_of_the_run(fit):
    memory = fit(epochs=1).memory
    assert memory["rss_peak"] >= memory["rss_at_start"] > 50e6
    assert "cuda_peak_allocated" not in memory
