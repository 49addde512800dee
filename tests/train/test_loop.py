"""The training loop: what runs in half, what stays FP32, which steps count, and that a killed run ends in the same weights."""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from small_training import BATCH, FEATURES, NUM_TRAIN, Mlp, blobs, choice_of, ids_in, same, weights_of
from torch import nn

from mpdeploy.artifact import Dataset
from mpdeploy.config import TrainConfig
from mpdeploy.errors import ConfigError, DataError, TrainingDivergedError, UserCodeError
from mpdeploy.train.checkpoint import load_state
from mpdeploy.train.loop import gradients, make_model

STEPS_AN_EPOCH = NUM_TRAIN // BATCH


class Interrupted(BaseException):
    """Stands for a kill: nothing catches it."""


def kill_at(step: int):
    def progress(done: int, total: int, text: str) -> None:
        if done == step:
            raise Interrupted

    return progress


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_forward_runs_in_the_chosen_precision_and_weights_stay_fp32(fit, tmp_path, precision, dtype):
    run = fit(precision)
    assert run.model.dtypes == {dtype}
    assert {value.dtype for value in run.model.state_dict().values()} == {torch.float32}
    moments = load_state(tmp_path / "state.pt")["optimizer"]["state"]
    assert {value.dtype for state in moments.values() for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_loss_is_computed_in_fp32(fit, precision):
    seen = set()

    def loss(outputs, labels):
        seen.add((outputs.dtype, torch.is_autocast_enabled("cpu")))
        return nn.functional.cross_entropy(outputs, labels)

    fit(precision, loss=loss, epochs=1)
    assert seen == {(torch.float32, False)}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_learns(fit, precision):
    history = fit(precision, epochs=8).history
    assert [epoch["epoch"] for epoch in history] == list(range(1, 9))
    assert history[-1]["early_stopping_score"] > 0.9
    assert history[-1]["early_stopping_loss"] < history[0]["early_stopping_loss"] / 2


def test_the_model_comes_back_ready_to_infer(fit):
    assert not fit(epochs=1).model.training


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_same_seed_gives_the_same_weights_to_the_last_bit(fit, precision):
    first, second = fit(precision, state="a"), fit(precision, state="b")
    assert same(weights_of(first.model), weights_of(second.model))
    other = fit(precision, state="c", seed=1)
    assert not same(weights_of(first.model), weights_of(other.model))


def test_amp_and_the_reference_start_from_the_same_weights():
    config = TrainConfig(model=Mlp, seed=3)
    assert same(weights_of(make_model(config, "cpu")), weights_of(make_model(config, "cpu")))


def test_amp_and_the_reference_see_the_same_batches_in_the_same_order(fit):
    orders = {}
    for precision in ("fp32", "bf16"):
        orders[precision] = []

        def augment(inputs, generator, seen=orders[precision]):
            seen.append((ids_in(inputs), float(torch.rand((), generator=generator))))
            return inputs

        fit(precision, augment=augment, state=precision)
    assert orders["fp32"] == orders["bf16"]


def test_an_epoch_sees_every_sample_once_in_an_order_of_its_own(fit):
    orders = []

    def augment(inputs, generator):
        orders.append(ids_in(inputs))
        return inputs

    fit(augment=augment, epochs=2)
    epochs = [list(chain(*orders[:STEPS_AN_EPOCH])), list(chain(*orders[STEPS_AN_EPOCH:]))]
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM_TRAIN))] * 2
    assert epochs[0] != epochs[1] != list(range(NUM_TRAIN))


def test_augmentation_is_for_training_batches_alone(fit):
    augmented = Counter()

    def augment(inputs, generator):
        augmented.update(ids_in(inputs))
        return inputs

    fit(augment=augment, epochs=1, stopping_set=blobs(40, 1000))
    assert set(augmented) == set(range(NUM_TRAIN))


def test_what_augmentation_returns_is_what_the_model_sees(fit):
    run = fit(augment=lambda inputs, generator: inputs * 0 + 5e-6, epochs=1)
    assert set(run.model.seen) == {5, *range(1000, 1040)}


def test_a_last_batch_that_is_smaller_counts_too(fit):
    run = fit(train_set=blobs(NUM_TRAIN + 1, 0), epochs=1)
    assert len(run.step_ms) == STEPS_AN_EPOCH + 1
    assert set(range(NUM_TRAIN + 1)) < set(run.model.seen)


# -- loss scale and skipped steps ----------------------------------------------------------------------------------------


