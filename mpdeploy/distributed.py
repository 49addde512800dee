"""Which of torchrun's ranks this process is. One rank, number 0, where no launcher started it."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def rank() -> int:
    """The number of this process, over all machines."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number on this machine: the GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def by_torchrun() -> bool:
    """Whether torchrun started this process, and watches it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def attempt() -> int:
    """How often torchrun has started all of them again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def leave(code: str | int | None) -> NoReturn:
    """End this process as `sys.exit` would, but without taking the interpreter down around threads that still run.

    gloo's threads may want the GIL when Python is already half gone; CPython then ends them in the middle of C++, which calls it
    "terminate called without an active exception" and aborts: about one rank in six that leaves a busy machine.
    """
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(0 if code is None else code if isinstance(code, int) else 1)
