"""Optimisers, the loss scaler's three modes, and thresholds on gradients."""

from __future__ import annotations

import pytest
import torch
from small_training import Mlp, choice_of, same, weights_of
from torch import nn

from mpdeploy.config import TrainConfig
from mpdeploy.config.training import GradientThreshold
from mpdeploy.train.optimizers import apply_threshold, make_optimizer, make_scaler, take_step


def with_gradient(values: list[float]) -> nn.Module:
    layer = nn.Linear(len(values), 1, bias=False)
    layer.weight.grad = torch.tensor([values])
    return layer


GRADIENT = [-8.0, -2.0, -0.5, 0.0, 0.25, 1.0, 4.0, 16.0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "off", "value": 100.0}, GRADIENT),
        ({"kind": "absolute", "value": 1.0}, [-8, -2, 0, 0, 0, 1, 4, 16]),
        ({"kind": "absolute", "value": 1.0, "constant": 3.0}, [-8, -2, -3, 0, 3, 1, 4, 16]),
        ({"kind": "relative", "value": 0.2}, [-8, 0, 0, 0, 0, 0, 4, 16]),
        ({"kind": "quantile", "value": 0.5}, [-8, -2, 0, 0, 0, 0, 4, 16]),
    ],
)
def test_a_threshold_compares_magnitudes_and_leaves_large_negative_gradients_alone(fields, expected):
    model = with_gradient(GRADIENT)
    apply_threshold(model, GradientThreshold(**fields))
    assert model.weight.grad.tolist() == [[float(value) for value in expected]]


@pytest.mark.parametrize("kind", ["relative", "quantile"])
def test_a_share_is_below_1(kind):
    with pytest.raises(ValueError, match=r"a share below 1, found 1\.5"):
        GradientThreshold(kind=kind, value=1.5)


def test_thresholds_act_on_unscaled_gradients(fit):
    """1e-3 is far below the scaled gradients (times 65,536) and above many true ones."""
    plain, cut = fit("fp16", state="a"), fit("fp16", state="b", gradient_threshold={"kind": "absolute", "value": 1e9})
    assert not same(weights_of(plain.model), weights_of(cut.model))
    assert max(cut.gradient_norms) == 0.0
    assert min(plain.gradient_norms) > 0.01


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_optimizer_is_what_was_asked_for(name, kind):
    config = TrainConfig(model=Mlp, optimizer=name, momentum=0.5, weight_decay=0.25, learning_rate=0.125)
    optimizer = make_optimizer(config, Mlp(), "cpu")
    assert type(optimizer) is kind
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.125, 0.25)
    assert optimizer.defaults.get("momentum", 0.5) == 0.5
    assert not optimizer.defaults["fused"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_fused_optimizer_trains_to_nearly_the_same_weights(fit, optimizer, precision):
    options = {"optimizer": optimizer, "learning_rate": 1e-3, "epochs": 2}
    plain, fused = fit(precision, state="a", fused="off", **options), fit(precision, state="b", fused="on", **options)
    for name, value in plain.model.state_dict().items():
        assert torch.allclose(value, fused.model.state_dict()[name], atol=1e-4), name


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_are_never_poisoned(fused, optimizer, precision):
    config = TrainConfig(model=Mlp, optimizer=optimizer, fused=fused)
    model = Mlp()
    before = weights_of(model)
    stepper, scaler = make_optimizer(config, model, "cpu"), make_scaler(config, choice_of(precision))
    scaler.scale(model(torch.full((2, 16), 1e-3)).sum() * float("inf")).backward()
    scaler.unscale_(stepper)
    assert bool(take_step(scaler, stepper, torch.tensor(False), config)), "it says that it skipped"
    assert same(weights_of(model), before)
    stepper.zero_grad()
    scaler.scale(model(torch.full((2, 16), 1e-3)).sum()).backward()
    scaler.unscale_(stepper)
    assert not bool(take_step(scaler, stepper, torch.tensor(True), config))
    assert not same(weights_of(model), before)


def test_a_static_scale_stays_where_it_is_and_still_skips_what_overflows(fit):
    run = fit("fp16", loss_scaling="static", loss_scale={"initial": 2.0**20}, epochs=2)
    assert run.loss_scales == [(0, 2.0**20)]
    assert len(run.skipped_steps) == run.num_skipped == len(run.step_ms), "at 2^20 every step overflows"
    quiet = fit("fp16", loss_scaling="static", loss_scale={"initial": 128.0}, epochs=2, state="quiet")
    assert (quiet.loss_scales, quiet.num_skipped) == ([(0, 128.0)], 0)


def test_a_dynamic_scale_grows_after_its_interval(fit):
    run = fit("fp16", loss_scale={"initial": 256.0, "growth_interval": 3}, epochs=2)
    assert run.loss_scales == [(0, 256.0), (3, 512.0)]


def test_a_loss_scale_is_a_power_of_two():
    with pytest.raises(ValueError, match="a power of two, so that scaling rounds nothing; found 1000"):
        TrainConfig(model=Mlp, loss_scale={"initial": 1000.0})


def test_micro_batches_of_uneven_size_add_up_to_the_gradients_of_the_whole_batch(fit):
    """32 samples in 5 parts: 7, 7, 6, 6 and 6. A plain mean of the parts' means would be another number."""

    class Plain(nn.Linear):
        def __init__(self):
            super().__init__(16, 4)

    options = {"model": Plain, "optimizer": "sgd", "epochs": 2, "learning_rate": 0.1}
    whole, parts = fit(state="a", **options), fit(state="b", accumulation=5, **options)
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, parts.model.state_dict()[name], atol=1e-5), name
    assert [a["loss"] for a in whole.history] == pytest.approx([b["loss"] for b in parts.history], rel=1e-5)
    sizes = []
    fit(
        state="c",
        accumulation=5,
        epochs=1,
        loss=lambda outputs, labels: sizes.append(len(labels)) or nn.functional.cross_entropy(outputs, labels),
    )
    assert sizes[:5] == [7, 7, 6, 6, 6]