def large_loss(outputs, labels):
    return (
        nn.functional.cross_entropy(outputs, labels) * 64
    )  # at the initial scale of 65,536 its gradients overflow FP16


def test_steps_that_overflow_are_skipped_and_counted_and_the_schedule_waits(fit, tmp_path):
    run = fit("fp16", loss=large_loss, epochs=3)
    state = load_state(tmp_path / "state.pt")
    assert run.num_skipped > 0
    assert run.history[-1]["loss_scale"] == 65536 / 2**run.num_skipped
    assert state["schedule"]["taken"] == 3 * STEPS_AN_EPOCH - run.num_skipped
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {
        3 * STEPS_AN_EPOCH - run.num_skipped
    }


class SkipsOne(torch.amp.GradScaler):
    """Finds an overflow at the third step, and nowhere else."""

    def __init__(self, device: str, enabled: bool = True, **kwargs: object) -> None:
        super().__init__(device, enabled=True, init_scale=1024.0)
        self.calls = 0

    def step(self, optimizer, *args, **kwargs):
        self.calls += 1
        return None if self.calls == 3 else super().step(optimizer, *args, **kwargs)

    def update(self, new_scale=None):
        super().update(512.0 if self.calls == 3 else new_scale)


def test_the_schedule_does_not_advance_on_a_skipped_step(fit, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", SkipsOne)
    skipped = fit("fp16", epochs=1, schedule="cosine", state="a")
    assert skipped.num_skipped == 1
    rate = 1e-2 * 0.5 * (1 + math.cos(math.pi * (STEPS_AN_EPOCH - 1) / STEPS_AN_EPOCH))
    assert skipped.history[0]["learning_rate"] == pytest.approx(rate)


def test_weights_do_not_move_on_a_skipped_step(fit, monkeypatch):
    class SkipsAll(SkipsOne):
        def step(self, optimizer, *args, **kwargs):
            pass

        def update(self, new_scale=None):
            super(SkipsOne, self).update(self.get_scale() / 2)

    monkeypatch.setattr(torch.amp, "GradScaler", SkipsAll)
    before = weights_of(make_model(TrainConfig(model=Mlp), "cpu"))
    assert same(weights_of(fit("fp16", epochs=1).model), before)


@pytest.mark.parametrize(
    ("precision", "scaling", "scale"), [("fp16", "dynamic", 65536), ("fp16", "none", 1), ("bf16", "dynamic", 1)]
)
def test_only_fp16_scales_its_loss_and_only_where_it_is_asked_to(fit, precision, scaling, scale):
    run = fit(precision, loss_scaling=scaling, epochs=1)
    assert run.history[0]["loss_scale"] == scale
    assert run.num_skipped == 0


@pytest.mark.parametrize(("precision", "scale"), [("fp32", 1), ("fp16", 65536)])
def test_gradients_are_unscaled_before_they_are_clipped(fit, monkeypatch, precision, scale):
    norms, before = [], nn.utils.clip_grad_norm_

    def clip(parameters, max_norm):
        norms.append(before(parameters, max_norm))
        return norms[-1]

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip)
    run = fit(precision, epochs=1)
    assert run.history[0]["loss_scale"] == scale
    assert len(norms) == STEPS_AN_EPOCH
    assert all(0.01 < norm < 100 for norm in norms), "a norm of scaled gradients is near 65,536 times larger"


def test_without_a_limit_nothing_is_clipped(fit, monkeypatch):
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: pytest.fail("clipped"))
    fit(max_grad_norm=None, epochs=1)


def test_gradients_that_are_compared_are_unscaled():
    config = TrainConfig(model=Mlp)
    batch = (torch.from_numpy(blobs(32, 0).inputs["x"]), torch.from_numpy(blobs(32, 0).labels))
    fp32, fp16 = (gradients(config, choice_of(precision), batch, steps=2) for precision in ("fp32", "fp16"))
    assert len(fp32) == len(fp16) == 2
    for name in fp32[0]:
        assert torch.allclose(fp32[0][name], fp16[0][name], rtol=0.05, atol=2e-3), name


def test_the_gradients_of_a_skipped_step_are_not_compared():
    config = TrainConfig(model=Mlp, loss=large_loss)
    batch = (torch.from_numpy(blobs(32, 0).inputs["x"]), torch.from_numpy(blobs(32, 0).labels))
    found = gradients(config, choice_of("fp16"), batch, steps=2)
    assert len(found) == 2
    assert all(bool(torch.isfinite(value).all()) for step in found for value in step.values())


# -- resuming ----------------------------------------------------------------------------------------------------------

