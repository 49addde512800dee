"""What is watched: exponents, shadow gradients, and the module that made a NaN; and that watching changes no weight."""

from __future__ import annotations

import math

import pytest
import torch
from small_training import BATCH, FEATURES, NUM_TRAIN, Mlp, blobs, choice_of, same, weights_of
from torch import nn

from mpdeploy.config import TrainConfig
from mpdeploy.errors import TrainingDivergedError
from mpdeploy.train.exponents import SAMPLED, counts_to_json, exponent_counts
from mpdeploy.train.feeding import tensors_of
from mpdeploy.train.loop import gradients
from mpdeploy.train.shadow import as_it_was, draws, shadow_backward, underflow_window

STEPS_AN_EPOCH = NUM_TRAIN // BATCH
CLOSE = {"first_step": 1, "sample_every": 3, "shadow_every": 4}


# -- exponents ---------------------------------------------------------------------------------------------------------


def test_exponents_are_those_of_the_numbers():
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0, 0.49, 2.0**-30, 65504.0, math.inf, math.nan])
    assert counts_to_json(exponent_counts(values)) == {
        "zeros": 2,
        "not_finite": 2,
        "exponents": {"-30": 1, "-2": 1, "0": 2, "1": 1, "15": 1},
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_values_have_the_exponents_they_have_in_fp32(dtype):
    values = torch.tensor([2.0**-20, 3.0, 0.0], dtype=dtype)
    assert counts_to_json(exponent_counts(values))["exponents"] == {"-20": 1, "1": 1}


def test_of_a_large_tensor_a_sample_is_counted():
    counts = exponent_counts(torch.ones(10 * SAMPLED))
    assert int(counts.sum()) == SAMPLED
    assert int(exponent_counts(torch.ones(10 * SAMPLED), sampled=None).sum()) == 10 * SAMPLED


# -- the shadow backward -----------------------------------------------------------------------------------------------


def test_the_window_counts_what_fp16_flushes_and_proposes_a_scale_that_it_does_not():
    gradients = {"a": torch.tensor([2.0**-30, 2.0**-26, -(2.0**-20), 0.0]), "b": torch.tensor([1.0])}
    found = underflow_window(gradients, largest_activation_gradient=2.0, scale=1.0)
    assert (found["flushed"], found["subnormal"], found["overflowing"]) == (0.5, 0.25, 0.0)
    assert found["most_flushed_parameter"] == {"name": "a", "flushed": pytest.approx(2 / 3)}
    assert found["proposed_scale"] == 2.0**12, "65504 / 4 / 2 is just below 2^13"
    assert found["flushed_at_proposed_scale"] == 0.0
    assert underflow_window(gradients, 2.0, scale=2.0**17)["overflowing"] == 0.25
    half = {name: (value * 2.0**12).half() for name, value in gradients.items()}
    assert sum(int((value != 0).sum()) for value in half.values()) == 4, "FP16 itself agrees"


@pytest.mark.parametrize("exponent", range(-30, -10))
def test_what_counts_as_flushed_is_what_fp16_flushes(exponent):
    value = torch.tensor([2.0**exponent * 1.001, -(2.0**exponent) * 0.999])
    found = underflow_window({"w": value}, 0.0, scale=1.0)
    assert found["flushed"] == float((value.half() == 0).double().mean())
    smallest_normal = torch.finfo(torch.float16).smallest_normal
    assert found["flushed"] + found["subnormal"] == float((value.abs() <= smallest_normal).double().mean())


def test_a_shadow_is_the_fp32_gradient_and_leaves_nothing_behind():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    (x,), labels = tensors_of(blobs(32, 0), "cpu")
    before, weights = draws("cpu"), weights_of(model)
    nn.functional.cross_entropy(model(x), labels).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.load_state_dict(weights)
    random = torch.get_rng_state()
    found, largest = shadow_backward(model, (x,), labels, nn.functional.cross_entropy, before, "cpu")
    assert same(found, expected), "the same values were dropped"
    assert 0 < largest < 1
    assert same(weights_of(model), weights), "BatchNorm's statistics did not move"
    assert torch.equal(torch.get_rng_state(), random)
    assert same({name: p.grad for name, p in model.named_parameters()}, expected), ".grad was left alone"


def test_random_numbers_and_buffers_are_as_they_were_even_after_an_error():
    model = nn.BatchNorm1d(4)
    before = draws("cpu")
    first = torch.rand(3)

    def fails() -> None:
        with as_it_was(model, before, "cpu"):
            assert torch.equal(torch.rand(3), first)
            model(torch.randn(5, 4))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert int(model.num_batches_tracked) == 0
    assert not torch.equal(torch.rand(3), first)


def test_the_shadow_sees_the_gradients_that_fp16_without_a_scale_loses(fit):
    """The positive control of tier 0: with the loss times 2^-14 and no scaler nothing becomes NaN, yet gradients are gone."""

    def small(outputs, labels):
        return nn.functional.cross_entropy(outputs, labels) * 2.0**-14

    lost, kept = (
        fit("fp16", loss=small, loss_scaling=mode, health=CLOSE, epochs=2, state=mode, max_grad_norm=None).health[
            "shadow_backward"
        ][0]
        for mode in ("none", "dynamic")
    )
    assert (lost["loss_scale"], kept["loss_scale"]) == (1.0, 65536.0)
    assert lost["flushed"] > 0.05
    assert lost["lost"] > 0.05
    assert lost["flushed"] == lost["flushed_unscaled"] == pytest.approx(kept["flushed_unscaled"], abs=0.05)
    assert kept["flushed"] < 0.01
    assert kept["lost"] < 0.01
    assert lost["flushed_at_proposed_scale"] < 0.001
    assert math.log2(lost["proposed_scale"]) >= 14


# -- what a run reports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_watching_changes_no_weight(fit, precision):
    never = {"sample_every": 0, "shadow_every": 0, "saved_bytes": False, "replay": False}
    watched, unwatched = fit(precision, health=CLOSE, state="a"), fit(precision, health=never, state="b")
    assert same(weights_of(watched.model), weights_of(unwatched.model))
    assert watched.health["num_sampled_steps"] == 3
    assert unwatched.health["num_sampled_steps"] == 0
    assert unwatched.health["activation_max"] == {}


def test_sampled_steps_show_every_leaf_module_and_parameter(fit):
    run = fit("bf16", health=CLOSE)
    health = run.health
    assert set(health["activation_max"]) == set(health["activation_exponents"]) == {"first", "drop", "last"}
    assert set(health["gradient_exponents"]) == {name for name, _ in run.model.named_parameters()}
    counted = health["activation_exponents"]["last"]
    assert counted["zeros"] + sum(counted["exponents"].values()) == 3 * BATCH * 4, "three steps, all values of each"
    highest = max(int(exponent) for exponent in counted["exponents"])
    assert 2.0**highest <= health["activation_max"]["last"] < 2.0 ** (highest + 1)


def test_there_is_no_shadow_where_training_is_in_fp32(fit):
    assert fit("fp32", health=CLOSE).health["shadow_backward"] == []
    assert [found["step"] for found in fit("bf16", health=CLOSE, state="b").health["shadow_backward"]] == [2, 6]


def test_gradient_norms_are_those_of_unscaled_gradients_before_clipping(fit):
    run = fit("fp16", epochs=1, max_grad_norm=1e-3)
    assert len(run.gradient_norms) == STEPS_AN_EPOCH
    assert all(0.1 < norm < 100 for norm in run.gradient_norms)


def test_the_trace_of_the_loss_scale_and_the_skipped_steps_are_told(fit):
    run = fit("fp16", loss=lambda outputs, labels: nn.functional.cross_entropy(outputs, labels) * 64)
    skips = len(run.skipped_steps)
    assert skips == run.num_skipped > 0
    assert run.loss_scales[: skips + 1] == [
        (0, 65536.0),
        *((step, 65536.0 / 2**n) for n, step in enumerate(run.skipped_steps, 1)),
    ]
    assert not any(math.isfinite(run.gradient_norms[step - 1]) for step in run.skipped_steps)
    assert run.to_json()["gradient_norm"]["largest"] < math.inf


# -- after a NaN -------------------------------------------------------------------------------------------------------


class LogOfMean(nn.Module):
    """The logarithm of a number that training makes negative at some step."""

    def forward(self, x):
        return x + torch.log(1.0 - 3.0 * x.abs().mean())


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(FEATURES, 8), LogOfMean(), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.inner(torch.relu(self.first(x))))


