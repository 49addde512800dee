"""The ranks that train together: how they find each other, what rank 0 orders, and the few things they tell each other.

Rank 0 alone reads and writes the run. It orders the others to train, or to leave, through the launcher's store, which needs no process
group: a training that is skipped or fails before its first step leaves nobody waiting. The process group lasts as long as the training.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mpdeploy import distributed
from mpdeploy.config import TrainConfig
from mpdeploy.errors import ConfigError, MpdeployError, StageFailedError, UnavailableError

_ORDER = "order"
_POLL_SECONDS = 0.1
_MEET_WITHIN = timedelta(minutes=30)
_BLAME_SECONDS = 5.0
"""How long a rank that lost another one stays: torchrun names as the cause whichever it first finds dead, and then ends the others."""


@dataclass(frozen=True)
class Ranks:
    """Who trains together, seen from one of them.

    Attributes:
        rank: this process's number; rank 0 writes.
        size: how many processes train.
        data_rank: which share of a batch is this one's.
        data_size: how many shares there are: fewer than processes where layers are split (tensor parallel).
        mesh: axes `data` and, where layers are split, `tensor`; None where nothing is split.
        data_group: the processes with the other shares; None where there is one share.
    """

    rank: int = 0
    size: int = 1
    data_rank: int = 0
    data_size: int = 1
    mesh: Any = None
    data_group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the shares of a batch, in place, on its device: nothing waits for it. Every rank gets the same digits."""
        if self.data_size > 1:
            dist.all_reduce(values, group=self.data_group)
        return values

    def from_first(self, value: Any) -> Any:
        """What rank 0 has, on every rank: plain containers and tensors on the host."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_of(self, value: Any) -> list[Any]:
        """What each rank has, by rank, on rank 0; elsewhere only its own."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, found, dst=0)
        return found if found is not None else [value]

    def largest(self, *values: torch.Tensor) -> None:
        """Give every rank the largest that any of them has, in place, on its device."""
        if self.size > 1:
            for value in values:
                dist.all_reduce(value, op=dist.ReduceOp.MAX)

    @property
    def tensor_size(self) -> int:
        """Over how many ranks single layers are split."""
        return self.size // self.data_size

    def copy(self, *values: torch.Tensor) -> None:
        """Give every rank what rank 0 has, in place, on its device."""
        if self.size > 1:
            for value in values:
                dist.broadcast(value, src=0)


ALONE = Ranks()


@functools.cache
def _store() -> Any:
    """The launcher's store. All ranks meet here."""
    store, _, _ = next(dist.rendezvous("env://", timeout=_MEET_WITHIN))
    return dist.PrefixStore(f"mpdeploy/{distributed.attempt()}", store)  # the store outlives a restart


def order(value: dict[str, Any] | None) -> None:
    """Rank 0: tell the others what to train, or (None) to leave. Nothing where there are no others."""
    if distributed.world_size() > 1:
        _store().set(_ORDER, json.dumps(value))


def order_of_rank_0() -> dict[str, Any] | None:
    """What rank 0 ordered, waited for as long as rank 0 lives."""
    try:
        while not _store().check([_ORDER]):
            time.sleep(_POLL_SECONDS)
        found: dict[str, Any] | None = json.loads(_store().get(_ORDER))
    except dist.DistError:  # rank 0 held the store and has ended: its exit code says why
        return None
    return found


def check_ranks(config: TrainConfig, device: str) -> None:
    """Refuse what cannot be, before anyone is called.

    Raises:
        ConfigError: `train.parallel` contradicts itself, or the ranks cannot be divided as it says.
        UnavailableError: nccl was asked for on a CPU.
    """
    parallel, size = config.parallel, distributed.world_size()
    fault = parallel.fault()
    if fault is not None:
        raise ConfigError(f"train.parallel: {fault}.")
    if size % parallel.tensor_parallel:
        raise ConfigError(
            f"train.parallel.tensor_parallel is {parallel.tensor_parallel} and does not divide the number of ranks, {size}.",
            hint="give torchrun --nproc-per-node a multiple of it",
        )
    if device == "cpu" and parallel.backend == "nccl":
        raise UnavailableError(
            "train.parallel.backend is 'nccl' and training runs on a CPU.", hint="leave it at 'auto'"
        )


@contextlib.contextmanager
def together(config: TrainConfig, device: str) -> Iterator[Ranks]:
    """The ranks of a training, for as long as the block lasts; on CUDA each takes the GPU of its local number.

    Raises:
        ConfigError: as `check_ranks`.
        UnavailableError: as `check_ranks`; or this machine has fewer GPUs than ranks.
        StageFailedError: another rank died.
    """
    check_ranks(config, device)
    parallel, size = config.parallel, distributed.world_size()
    if size == 1 and parallel.strategy == "ddp":
        yield ALONE
        return
    if device == "cuda" and distributed.local_rank() >= torch.cuda.device_count():
        raise UnavailableError(
            f"Rank {distributed.rank()} wants GPU {distributed.local_rank()}; torch sees {torch.cuda.device_count()} here.",
            hint="give torchrun --nproc-per-node as many as there are GPUs, or --set train.device=cpu",
        )
    if device == "cuda":
        torch.cuda.set_device(distributed.local_rank())
    backend = parallel.backend if parallel.backend != "auto" else ("nccl" if device == "cuda" else "gloo")
    store = _store() if size > 1 else dist.HashStore()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl"
        if backend == "nccl"
        else "gloo",  # gloo beside nccl: what lies on the host is told from there
        store=store,
        rank=distributed.rank(),
        world_size=size,
        device_id=torch.device("cuda", distributed.local_rank()) if backend == "nccl" else None,
    )
    try:
        yield _divided(config, device)
    except Exception as error:
        lost = _lost_connection(error)
        if lost is not None:  # the group is left as it is: closing it would wait for the dead
            if distributed.by_torchrun():
                time.sleep(_BLAME_SECONDS)
            raise StageFailedError(
                f"Rank {distributed.rank()} lost another rank: {lost}.",
                hint="the other rank's own message says why it died; torchrun --max-restarts 3 starts all of them again, and they "
                "go on from the last checkpoint",
            ) from error
        raise
    dist.destroy_process_group()


def _divided(config: TrainConfig, device: str) -> Ranks:
    rank, size = dist.get_rank(), dist.get_world_size()
    if config.parallel.strategy == "ddp":
        return Ranks(rank, size, rank, size, None, dist.group.WORLD)
    from torch.distributed.device_mesh import init_device_mesh

    split = config.parallel.tensor_parallel
    mesh = init_device_mesh(device, (size // split, split), mesh_dim_names=("data", "tensor"))
    data = mesh["data"]
    return Ranks(rank, size, data.get_local_rank(), data.size(), mesh, data.get_group())


def _lost_connection(error: BaseException) -> str | None:
    """What happened to the connection, where that is what failed.

    Gloo raises a plain RuntimeError, and within a forward pass it comes as a fault of the user's model.
    """
    source = error.__cause__ if isinstance(error, MpdeployError) else error
    if not isinstance(source, dist.DistError) and not (isinstance(source, RuntimeError) and "gloo" in str(source)):
        return None
    return re.sub(r"^\[[^\]]*\] ", "", str(source)).split(". ")[0].split("\n")[0]