FULL = {"epochs": 4, "augment": lambda x, generator: x + 0.1 * torch.randn(x.shape, generator=generator)}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("what", "step"), [("in the first epoch", 2), ("at the end of an epoch", 6), ("in the third epoch", 7), ("at the last step", 12)]
)  # fmt: skip
def test_a_killed_run_ends_in_the_same_weights_to_the_last_bit(fit, precision, what, step):
    options = FULL | ({"loss": large_loss} if precision == "fp16" else {})
    whole = fit(precision, state="whole", **options)
    with pytest.raises(Interrupted):
        fit(precision, progress=kill_at(step), **options)
    steps = []
    resumed = fit(precision, progress=lambda done, total, text: steps.append(done), **options)
    assert same(weights_of(whole.model), weights_of(resumed.model))
    without_time = [
        [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in run.history] for run in (whole, resumed)
    ]
    assert without_time[0] == without_time[1]
    finished_epochs = (step - 1) // STEPS_AN_EPOCH
    assert steps == list(range(finished_epochs * STEPS_AN_EPOCH + 1, 4 * STEPS_AN_EPOCH + 1)), "it did not resume"


def test_a_run_that_is_killed_again_and_again_still_ends_in_the_same_weights(fit):
    whole = fit("bf16", state="whole", **FULL)
    for step in (2, 4, 5, 9, 11):
        with pytest.raises(Interrupted):
            fit("bf16", progress=kill_at(step), **FULL)
    assert same(weights_of(whole.model), weights_of(fit("bf16", **FULL).model))


def test_a_finished_run_trains_no_further(fit):
    first = fit(**FULL)
    again = fit(progress=lambda *_: pytest.fail("it trained"), **FULL)
    assert same(weights_of(first.model), weights_of(again.model))
    assert again.history == first.history


def test_states_are_written_as_often_as_asked(fit, tmp_path):
    with pytest.raises(Interrupted):
        fit(progress=kill_at(8), epochs=4, checkpoint_every_epochs=2)
    assert load_state(tmp_path / "state.pt")["epoch"] == 2
    with pytest.raises(Interrupted):
        fit(progress=kill_at(5), epochs=4, checkpoint_every_epochs=2, state="other.pt")
    assert load_state(tmp_path / "other.pt") is None


def test_the_last_epoch_is_always_saved(fit, tmp_path):
    fit(epochs=3, checkpoint_every_epochs=2)
    assert load_state(tmp_path / "state.pt")["epoch"] == 3


def test_a_state_of_another_config_is_not_resumed(fit):
    with pytest.raises(Interrupted):
        fit(progress=kill_at(5), key="one")
    steps = []
    fit(progress=lambda done, total, text: steps.append(done), key="another")
    assert steps[0] == 1


@pytest.mark.parametrize("content", [b"", b"not a state", b"\x80\x02garbage", None])
def test_a_state_that_cannot_be_read_starts_over(fit, tmp_path, content):
    whole = fit(state="whole")
    with pytest.raises(Interrupted):
        fit(progress=kill_at(8))
    path = tmp_path / "state.pt"
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    steps = []
    run = fit(progress=lambda done, total, text: steps.append(done))
    assert steps[0] == 1
    assert same(weights_of(whole.model), weights_of(run.model))


def test_a_state_holds_nothing_that_could_run_code(fit, tmp_path):
    fit("fp16")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert {"model", "optimizer", "scaler", "order", "augmentation", "random"} <= state.keys()


# -- early stopping ----------------------------------------------------------------------------------------------------


def unlearnable(count: int, first_id: int) -> Dataset:
    """Labels that have nothing to do with the inputs."""
    dataset = blobs(count, first_id)
    return Dataset(dataset.inputs, dataset.ids, np.roll(dataset.labels, 1))


def test_early_stopping_waits_for_its_patience_and_no_longer(fit):
    run = fit(epochs=30, early_stopping_patience=2, stopping_set=unlearnable(40, 1000))
    losses = [epoch["early_stopping_loss"] for epoch in run.history]
    best = losses.index(min(losses))
    assert len(losses) < 30
    assert len(losses) == best + 1 + 2


def test_without_patience_every_epoch_is_trained(fit):
    assert len(fit(epochs=10, stopping_set=unlearnable(40, 1000)).history) == 10


