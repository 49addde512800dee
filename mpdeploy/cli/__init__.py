"""The command line: one short file a verb; each loads, calls and prints. Errors become text and an exit code here, and only here."""

from __future__ import annotations

import json
import signal
import sys
from typing import NoReturn

import typer

from mpdeploy import distributed
from mpdeploy.cli import (
    baseline,
    bench,
    build,
    compare,
    convert,
    doctor,
    gate,
    history,
    init,
    inspect,
    package,
    report,
    serve,
    train_and_export,
)  # fmt: skip
from mpdeploy.errors import MpdeployError, UsageError

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM

app = typer.Typer(
    name="mpdeploy",
    help="From mixed-precision training to a served engine; what drifted is not shipped.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for verb in (
    init,
    train_and_export,
    convert,
    compare,
    build,
    bench,
    inspect,
    gate,
    baseline,
    report,
    history,
    package,
    serve,
    doctor,
):
    verb.register(app)


def main() -> NoReturn:
    """Run the command line and end the process with a documented exit code (see `mpdeploy.errors`)."""
    try:
        _run()
    except SystemExit as error:
        if distributed.world_size() > 1:
            distributed.leave(error.code)
        raise


def _run() -> NoReturn:
    try:
        app(standalone_mode=True)
    except MpdeployError as error:
        _fail(error.exit_code, str(error))
    except KeyboardInterrupt:
        _fail(INTERRUPTED, "Interrupted. What finished is kept; the same command goes on from there.")
    except SystemExit as error:  # typer turns Ctrl-C and wrong usage into it
        if error.code == INTERRUPTED:
            _fail(INTERRUPTED, "Interrupted. What finished is kept; the same command goes on from there.")
        if error.code == UsageError.exit_code:
            _print_error_document("wrong usage: stderr says what", UsageError.exit_code)
        raise
    except BaseException as error:
        if type(error).__name__ == "TerminatedError":
            _fail(TERMINATED, "Terminated. What finished is kept; the same command goes on from there.")
        import traceback

        traceback.print_exc()
        _fail(
            1,
            f"{type(error).__name__}: {error}\n\nhint: this is a bug in mpdeploy; please report it with the lines above",
        )
    sys.exit(0)


def _fail(code: int, text: str) -> NoReturn:
    print(f"\nmpdeploy: error: {text}", file=sys.stderr)
    _print_error_document(text, code)
    sys.exit(code)


def _print_error_document(text: str, code: int) -> None:
    """Under `--json`, stdout holds one document even where a verb could not finish."""
    if "--json" in sys.argv and not _printed():
        print(json.dumps({"error": {"message": text, "exit_code": code}}))


def _printed() -> bool:
    from mpdeploy.cli.common import printed_document

    return printed_document()
