"""The command line within this process: what libraries cost to import is paid once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from mpdeploy.cli import common, main

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("inspect", path, "--json")`: what a process of its own would exit with and print."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["mpdeploy", *map(str, arguments)])
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(common, "_printed", False)
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), out, err)

    return run
