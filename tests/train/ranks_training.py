"""Run by test_distributed.py: trains the same small network on one rank, on two, and with its layers split, and says what each rank saw.

Ranks are forked, so that torch is imported once. Prints one JSON object: name of the case -> one dict a rank.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_training import blobs, choice_of
from torch import nn

from mpdeploy.artifact import Dataset
from mpdeploy.config import TrainConfig
from mpdeploy.train.loop import train
from mpdeploy.train.ranks import Ranks, together

NUM, BATCH, EPOCHS = 97, 32, 3  # the last batch of an epoch has one sample: of two ranks, one has none of it
TOTAL = 4 * EPOCHS
SPLIT = {"strategy": "fsdp2"}
BY_LAYER = SPLIT | {"shard_modules": ["first", "last"]}
BY_TENSOR = SPLIT | {"tensor_parallel": 2, "tensor_plan": {"first": "colwise", "last": "rowwise"}}


class TwoLinear(nn.Module):
    """x [n, 16] -> logits [n, 4], through a norm that lies outside the two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(self.norm(x))))


class Dropping(TwoLinear):
    """The same with dropout and a BatchNorm, which remembers what this rank dropped."""

    share = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.batch = nn.Dropout(self.share), nn.BatchNorm1d(16)
        self.dropped: list[list[int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(self.first(self.batch(self.norm(x))))
        if self.training:
            self.dropped.append((hidden[0] == 0).nonzero().flatten().tolist())
        return self.last(hidden)


class Normed(Dropping):
    """BatchNorm alone; it remembers the type of each part's weights while the part ran."""

    share = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.ran_in: dict[str, str] = {}
        for name in ("norm", "batch", "first", "last"):
            self.get_submodule(name).register_forward_hook(self.noting(name))

    def noting(self, name):
        def note(module, inputs, output):
            if module.training:
                self.ran_in[name] = str(module.weight.dtype)

        return note


class Stopped(BaseException):
    """A training that was stopped from outside."""


def stopping_at(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, text: str) -> None:
        if done == step:
            raise Stopped

    return progress


def heavy_class(outputs, labels):
    """Samples of one class weigh so much that their gradients overflow FP16 until the scale came down."""
    return (
        nn.functional.cross_entropy(outputs, labels, reduction="none") * torch.where(labels == 3, 500.0, 1.0)
    ).mean()


def fit(ranks: Ranks, folder: Path, precision: str, progress: Callable[[int, int, str], None], **fields: Any) -> dict:
    """Train and say what this rank saw: losses, skipped steps, a digest of the weights."""
    training = {"model": TwoLinear, "epochs": EPOCHS, "batch_size": BATCH, "learning_rate": 1e-2, "accumulation": 3}
    config = TrainConfig(**training | fields)
    samples = NUM if config.model is TwoLinear else 96
    seen: list[int] = []

    def noted(done: int, total: int, text: str) -> None:
        seen.append(done)
        progress(done, total, text)

    train_set: Dataset = blobs(samples, 0)
    stopping_set = blobs(41, 1000)
    try:
        run = train(
            config, choice_of(precision), train_set, stopping_set,
            state_path=folder / "state.amp.pt", state_key="key", progress=noted, ranks=ranks,
        )  # fmt: skip
    except Stopped:
        return {"stopped": True}
    weights = {name: local(value) for name, value in run.model.state_dict().items()}
    return {
        "first_step": seen[0] if seen else None,
        "losses": [epoch["loss"] for epoch in run.history],
        "stopping": [[epoch["early_stopping_loss"], epoch["early_stopping_score"]] for epoch in run.history],
        "norms": [str(norm) for norm in run.gradient_norms],
        "skipped": run.skipped_steps,
        "scales": [list(item) for item in run.loss_scales],
        "best": run.best_epoch,
        "weights": {name: value.flatten().tolist() for name, value in weights.items()},
        "ran_in": getattr(run.model, "ran_in", None),
        "dropped": getattr(run.model, "dropped", None),
    }


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


def ranks_of(
    size: int, folder: Path, precision: str = "fp32", stop: int | None = None, **fields: Any
) -> list[dict[str, Any]]:
    """Train on so many processes; what each of them saw."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            try:
                config = TrainConfig(model=TwoLinear, parallel=fields.get("parallel", {}))
                progress = stopping_at(stop) if stop else lambda *_: None
                with together(config, "cpu") as ranks:
                    found = fit(ranks, folder, precision, progress, **fields)
                (folder / f"rank{rank}.json").write_text(json.dumps(found))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * size, codes
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]


def cases(folder: Path, names: set[str]) -> dict[str, list[dict[str, Any]]]:
    """The cases whose names are wanted."""
    found = {"one": ranks_of(1, folder / "one")}
    plain = {
        "ddp": {},
        "fsdp2": {"parallel": SPLIT},
        "fsdp2_by_layer": {"parallel": BY_LAYER},
        "tensor": {"parallel": BY_TENSOR},
    }
    for name in plain.keys() & names:
        found[name] = ranks_of(2, folder / name, **plain[name])
    both = {"average": {"decay": 0.5}, "ship": "best"}
    if "average" in names:
        found["average_one"] = ranks_of(1, folder / "average_one", **both)
        found["average_ddp"] = ranks_of(2, folder / "average_ddp", **both)
        found["average_fsdp2"] = ranks_of(2, folder / "average_fsdp2", parallel=BY_LAYER, **both)
    if "skips" in names:
        scaled = {"precision": "fp16", "loss": heavy_class, "accumulation": 1}
        found["skips_one"] = ranks_of(1, folder / "skips_one", **scaled)
        found["skips_ddp"] = ranks_of(2, folder / "skips_ddp", **scaled)
        found["skips_fsdp2"] = ranks_of(2, folder / "skips_fsdp2", parallel=BY_LAYER, **scaled)
        found["skips_tensor"] = ranks_of(2, folder / "skips_tensor", parallel=BY_TENSOR, **scaled)
    if "resumed" in names:
        states = {"checkpoint_every_steps": 3, "average": {"decay": 0.5}}
        found["whole"] = ranks_of(1, folder / "whole", **states)
        for name, parallel in (("ddp", {}), ("fsdp2", BY_LAYER), ("tensor", BY_TENSOR)):
            for after in (1, 2):
                if (name, after) == ("tensor", 1):  # its layers are split over two
                    continue
                place = folder / f"resumed_{name}_{after}"
                ranks_of(2, place, stop=8, parallel=parallel, **states)
                found[place.name] = ranks_of(after, place, parallel=parallel, **states)
    if "half" in names:
        halves = {"precision": "bf16", "model": Normed, "accumulation": 1, "fp32_modules": ["last"]}
        found["half_ddp"] = ranks_of(2, folder / "half_ddp", **halves)
        found["half_fsdp2"] = ranks_of(2, folder / "half_fsdp2", parallel=BY_LAYER, **halves)
    if "dropout" in names:
        found["dropout"] = ranks_of(2, folder / "dropout", model=Dropping, accumulation=1)
        ranks_of(2, folder / "dropout_resumed", stop=8, model=Dropping, accumulation=1, checkpoint_every_steps=2)
        found["dropout_resumed"] = ranks_of(
            2, folder / "dropout_resumed", model=Dropping, accumulation=1, checkpoint_every_steps=2
        )
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    if set(sys.argv[2:]) - {"ddp", "dropout"}:  # here, so that the children need not
        import torch.distributed.checkpoint.state_dict
        import torch.distributed.fsdp
        import torch.distributed.tensor.parallel
    print(json.dumps(cases(Path(sys.argv[1]), set(sys.argv[2:]))))
