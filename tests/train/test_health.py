"""Numerical health: gradients that vanish in half precision are seen, and by nothing but the share of exact zeros."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_training import blobs, choice_of
from torch import nn

from mpdeploy.config import DEFAULT_GATES, TrainConfig
from mpdeploy.gates.evidence import Evidence, Place
from mpdeploy.gates.gate import decide
from mpdeploy.train.health import ActivationRanges, compare_gradients
from mpdeploy.train.loop import gradients

TINY_LOSS = 2.0**-14


def verdict_on(excess_zeros: float) -> str:
    """What the default gate says of it."""
    gate = next(gate for gate in DEFAULT_GATES if gate.id == "gradient-underflow")
    place = Place(
        "parity", "fp32", "10-train", facts={"excess_zero_gradients": excess_zeros}, arrays={"ids": np.arange(3)}
    )
    return decide([gate], Evidence({"parity": place}, {}, {}))[0].verdict


class Deep(nn.Sequential):
    """Linear layers only: FP16 convolutions on a CPU are 50 times slower."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def scaled_loss(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels) * TINY_LOSS


def excess_zeros(precision: str, **fields) -> float:
    config = TrainConfig(model=Deep, loss=scaled_loss, **fields)
    data = blobs(64, 0)
    batch = (torch.from_numpy(data.inputs["x"]), torch.from_numpy(data.labels))
    expected, found = (gradients(config, choice_of(name), batch, steps=2) for name in ("fp32", precision))
    return max(compare_gradients(a, b).worst_excess_zeros for a, b in zip(expected, found, strict=True))


def test_a_loss_times_2_to_the_minus_14_in_fp16_without_a_scaler_is_caught():
    lost = excess_zeros("fp16", loss_scaling="none")
    assert lost > 0.1, "facts.md, section 5: near half of the gradients are exactly zero"
    assert verdict_on(lost) == "fail"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_same_loss_with_dynamic_scaling_or_in_bf16_is_healthy(precision):
    kept = excess_zeros(precision)
    assert kept < 0.01
    assert verdict_on(kept) == "pass"


def test_nothing_but_the_zeros_tells():
    """No NaN and no skipped step: what a training loop usually watches sees nothing."""
    config = TrainConfig(model=Deep, loss=scaled_loss, loss_scaling="none")
    data = blobs(64, 0)
    batch = (torch.from_numpy(data.inputs["x"]), torch.from_numpy(data.labels))
    found = gradients(config, choice_of("fp16"), batch, steps=2)
    assert all(bool(torch.isfinite(value).all()) for step in found for value in step.values())


def grads(*values: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.tensor(values, dtype=torch.float32)}


@pytest.mark.parametrize(
    ("reference", "amp", "excess", "cosine"),
    [
        (grads(1, 2, 3, 4), grads(1, 2, 3, 4), 0.0, 1.0),
        (grads(1, 2, 3, 4), grads(0, 0, 3, 4), 0.5, 5 / math.sqrt(30)),
        (grads(0, 0, 3, 4), grads(0, 0, 3, 4), 0.0, 1.0),
        (grads(0, 0, 3, 4), grads(1e-9, 0, 3, 4), -0.25, 1.0),
        (grads(1, 2, 3, 4), grads(0, 0, 0, 0), 1.0, 0.0),
        (grads(0, 0, 0, 0), grads(0, 0, 0, 0), 0.0, 1.0),
        (grads(1, 2, 3, 4), grads(-1, -2, -3, -4), 0.0, -1.0),
        (grads(1, 2, 3, 4), grads(1, math.nan, 3, 4), 1.0, 0.0),
        (grads(1, 2, 3, 4), grads(1, math.inf, 3, 4), 1.0, 0.0),
    ],
)
def test_two_gradients_are_compared_by_their_zeros_and_their_angle(reference, amp, excess, cosine):
    found = compare_gradients(reference, amp)
    assert found.excess_zeros == pytest.approx({"weight": excess})
    assert found.cosines == pytest.approx({"weight": cosine}, abs=1e-6)


def test_the_worst_parameter_speaks_for_all():
    reference = {"a": torch.ones(4), "b": torch.ones(4)}
    found = compare_gradients(reference, {"a": torch.ones(4), "b": torch.tensor([0.0, 0.0, 0.0, 1.0])})
    assert found.worst_excess_zeros == 0.75
    assert found.to_json()["worst_cosine"] == pytest.approx(0.5)


def test_ranges_are_the_largest_magnitudes_of_every_leaf_over_all_calls():
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU(), nn.Identity()))
    ranges = ActivationRanges()
    with ranges.recording(model):
        model(torch.tensor([-5.0, 2.0]))
        model(torch.tensor([-1.0, 3.0]))
    model(torch.tensor([100.0]))
    assert ranges.to_json() == {"0": 5.0, "1.0": 3.0, "1.1": 3.0}


def test_a_range_that_is_not_finite_is_kept_as_it_was_seen():
    ranges, model = ActivationRanges(), nn.Sequential(nn.Identity())
    with ranges.recording(model):
        model(torch.tensor([math.inf]))
    assert ranges.to_json() == {"0": math.inf}


def test_recording_leaves_no_hook_behind_even_after_an_exception():
    model = nn.Sequential(nn.Identity())
    with pytest.raises(ZeroDivisionError), ActivationRanges().recording(model):
        raise ZeroDivisionError
    assert not model[0]._forward_hooks
