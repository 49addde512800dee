"""The user's model and how parts of it run: modules that stay FP32, activation checkpointing, torch.compile.

A part is changed by putting a function before its `forward` for as long as training lasts. The module's class, parameters and
names stay as they are, so weights and the exported graph know nothing of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mpdeploy.config import TrainConfig
from mpdeploy.errors import ConfigError, closest_names
from mpdeploy.user_code import user_call

Inputs: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
"""A model's inputs, in the order of the dataset's: one tensor, or a tuple that is passed positionally."""


def make_model(config: TrainConfig, device: str) -> nn.Module:
    """The user's model with the configured seed, on its device."""
    torch.manual_seed(config.seed)
    model = user_call(config.model)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"train.model() returned {type(model).__name__}, expected torch.nn.Module.")
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def loss_of(config: TrainConfig) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The user's loss, or cross entropy. It is computed outside autocast, on FP32 outputs."""
    return config.loss or nn.functional.cross_entropy


def answer(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """What the user's model answers, in FP32."""
    outputs = user_call(model, *((inputs,) if isinstance(inputs, torch.Tensor) else inputs))
    if not isinstance(outputs, torch.Tensor):
        raise ConfigError(f"train.model answered {type(outputs).__name__}, training expects one tensor.")
    return outputs.float()


def leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules without children, by name."""
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            yield name, module


def matching(model: nn.Module, patterns: Iterable[str], field: str) -> list[str]:
    """Names of the modules that names or globs pick, in the model's order.

    Raises:
        ConfigError: a pattern that picks none; `field` is where it was written.
    """
    names = [name for name, _ in model.named_modules() if name]
    picked: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise ConfigError(
                f"train.{field}: '{pattern}' matches no module of the model.",
                hint=f"closest names: {closest_names(pattern, names)}",
            )
        picked |= found
    return [name for name in names if name in picked]


@contextlib.contextmanager
def prepared(model: nn.Module, config: TrainConfig) -> Iterator[list[str]]:
    """Within the block, `fp32_modules` run without autocast and `checkpoint_modules` compute their activations twice.

    Yields:
        Names of the modules that stay FP32.
    """
    modules = dict(model.named_modules())
    in_fp32 = matching(model, config.fp32_modules, "fp32_modules")
    recomputed = matching(model, config.checkpoint_modules, "checkpoint_modules")
    changed = [modules[name] for name in in_fp32 + recomputed]
    try:
        for name in in_fp32:
            modules[name].forward = _in_fp32(modules[name].forward)
        for name in recomputed:
            modules[name].forward = _recomputed(modules[name].forward)
        yield in_fp32
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _in_fp32(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        device = given[0].device.type if given else "cpu"
        with torch.autocast(device, enabled=False):
            return forward(*_as_fp32(args), **_as_fp32(kwargs))

    return run


def _as_fp32(value: Any) -> Any:
    """The same with every half tensor as FP32, within tuples, lists and dicts too."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, dict):
        return {key: _as_fp32(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_as_fp32(item) for item in value)
    return value


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def runnable(model: nn.Module, config: TrainConfig) -> nn.Module:
    """What the loop calls: the model itself, or compiled. The one place where a model is wrapped.

    Raises:
        ConfigError: torch knows no such compiler backend.
    """
    if config.compile is None:
        return model
    backends = torch._dynamo.list_backends(exclude_tags=())
    if config.compile not in backends:
        raise ConfigError(
            f"train.compile: torch has no compiler backend '{config.compile}'.",
            hint=f"closest names: {closest_names(config.compile, backends)}",
        )
    return torch.compile(model, backend=config.compile)


@contextlib.contextmanager
def eager_backward_precision(config: TrainConfig) -> Iterator[None]:
    """Let compiled backward passes run outside autocast, as eager ones do.

    By default torch.compile traces backward with forward's autocast still on, which rounds sums that eager keeps in FP32
    (pytorch#153044).
    """
    if config.compile is None:
        yield
        return
    import torch._functorch.config as functorch

    with functorch.patch("backward_pass_autocast", "off"):
        yield
