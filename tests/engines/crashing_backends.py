"""Backends whose build goes wrong in every way a native library can."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

from mpdeploy.errors import BuildError


def _row(build: Any) -> Any:
    return SimpleNamespace(
        name="crashing", build=build, available=lambda: None, can_run=lambda: None, takes=lambda: "fp32"
    )


def _segfault(*_: Any) -> Any:
    os.write(2, b"native library: about to touch what is not mine\n")
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(10)


def _killed(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _exits(*_: Any) -> Any:
    print("native library: exit(3)")
    sys.stdout.flush()
    os._exit(3)


def _refuses(*_: Any) -> Any:
    raise BuildError("Node 'conv_7' is not supported.", hint="keep it")


def _bug(*_: Any) -> Any:
    raise ZeroDivisionError("a bug in the backend")


def _sleeps(model: Any, profile: Any, options: Any, folder: Any) -> Any:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)


SEGFAULT, KILLED, EXITS, REFUSES, BUG, SLEEPS = map(_row, (_segfault, _killed, _exits, _refuses, _bug, _sleeps))
