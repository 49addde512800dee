"""Which of torchrun's ranks this process is. One rank, number 0, where no launcher started it."""

from __future__ import annotations

import os


def rank() -> int:
    """The number of this process, over all machines."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number on this machine: the GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def attempt() -> int:
    """How often torchrun has started all of them again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
