"""The command that a run came from, so that the report can say how to repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_NOT_OF_THE_RUN = {"--from": True, "--until": True, "--json": False, "--strict": False}
"""Options that say how to go on or what to print, and whether a value follows; the rest decides what the run is."""


def command_of(arguments: Sequence[str]) -> list[str] | None:
    """`mpdeploy train-and-export ...` as it was typed, less what is not of the run; None where this is no such process.

    Args:
        arguments: `sys.argv`.
    """
    if len(arguments) < 3 or arguments[1] != "train-and-export":
        return None
    if Path(arguments[0]).name not in ("mpdeploy", "__main__.py", "-m"):
        return None
    kept, skip = [], False
    for argument in arguments[1:]:
        name = argument.partition("=")[0]
        if skip or name in _NOT_OF_THE_RUN:
            skip = not skip and _NOT_OF_THE_RUN.get(name, False) and "=" not in argument
            continue
        kept.append(argument)
    return ["mpdeploy", *kept]