class RootAtZero(nn.Module):
    """Finite forward; the derivative of the root is infinite at zero."""

    def __init__(self):
        super().__init__()
        self.first, self.root, self.last = nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 4)
        nn.init.zeros_(self.first.weight)
        nn.init.zeros_(self.first.bias)

    def forward(self, x):
        return self.last(torch.sqrt(self.root(self.first(x)) ** 2))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_nan_in_forward_is_traced_to_the_module_that_made_it(fit, precision):
    with pytest.raises(TrainingDivergedError, match=r"The loss became nan in epoch \d, step \d") as caught:
        fit(precision, model=Broken, learning_rate=0.1, epochs=8)
    assert "the output of the module 'inner' (LogOfMean, " in caught.value.message
    assert "the largest magnitude in what it was given: " in caught.value.message


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_infinity_in_backward_is_traced_to_where_it_first_arrived(fit, precision):
    with pytest.raises(TrainingDivergedError, match=r"The gradient norm became (nan|inf) in epoch 1, step 1") as caught:
        fit(precision, model=RootAtZero)
    assert "the gradient that reached the output of the module 'root'" in caught.value.message


def test_an_input_that_is_not_finite_is_named(fit):
    train_set = blobs(NUM_TRAIN, 0)
    train_set.inputs["x"][50, 3] = math.nan

    class Blind(Mlp):
        def forward(self, x):
            return self.last(self.drop(torch.relu(self.first(x))))

    with pytest.raises(TrainingDivergedError, match="input 0 of the batch, before any module ran"):
        fit(model=Blind, train_set=train_set)


def test_a_loss_function_that_makes_the_nan_is_named(fit):
    with pytest.raises(
        TrainingDivergedError, match=r"the loss function; the model's outputs were finite, the largest \d"
    ):
        fit(loss=lambda outputs, labels: (outputs.sum() * 0 - 1).sqrt())


def test_without_replay_the_place_alone_is_told(fit):
    with pytest.raises(TrainingDivergedError) as caught:
        fit(model=RootAtZero, health={"replay": False})
    assert "First not finite" not in caught.value.message


def test_the_weights_before_the_step_are_still_there(fit):
    """The step that fails is not taken, so what is replayed is what happened."""
    models = []

    def make():
        models.append(RootAtZero())
        return models[-1]

    with pytest.raises(TrainingDivergedError):
        fit(model=make)
    torch.manual_seed(0)
    assert same(weights_of(models[0]), weights_of(RootAtZero()))


def test_gradients_of_two_precisions_start_from_the_same_weights_with_fp32_modules_too():
    (x,), labels = tensors_of(blobs(BATCH, 0), "cpu")
    config = TrainConfig(model=Mlp, fp32_modules=("first", "drop", "last"))
    fp32, bf16 = (gradients(config, choice_of(name), (x, labels), steps=1)[0] for name in ("fp32", "bf16"))
    assert same(fp32, bf16), "all modules in FP32 is FP32"
