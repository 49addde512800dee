"""Precision over time: when half training begins, and when FP16 is left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_training import BATCH, NUM_TRAIN, Mlp, choice_of
from torch import nn

from mpdeploy.config import TrainConfig
from mpdeploy.train import precision_schedule
from mpdeploy.train.precision_schedule import PrecisionOverTime

STEPS_AN_EPOCH = NUM_TRAIN // BATCH


def over_time(precision: str = "fp16", **rules: object) -> PrecisionOverTime:
    return PrecisionOverTime(TrainConfig(model=Mlp, precision_schedule=rules), choice_of(precision))


def has_bf16(monkeypatch, answer: bool) -> None:
    monkeypatch.setattr(precision_schedule, "computes_bf16", lambda device: answer)


def test_without_rules_the_precision_is_that_of_the_choice_from_the_start():
    schedule = over_time()
    assert all(schedule.after_step(step, 1.0, False, 1024.0) is None for step in range(1, 200))
    assert schedule.current == choice_of("fp16")


def test_half_training_begins_after_so_many_steps(fit):
    run = fit("bf16", precision_schedule={"fp32_steps": 4}, epochs=3)
    assert run.model.dtypes == {torch.float32, torch.bfloat16}
    assert run.precision_events == [{"step": 4, "from": "fp32", "to": "bf16", "reason": "4 steps in FP32 are done"}]
    assert [epoch["precision"] for epoch in run.history] == ["fp32", "bf16", "bf16"]


def test_the_progress_says_so(fit):
    texts = []
    fit("bf16", precision_schedule={"fp32_steps": 4}, progress=lambda done, total, text: texts.append(text))
    assert texts[3] == "epoch 2/3, fp32 -> bf16: 4 steps in FP32 are done"
    assert texts[4] == "epoch 2/3"


def settled_at(losses: list[float], **rules: object) -> int | None:
    schedule = over_time("bf16", fp32_until_settled=True, **rules)
    for step, loss in enumerate(losses, 1):
        if schedule.after_step(step, loss, False, None):
            return step
    return None


def test_a_loss_has_settled_when_a_window_is_no_more_than_a_share_below_the_one_before():
    falling = [100 * 0.9**step for step in range(60)]
    rules = {"settle_window": 5, "settle_drop": 0.01}
    assert settled_at(falling, **rules) is None
    assert settled_at([*falling[:20], *[falling[19]] * 20], **rules) == 29, "two windows of equal losses"
    assert settled_at([1.0] * 40, **rules) == 10, "not before there are two windows"
    assert settled_at([1.0] * 40, fp32_steps=25, **rules) == 25
    assert settled_at([1.0] * 5 + [0.9901] * 5, **rules) == 10, "1 % is allowed, less than that is here"
    assert settled_at([1.0] * 5 + [0.9899] * 5, **rules) is None
    assert settled_at([-1.0] * 5 + [-1.02] * 5, **rules) is None, "a negative loss that falls"


def test_skips_in_a_row_lead_out_of_fp16(monkeypatch):
    has_bf16(monkeypatch, True)
    schedule = over_time(fallback_skips=3)
    pattern = [True, True, False, True, True, True]
    events = [schedule.after_step(step, 1.0, skipped, 1024.0) for step, skipped in enumerate(pattern, 1)]
    assert events[:5] == [None] * 5
    assert events[5] == {"step": 6, "from": "fp16", "to": "bf16", "reason": "3 skipped steps in a row"}
    assert (schedule.current.precision, schedule.current.scales_loss) == ("bf16", False)


@pytest.mark.parametrize(("bf16", "refuge"), [(True, "bf16"), (False, "fp32")])
def test_a_scale_below_1_leads_to_bf16_where_the_device_computes_in_it(monkeypatch, bf16, refuge):
    has_bf16(monkeypatch, bf16)
    schedule = over_time()
    assert schedule.after_step(1, 1.0, True, 1.0) is None
    assert schedule.after_step(2, 1.0, True, 0.5)["to"] == refuge
    assert "the loss scale fell to 0.5" in schedule.current.reason


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_there_is_nothing_to_leave_where_no_loss_is_scaled(precision):
    schedule = over_time(precision, fallback_skips=1)
    assert schedule.after_step(1, 1.0, False, None) is None


def test_a_fallback_that_is_off_keeps_on_skipping():
    schedule = over_time(fallback=False, fallback_skips=1)
    assert schedule.after_step(1, 1.0, True, 0.25) is None


def test_a_run_that_fp16_cannot_hold_ends_in_another_precision_and_learns(fit, monkeypatch):
    """Gradients of this loss exceed 65504 unscaled, so that no scale of 1 or more can help."""
    has_bf16(monkeypatch, True)
    run = fit("fp16", loss=lambda outputs, labels: nn.functional.cross_entropy(outputs, labels) * 1e8, epochs=14)
    assert [(event["from"], event["to"]) for event in run.precision_events] == [("fp16", "bf16")]
    assert run.num_skipped == run.precision_events[0]["step"] == 17
    assert run.history[-1]["precision"] == "bf16"
    assert run.history[-1]["early_stopping_score"] > 0.9


def test_what_is_left_is_not_come_back_to_after_loading():
    first = over_time(fp32_steps=2)
    for step in (1, 2):
        first.after_step(step, 1.0, False, None)
    second = over_time(fp32_steps=2)
    second.load_state_dict(first.state_dict())
    assert second.current == first.current == replace(choice_of("fp16"))
    assert second.events == first.events
    assert second.after_step(3, 1.0, False, 1024.0) is None
