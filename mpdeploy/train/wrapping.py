"""A model on several ranks: DDP around it, or FSDP2 and tensor parallelism within it. What differs from one rank is here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpdeploy.config import TrainConfig
from mpdeploy.errors import ConfigError, UnavailableError
from mpdeploy.train.modules import matching
from mpdeploy.train.precision import PrecisionChoice
from mpdeploy.train.ranks import ALONE, Ranks


def check(config: TrainConfig, choice: PrecisionChoice, ranks: Ranks) -> None:
    """Refuse what a strategy cannot do.

    Raises:
        ConfigError: a field of `train` that does not go with FSDP2.
        UnavailableError: SyncBatchNorm without CUDA.
    """
    if config.parallel.sync_batchnorm and ranks.size > 1 and choice.device != "cuda":
        raise UnavailableError(
            "train.parallel.sync_batchnorm wants CUDA: torch's SyncBatchNorm has no CPU kernel.",
            hint="leave it out: each rank then takes statistics of its own share, and rank 0's running ones ship",
        )
    if ranks.mesh is None:
        return
    schedule = config.precision_schedule
    clashes = {
        "train.precision_schedule: FSDP2's precision is fixed when the model is split": schedule.fp32_steps > 0
        or schedule.fp32_until_settled,
        "train.evaluate_in 'fp32': FSDP2 evaluates in the precision it trains in": config.evaluate_in == "fp32"
        and choice.dtype is not None,
        "train.gradient_threshold: quantiles and maxima of a split gradient are not those of the whole": config.gradient_threshold.kind
        not in ("off", "absolute"),
    }
    for clash, is_there in clashes.items():
        if is_there:
            raise ConfigError(f"train.parallel.strategy 'fsdp2' does not go with {clash}.", hint="use strategy 'ddp'")


def synced_batchnorm(model: nn.Module, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """The model with BatchNorms that take their statistics over all ranks, where `sync_batchnorm` asks for it."""
    if not config.parallel.sync_batchnorm or ranks.size == 1:
        return model
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model, ranks.data_group)
    return converted


def split(model: nn.Module, config: TrainConfig, choice: PrecisionChoice, ranks: Ranks) -> None:
    """FSDP2 and tensor parallelism, in place: parameters become DTensors. Nothing under `ddp`."""
    if ranks.mesh is None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallel, modules = config.parallel, dict(model.named_modules())
    plan: dict[str, Any] = {}
    for pattern, way in parallel.tensor_plan.items():
        for name in matching(model, [pattern], "parallel.tensor_plan"):
            if not isinstance(modules[name], nn.Linear | nn.Embedding):
                raise ConfigError(
                    f"train.parallel.tensor_plan: '{pattern}' matches '{name}', a {type(modules[name]).__name__}.",
                    hint="linear and embedding layers can be split",
                )
            plan[name] = ColwiseParallel() if way == "colwise" else RowwiseParallel()
    if plan:
        parallelize_module(model, ranks.mesh["tensor"], plan)
    in_half = MixedPrecisionPolicy(param_dtype=choice.dtype, reduce_dtype=torch.float32)
    in_fp32 = MixedPrecisionPolicy(  # what it answers goes to modules whose weights are half
        param_dtype=torch.float32, reduce_dtype=torch.float32, output_dtype=choice.dtype
    )
    batch_norms = [name for name, module in modules.items() if name and isinstance(module, _BatchNorm)]
    keeps = _outermost(
        matching(model, config.fp32_modules, "fp32_modules") + (batch_norms if choice.dtype is not None else [])
    )  # BatchNorm's statistics are FP32 buffers, and its kernels want weights of their type
    shards = _outermost(matching(model, parallel.shard_modules, "parallel.shard_modules"))
    for name in sorted({*keeps, *shards}, key=lambda name: -name.count(".")):  # what lies within first
        if any(True for _ in modules[name].parameters()):
            kept = any(name == keep or name.startswith(f"{keep}.") for keep in keeps)
            fully_shard(modules[name], mesh=ranks.mesh["data"], mp_policy=in_fp32 if kept else in_half)
    fully_shard(model, mesh=ranks.mesh["data"], mp_policy=in_half)


def _outermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def replicated(model: nn.Module, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """What the loop calls: DDP around the model where each rank has a copy, else the model itself."""
    if ranks.size == 1 or ranks.mesh is not None:
        return model
    here = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    return nn.parallel.DistributedDataParallel(
        model, device_ids=here, find_unused_parameters=config.parallel.find_unused_parameters
    )


@contextlib.contextmanager
def adding_up(model: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Around one micro-batch: gradients go to the other ranks with the last one only."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not is_last:
        with model.no_sync():
            yield
        return
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    yield


def gradient_norm(parameters: Iterable[nn.Parameter], max_norm: float | None, ranks: Ranks = ALONE) -> torch.Tensor:
    """Global norm of all gradients before they are clipped to `max_norm`, a plain scalar that is the same on every rank.

    Split gradients are put together by the mesh they lie on: torch adds norms of one mesh only. Over two axes of a mesh it may add in
    another order on each rank, and what ranks hold in common would drift apart: all take rank 0's.
    """
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for item in parameters:
        if item.grad is not None:
            by_mesh.setdefault(getattr(item.grad, "device_mesh", None), []).append(item)
    if not by_mesh:
        return torch.zeros(())
    if max_norm is not None and len(by_mesh) == 1 and ranks.tensor_size == 1:
        return _whole(nn.utils.clip_grad_norm_(next(iter(by_mesh.values())), max_norm))
    norms = [_whole(nn.utils.get_total_norm([item.grad for item in group])) for group in by_mesh.values()]
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    ranks.copy(total)
    if max_norm is not None:
        for group in by_mesh.values():
            nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


def _whole(value: torch.Tensor) -> torch.Tensor:
    full: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full
