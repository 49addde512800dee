"""Learning rates: where each schedule starts and ends, and that it does not jump."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from small_training import Mlp

from mpdeploy.config import TrainConfig
from mpdeploy.train.schedules import LearningRate, rate


def rates(total: int = 100, **fields: object) -> list[float]:
    config = TrainConfig(model=Mlp, **fields)
    return [rate(config, step, total) for step in range(total + 1)]


@pytest.mark.parametrize(
    ("schedule", "start", "end", "peak"),
    [("constant", 1, 1, 1), ("cosine", 1, 0, 1), ("one_cycle", 1 / 25, 1 / 250_000, 1), ("exponential", 1, 0.01, 1)],
)
def test_a_schedule_starts_and_ends_where_it_should(schedule, start, end, peak):
    found = rates(schedule=schedule)
    assert (found[0], found[-1], max(found)) == pytest.approx((start, end, peak), abs=1e-9)
    assert all(abs(a - b) < 0.08 for a, b in pairwise(found)), "it jumps"


def test_exponential_falls_by_the_same_factor_each_step():
    found = rates(schedule="exponential", decay_to=0.1)
    factors = [b / a for a, b in pairwise(found)]
    assert factors == pytest.approx([0.1 ** (1 / 100)] * 100)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "exponential"])
def test_warm_up_rises_evenly_to_the_peak_and_the_rest_follows(schedule):
    found = rates(schedule=schedule, warmup_steps=9)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[9] == max(found)
    assert found[-1] == pytest.approx({"constant": 1.0, "cosine": 0.0, "exponential": 0.01}[schedule], abs=1e-9)


def test_one_cycle_has_a_warm_up_of_its_own():
    with pytest.raises(ValueError, match="one_cycle has a warm-up of its own"):
        TrainConfig(model=Mlp, warmup_steps=5)


def test_the_rate_moves_with_steps_that_are_counted_and_goes_on_after_loading():
    config = TrainConfig(model=Mlp, schedule="cosine", learning_rate=0.1)
    optimizers = [torch.optim.SGD(Mlp().parameters(), lr=1.0) for _ in range(2)]
    first, second = (LearningRate(config, optimizer, 10) for optimizer in optimizers)
    assert optimizers[0].param_groups[0]["lr"] == 0.1
    for _ in range(5):
        first.advance()
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)
    second.load_state_dict(first.state_dict())
    assert optimizers[1].param_groups[0]["lr"] == optimizers[0].param_groups[0]["lr"]
