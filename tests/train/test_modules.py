"""Parts of the model: FP32 modules, activation checkpointing, torch.compile; and that nothing of it stays behind."""

from __future__ import annotations

import contextlib

import pytest
import torch
from small_training import FEATURES, Mlp, choice_of, same, weights_of
from torch import nn

from mpdeploy.config import TrainConfig
from mpdeploy.errors import ConfigError
from mpdeploy.train import stepping
from mpdeploy.train.memory import SavedBytes
from mpdeploy.train.modules import matching, prepared
from mpdeploy.train.precision import autocast


class Deep(nn.Module):
    """x [n, 16] -> [n, 4]: a body of three blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh()) for _ in range(3)))
        self.head = nn.Linear(FEATURES, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def config(**fields: object) -> TrainConfig:
    return TrainConfig(model=Deep, **fields)


def output_types(model: nn.Module, x: torch.Tensor) -> dict[str, torch.dtype]:
    found = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: found.__setitem__(name, o.dtype))
    with autocast(choice_of("bf16")):
        model(x)
    return found


def test_fp32_modules_run_in_fp32_among_half_ones():
    model = Deep()
    with prepared(model, config(fp32_modules=("body.1", "head"))) as names:
        found = output_types(model, torch.randn(2, FEATURES))
    assert names == ["body.1", "head"]
    half = {name for name, dtype in found.items() if dtype == torch.bfloat16}
    assert half == {"body", "body.0", "body.0.0", "body.0.1", "body.2", "body.2.0", "body.2.1"}
    assert found["body.1.0"] == found["head"] == torch.float32


def test_an_fp32_module_is_given_fp32_inputs_that_are_what_the_half_module_answered():
    model, seen = Deep(), []
    model.body[1].register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    model.body[1][0].register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    with prepared(model, config(fp32_modules=("body.1",))), autocast(choice_of("bf16")):
        model(torch.randn(2, FEATURES))
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(("pattern", "names"), [("body.*.0", ["body.0.0", "body.1.0", "body.2.0"]), ("head", ["head"])])
def test_modules_are_picked_by_name_or_glob(pattern, names):
    assert matching(Deep(), [pattern], "fp32_modules") == names


@pytest.mark.parametrize("field", ["fp32_modules", "checkpoint_modules"])
def test_a_pattern_that_matches_no_module_is_an_error_with_the_closest_names(fit, field):
    with pytest.raises(ConfigError, match=rf"train\.{field}: 'frist' matches no module") as caught:
        fit(**{field: ("frist",)})
    assert "closest names: first" in (caught.value.hint or "")


@pytest.mark.parametrize("field", ["fp32_modules", "checkpoint_modules"])
def test_nothing_stays_behind_in_the_model(field):
    model = Deep()
    with prepared(model, config(**{field: ("body.1", "head")})):
        assert "forward" in vars(model.head)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_trained_model_exports_without_a_trace_of_its_fp32_modules(fit):
    run = fit("bf16", model=Deep, fp32_modules=("body.1",), epochs=1)
    assert run.fp32_modules == ["body.1"]
    program = torch.export.export(run.model, (torch.randn(2, FEATURES),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called == {"aten.linear.default", "aten.tanh.default"}


def test_checkpointed_modules_keep_fewer_activations_and_give_the_same_gradients():
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(64, FEATURES)
    kept, gradients = [], []
    for fields in ({}, {"checkpoint_modules": ("body",)}):
        model.zero_grad()
        saved = SavedBytes(model)
        with prepared(model, config(**fields)):
            with saved.measuring():
                loss = model(x).square().sum()
            loss.backward()
        kept.append(saved.num_bytes)
        gradients.append({name: item.grad.clone() for name, item in model.named_parameters()})
    assert same(*gradients)
    one = 64 * FEATURES * 4
    assert kept == [4 * one + 64 * 4 * 4, 2 * one + 64 * 4 * 4], (
        "x, three tanh and the answer; then x, the last and the answer"
    )


def test_checkpointing_trains_to_the_same_weights_and_dropout_drops_the_same(fit):
    plain, recomputed = fit(state="a"), fit(state="b", checkpoint_modules=("first", "drop"))
    assert same(weights_of(plain.model), weights_of(recomputed.model))


def difference(one: nn.Module, other: nn.Module) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
def test_a_compiled_model_runs_its_backward_outside_autocast_as_an_eager_one_does(fit, monkeypatch):
    """All its modules stay FP32, so it must train as in FP32; products in backward would be BF16 if autocast were on there."""
    options = {"model": Deep, "fp32_modules": ("body", "head"), "optimizer": "sgd", "learning_rate": 0.1}
    fp32 = fit("fp32", state="fp32", **options).model
    compiled = fit("bf16", state="compiled", compile="aot_eager", **options).model
    assert difference(fp32, compiled) < 1e-5
    monkeypatch.setattr(stepping, "eager_backward_precision", lambda config: contextlib.nullcontext())
    torch.compiler.reset()
    trapped = fit("bf16", state="trapped", compile="aot_eager", **options).model
    assert difference(fp32, trapped) > 1e-4, "the trap is gone from torch: is the setting still needed?"


def test_an_unknown_compiler_is_an_error_with_the_closest_names(fit):
    with pytest.raises(ConfigError, match="no compiler backend 'inductr'") as caught:
        fit(compile="inductr")
    assert "inductor" in (caught.value.hint or "")


def test_a_plain_mlp_is_untouched_by_default():
    model = Mlp()
    with prepared(model, TrainConfig(model=Mlp)) as names:
        assert names == []
        assert not any("forward" in vars(module) for module in model.modules())