def test_early_stopping_remembers_its_patience_when_it_resumes(fit):
    options = {"epochs": 30, "early_stopping_patience": 2, "stopping_set": unlearnable(40, 1000)}
    whole = fit(state="whole", **options)
    with pytest.raises(Interrupted):
        fit(progress=kill_at(3 * (len(whole.history) - 1)), **options)
    assert len(fit(**options).history) == len(whole.history)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_loss_that_is_not_finite_stops_training_and_says_where(fit, tmp_path, precision, bad):
    calls = Counter()

    def loss(outputs, labels):
        calls["training"] += len(labels) == BATCH
        return nn.functional.cross_entropy(outputs, labels) + (bad if calls["training"] == STEPS_AN_EPOCH + 2 else 0.0)

    with pytest.raises(
        TrainingDivergedError, match=rf"The loss became {bad} in epoch 2, step 2 \({precision}\)"
    ) as caught:
        fit(precision, loss=loss)
    assert caught.value.exit_code == 20
    assert "learning_rate" in (caught.value.hint or "")
    assert load_state(tmp_path / "state.pt")["epoch"] == 1, "the epoch before is kept"


def test_a_learning_rate_that_blows_up_is_caught(fit):
    with pytest.raises(TrainingDivergedError):
        fit(
            learning_rate=1e30,
            weight_decay=0.0,
            max_grad_norm=None,
            schedule="constant",
            epochs=10,
            loss=lambda outputs, labels: outputs.square().sum(),
        )


def broken(*args):
    raise KeyError("theirs")


class FailsInEval(Mlp):
    def forward(self, x):
        if not self.training:
            raise KeyError("theirs")
        return super().forward(x)


class NeverAnswers(Mlp):
    def forward(self, x):
        raise KeyError("theirs")


def fails_on_forty(outputs, labels):
    if len(labels) == 40:
        raise KeyError("theirs")
    return nn.functional.cross_entropy(outputs, labels)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": broken},
        {"model": NeverAnswers},
        {"model": FailsInEval},
        {"loss": broken},
        {"loss": fails_on_forty},
        {"augment": broken},
    ],
    ids=[
        "making the model",
        "the model",
        "the model in eval mode",
        "the loss",
        "the loss in evaluation",
        "augmentation",
    ],
)
def test_an_exception_in_the_users_own_functions_is_theirs(fit, fields):
    with pytest.raises(UserCodeError, match=r"test_loop\.py, line \d+, raised KeyError: 'theirs'") as caught:
        fit(**fields)
    assert caught.value.exit_code == 20


def test_a_model_function_must_return_a_module(fit):
    with pytest.raises(ConfigError, match=r"train\.model\(\) returned int, expected torch\.nn\.Module"):
        fit(model=lambda: 3)


class TwoAnswers(Mlp):
    def forward(self, x):
        return super().forward(x), x


def test_a_model_must_answer_one_tensor(fit):
    with pytest.raises(ConfigError, match=r"train\.model answered tuple, training expects one tensor"):
        fit(model=TwoAnswers)


def test_training_wants_labels(fit):
    dataset = blobs(NUM_TRAIN, 0)
    with pytest.raises(DataError, match="no labels"):
        fit(train_set=Dataset(dataset.inputs, dataset.ids))


class TwoInputs(nn.Module):
    """ids [n, 3] (integers) and x [n, 16] -> logits [n, 4]."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.EmbeddingBag(10, 8), nn.Linear(FEATURES, 8)
        self.head = nn.Linear(8, 4)
        self.seen = set()

    def forward(self, ids, x):
        self.seen.add((ids.dtype, x.dtype))
        return self.head(torch.relu(self.table(ids) + self.body(x)))


def with_ids(count: int, first_id: int) -> Dataset:
    dataset = blobs(count, first_id)
    return Dataset({"ids": dataset.ids[:, None] % [7, 8, 9], "x": dataset.inputs["x"]}, dataset.ids, dataset.labels)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_several_inputs_go_to_the_model_in_the_datasets_order_and_integers_stay_integers(fit, precision):
    run = fit(precision, model=TwoInputs, train_set=with_ids(NUM_TRAIN, 0), stopping_set=with_ids(40, 1000), epochs=8)
    assert run.model.seen == {(torch.int64, torch.float32)}
    assert run.history[-1]["early_stopping_score"] > 0.9


def test_augmentation_of_several_inputs_gets_and_returns_them_by_name(fit):
    def augment(inputs, generator):
        assert list(inputs) == ["ids", "x"]
        return {"x": inputs["x"] * 0, "ids": inputs["ids"] * 0}

    run = fit(model=TwoInputs, train_set=with_ids(NUM_TRAIN, 0), stopping_set=with_ids(40, 1000), augment=augment)
    assert run.history[-1]["early_stopping_score"] < 0.6
