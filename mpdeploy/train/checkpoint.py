"""Checkpoints: weights as safetensors, the rest of the state in a file that loads with `weights_only=True`; both atomic."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mpdeploy.errors import MissingExtraError, StageFailedError
from mpdeploy.files import atomic_path


def save_weights(
    model: nn.Module | dict[str, torch.Tensor], path: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write all parameters and buffers of a model, or of its state, as FP32 (and integer buffers as they are) safetensors."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise MissingExtraError.for_extra("safetensors", "train") from error
    state = model.state_dict() if isinstance(model, nn.Module) else model
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    with atomic_path(path) as temporary, _disk_errors():
        save_file(tensors, temporary, metadata=metadata)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load what `save_weights` wrote into a model of the same form.

    Raises:
        StageFailedError: names or shapes differ.
    """
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path), strict=True)
    except RuntimeError as error:
        raise StageFailedError(
            f"The checkpoint {path} does not fit the model: {error}",
            hint="the model in the pipeline file changed: train again",
        ) from error


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a state of tensors, numbers, texts and containers of them."""
    with atomic_path(path) as temporary, _disk_errors(), temporary.open("wb") as file:
        torch.save(state, file)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Bring out the operating system's error: torch hides it behind a RuntimeError, safetensors in the text of its own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def load_state(path: Path) -> dict[str, Any] | None:
    """Read what `save_state` wrote; None where there is none or it cannot be read (then training starts over)."""
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch and pickle raise a dozen types for a file that is no state, or was cut short
        return None
    return state if isinstance(state, dict) else None


def seed_everything(seed: int) -> None:
    """Seed the generators that a model, a loss or an augmentation may draw from: torch's, numpy's and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The state of these generators, as tensors and numbers."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "python": (version, torch.tensor(words), gauss),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go on drawing from where `random_state` was called."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
