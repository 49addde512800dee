"""`mpdeploy serve` on the command line: what it refuses, with which exit code, before anything listens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from served import checksum_model, make_run

from mpdeploy.cli import common, main


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", checksum_model(), limits={"onnxruntime": -1.0})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 10, "its verdict is fail: rel_l2 on `engine/onnxruntime`"),
        (["--engine", "openvino"], 2, "has no engine 'openvino'"),
        (["--token-file", "/nowhere/token"], 2, "token file /nowhere/token cannot be read"),
        (["--tls-cert", "cert.pem"], 2, "TLS needs both"),
        (["--shadow-rate", "2"], 2, "between 0 and 1"),
        (["--port", "70000"], 2, "is no port"),
        (["--inline-ms", "-1"], 2, "--inline-ms -1.0: 0 is the least"),
        (["--pad", "sequence"], 2, "--pad 'sequence' is not of the form"),
        (["--pad", "sequence=16,8"], 2, "lengths must rise"),
        (["--host", "192.0.2.1"], 21, "Cannot listen on 192.0.2.1"),
    ],
)
def test_what_cannot_be_served_ends_with_its_exit_code(failed, monkeypatch, capsys, arguments, code, message):
    monkeypatch.setattr(sys, "argv", ["mpdeploy", "serve", str(failed), "--port", "0", "--json", *arguments])
    monkeypatch.setattr(common, "_printed", False)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert message in json.loads(out)["error"]["message"]
    assert message in err


def test_a_folder_that_is_no_run_is_wrong_usage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mpdeploy", "serve", str(tmp_path), "--port", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "no run directory" in capsys.readouterr().err
