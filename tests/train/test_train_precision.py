"""Which precision is trained in: what was asked for, or what is faster here, and never what the device cannot do."""

from __future__ import annotations

import pytest
import torch
from small_training import Mlp, choice_of

from mpdeploy.config import TrainConfig
from mpdeploy.errors import UnavailableError
from mpdeploy.train import precision
from mpdeploy.train.precision import CHOICE_MARGIN, PrecisionChoice, autocast, choose_precision, pick_device


def config(**fields) -> TrainConfig:
    return TrainConfig(model=Mlp, **fields)


def never(name: str) -> None:
    pytest.fail(f"a step in {name} was timed")


def timed(monkeypatch, fp32_ms: float, bf16_ms: float) -> None:
    """Let a step in FP32 and in BF16 take so long."""
    times = {"fp32": fp32_ms, "bf16": bf16_ms}
    monkeypatch.setattr(precision, "_median_step_ms", lambda names, run_step: times)


@pytest.mark.parametrize("asked", ["fp32", "bf16", "fp16"])
def test_a_precision_that_is_asked_for_is_taken_without_timing(asked):
    choice = choose_precision(config(precision=asked), "cpu", never)
    assert (choice.precision, choice.reason) == (asked, "train.precision says so")


def test_on_a_cpu_its_own_setting_wins():
    choice = choose_precision(config(precision="fp16", cpu_precision="bf16"), "cpu", never)
    assert (choice.precision, choice.reason) == ("bf16", "train.cpu_precision says so")


def test_on_cuda_the_cpu_s_setting_does_not_count():
    assert choose_precision(config(precision="bf16", cpu_precision="fp32"), "cuda", never).precision == "bf16"


def test_auto_on_cuda_is_fp16_with_a_scaler():
    choice = choose_precision(config(), "cuda", never)
    assert (choice.precision, choice.scales_loss) == ("fp16", True)
    assert "since the engines that ship compute in fp16" in choice.reason


@pytest.mark.parametrize(
    ("fp32_ms", "bf16_ms", "chosen"),
    [(10.0, 5.0, "bf16"), (10.0, 20.0, "fp32"), (10.0, 10.0, "fp32"), (10.0, 10.0 * (1 - CHOICE_MARGIN / 2), "fp32")],
)
def test_auto_on_a_cpu_takes_the_faster_and_says_both_times(monkeypatch, fp32_ms, bf16_ms, chosen):
    timed(monkeypatch, fp32_ms, bf16_ms)
    choice = choose_precision(config(), "cpu", lambda name: name)
    assert choice.precision == chosen
    assert choice.step_ms == {"fp32": fp32_ms, "bf16": round(bf16_ms, 3)}
    assert f"{bf16_ms:.3g} ms in bf16" in choice.reason
    assert f"{fp32_ms:.3g} ms in fp32" in choice.reason


def test_auto_times_steps_in_turns_after_one_to_warm_up():
    ran = []
    choose_precision(config(), "cpu", ran.append)
    assert ran == ["fp32", "bf16"] * (precision.CHOICE_STEPS + 1)


@pytest.mark.parametrize("fields", [{"precision": "tf32"}, {"cpu_precision": "tf32"}])
def test_tf32_on_a_cpu_is_refused(fields):
    with pytest.raises(UnavailableError, match="this is a CPU") as caught:
        choose_precision(config(**fields), "cpu", never)
    assert caught.value.exit_code == 21


def test_cuda_that_is_asked_for_and_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match="torch sees no CUDA device") as caught:
        pick_device(config(device="cuda"))
    assert caught.value.exit_code == 21
    assert (pick_device(config()), pick_device(config(device="cpu"))) == ("cpu", "cpu")


def test_a_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (pick_device(config()), pick_device(config(device="cpu"))) == ("cuda", "cpu")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", torch.float32)],
)
def test_autocast_multiplies_in_the_chosen_type_within_its_block_only(name, dtype):
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with autocast(choice_of(name)):
        assert layer(x).dtype == dtype
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize(("name", "within"), [("tf32", "high"), ("fp32", "highest"), ("bf16", "highest")])
def test_tf32_is_on_only_where_it_was_chosen(name, within):
    before = torch.get_float32_matmul_precision()
    with autocast(choice_of(name)):
        assert torch.get_float32_matmul_precision() == within
    with pytest.raises(ZeroDivisionError), autocast(choice_of(name)):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_fp32_is_fp32_in_convolutions_and_products_alike(precision: str, tf32: bool) -> None:
    """cuDNN's convolutions run in TF32 by default, whatever is said about matrix products."""
    assert torch.backends.cudnn.allow_tf32
    with autocast(PrecisionChoice(precision, "cpu", "", {})):
        assert torch.backends.cudnn.allow_tf32 is tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
