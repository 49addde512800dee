"""An exported repository runs, as it was written, on a real tritonserver; and `mpdeploy serve --server triton` keeps house around one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_triton
from packaged import judged_run

from mpdeploy.artifact import Golden
from mpdeploy.errors import UnavailableError, UsageError
from mpdeploy.serve.options import ModelOptions, ServerOptions
from mpdeploy.serve.package import PackageRequest, package
from mpdeploy.serve.triton_server import EXECUTABLE, backends_of, find_tritonserver, serve_with_triton


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def no_tritonserver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(EXECUTABLE, raising=False)


def server_with(folder: Path, *backends: str) -> Path:
    """The files of a tritonserver that has these backends; its binary does nothing."""
    binary = folder / "bin/tritonserver"
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\necho 'error: creating server: Internal - no models'\nexit 1\n")
    binary.chmod(0o755)
    for name in backends:
        (folder / "backends" / name).mkdir(parents=True)
        (folder / "backends" / name / f"libtriton_{name}.so").touch()
    return binary


# -- without a server --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_tritonserver")
def test_where_there_is_no_tritonserver_the_error_says_what_to_do(small_run):
    with pytest.raises(UnavailableError, match="none on PATH") as caught:
        serve_with_triton(ServerOptions(small_run))
    assert caught.value.exit_code == 21
    assert EXECUTABLE in (caught.value.hint or "")


@pytest.mark.usefixtures("no_tritonserver")
def test_a_named_tritonserver_is_found_before_one_on_path(tmp_path, monkeypatch):
    named, other = server_with(tmp_path / "a"), server_with(tmp_path / "b")
    monkeypatch.setenv("PATH", str(other.parent))
    assert find_tritonserver() == other
    monkeypatch.setenv(EXECUTABLE, str(named))
    assert find_tritonserver() == named
    assert find_tritonserver(other) == other
    with pytest.raises(UnavailableError, match="cannot be run"):
        find_tritonserver(tmp_path / "none")


def test_a_server_without_a_backend_for_the_run_is_refused_with_what_it_has(small_run, tmp_path):
    binary = server_with(tmp_path, "python", "identity")
    assert list(backends_of(binary)) == ["identity", "python"]
    with pytest.raises(UnavailableError, match=r"(?s)no backend 'onnxruntime'; it has identity, python"):
        serve_with_triton(ServerOptions(small_run, port=0), executable=binary)


def test_options_that_triton_has_nothing_like_are_refused(small_run, tmp_path):
    options = ServerOptions(small_run, token="a long secret", model=ModelOptions(delay_ms=2.0))
    with pytest.raises(UsageError, match="--token, --delay-ms"):
        serve_with_triton(options, executable=server_with(tmp_path, "onnxruntime"))


# -- on a real one -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    return real_triton.server_folder(tmp_path_factory.mktemp("server"))


@pytest.mark.slow
@real_triton.needed()
def test_an_exported_repository_answers_as_the_golden_model_did(small_run, real, tmp_path):
    tritonclient = pytest.importorskip("tritonclient.http")
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"digit {number}\n" for number in range(10)))
    package(PackageRequest(small_run, "triton", tmp_path / "out", name="tiny", options={"labels_file": labels}))
    golden = Golden.load(small_run / "20-export/golden.npz")
    with real_triton.running(*real, tmp_path / "out", tmp_path / "log") as (address, _):
        client = tritonclient.InferenceServerClient(address)
        config = client.get_model_config("tiny")
        assert (config["backend"], config["max_batch_size"]) == ("onnxruntime", 32)
        assert config["parameters"]["mpdeploy.verdict"]["string_value"] == "pass"
        batches = client.get_inference_statistics("tiny")["model_stats"][0]["batch_stats"]
        assert [item["batch_size"] for item in batches] == [1, 8, 32], "it was warmed up with the profile's sizes"
        ((name, images),) = golden.dataset.inputs.items()
        ((output, answers),) = golden.outputs.items()
        put = tritonclient.InferInput(name, list(images.shape), "FP32")
        put.set_data_from_numpy(images)
        found = client.infer("tiny", [put]).as_numpy(output)
        # two versions of one runtime: they may add in another order, and no more
        np.testing.assert_allclose(found, answers, rtol=0, atol=1e-5 * np.abs(answers).max())
        classes = client.infer("tiny", [put], outputs=[tritonclient.InferRequestedOutput(output, class_count=1)])
        named = [item[0].decode().split(":")[2] for item in classes.as_numpy(output)]
        assert named == [f"digit {number}" for number in answers.argmax(axis=1)]
        client.close()


@contextlib.contextmanager
def served_by_triton(
    run: Path, real: tuple[Path, dict[str, str]], log: Path
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`mpdeploy serve --server triton` in a process of its own, and what it told when it was ready."""
    binary, environment = real
    command = [sys.executable, "-m", "mpdeploy", "serve", str(run), "--server", "triton", "--json"]
    with log.open("w") as errors, subprocess.Popen(
        [*command, "--port", "0", "--grpc-port", "0"], env=environment | {EXECUTABLE: str(binary)}, text=True,
        stdout=subprocess.PIPE, stderr=errors,
    ) as process:  # fmt: skip
        try:
            text = ""
            assert process.stdout is not None
            for line in process.stdout:
                text += line
                if line.startswith("}"):
                    break
            assert text, log.read_text()
            yield process, json.loads(text)
        finally:
            process.kill()


@pytest.mark.slow
@real_triton.needed()
def test_serve_with_triton_is_ready_answers_and_ends_with_its_child(small_run, real, tmp_path):
    with served_by_triton(small_run, real, tmp_path / "log") as (process, told):
        assert (told["server"], told["model"], told["verdict"]) == ("triton", "tiny", "pass")
        with urllib.request.urlopen(f"{told['url']}/v2/models/tiny", timeout=10) as response:
            assert json.load(response)["platform"] == "onnxruntime_onnx"
        with urllib.request.urlopen(told["metrics"], timeout=10) as response:
            assert b"nv_inference_request_success" in response.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not real_triton.answers(f"{told['url']}/v2/health/live")
        assert "All models are stopped" in (tmp_path / "log").read_text()


@pytest.mark.slow
@real_triton.needed()
def test_a_killed_parent_takes_tritonserver_along(small_run, real, tmp_path):
    with served_by_triton(small_run, real, tmp_path / "log") as (process, told):
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        end = time.monotonic() + 10
        while real_triton.answers(f"{told['url']}/v2/health/live"):
            assert time.monotonic() < end, "tritonserver lives on"
            time.sleep(0.1)
