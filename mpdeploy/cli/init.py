"""`mpdeploy init NAME`."""

from __future__ import annotations

from typing import Annotated

import typer

from mpdeploy.cli.common import Json, emit


def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Becomes NAME.py; a path is fine.")], as_json: Json = False
) -> None:
    """Write a pipeline file that runs as it is."""
    from mpdeploy.scaffold import init as write

    path = write(name)
    if as_json:
        emit({"pipeline": str(path)})
    else:
        print(f"{path} written. Run it: mpdeploy train-and-export {path}")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("init")(init)
