"""The state of a split model: written by all ranks with torch's distributed checkpoints, read by any number of them, gathered to ship."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpdeploy.train.ranks import Ranks


def save(
    model: nn.Module, average: nn.Module | None, optimizer: torch.optim.Optimizer, folder: Path, ranks: Ranks
) -> None:
    """Write weights, average and optimiser state into a folder that all ranks see. Complete when it returns."""
    import torch.distributed.checkpoint as dcp

    if ranks.is_first and folder.exists():  # of a try that was killed before its state was written
        shutil.rmtree(folder)
    ranks.from_first(None)
    dcp.save(
        _state(model, average, optimizer), checkpoint_id=str(folder)
    )  # rank 0 writes its index when all have written


def load(model: nn.Module, average: nn.Module | None, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Go on from what `save` wrote, on this or another number of ranks."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_state_dict

    state = _state(model, average, optimizer)
    dcp.load(state, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if average is not None:
        set_model_state_dict(average, state["average"])


def _state(model: nn.Module, average: nn.Module | None, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    return state if average is None else state | {"average": get_model_state_dict(average)}


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole model's weights on the host of rank 0; elsewhere nothing. Every rank calls it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(model, options=options))


def remove_others(folder: Path) -> None:
    """Remove older states beside `folder`."""
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
