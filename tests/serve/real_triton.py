"""A real tritonserver for tests: the one in NVIDIA's wheel `nvidia-pytriton`, and a backend `onnxruntime` for it.

The wheel's server has the Python backend alone. Triton also takes backends that are written in Python, so a folder `onnxruntime` with the
few lines below runs an exported repository as it is, on a CPU, with the wheel's own server in front. It needs an environment of
Debian's Python 3.11 that is named by MPDEPLOY_TRITON_VENV:

    /usr/bin/python3.11 -m venv VENV && VENV/bin/pip install 'nvidia-pytriton==0.7.0' 'numpy<2' onnxruntime
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

VENV = "MPDEPLOY_TRITON_VENV"
BACKEND = """
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.outputs = [item.name for item in self.session.get_outputs()]

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        feeds = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        for name, array in feeds.items():
            if array.dtype == object:
                feeds[name] = np.array([item.decode() for item in array.ravel()], object).reshape(array.shape)
        answers = dict(zip(self.outputs, self.session.run(self.outputs, feeds)))
        wanted = request.requested_output_names()
        return triton.InferenceResponse([triton.Tensor(name, answers[name]) for name in wanted])
"""


def needed() -> pytest.MarkDecorator:
    """A mark that skips where no environment with a tritonserver is named."""
    return pytest.mark.skipif(VENV not in os.environ, reason=f"{VENV} names no environment with nvidia-pytriton 0.7.0")


def server_folder(folder: Path) -> tuple[Path, dict[str, str]]:
    """Put the wheel's server together in `folder`: the path of its binary, and the environment it runs in."""
    venv = Path(os.environ[VENV])
    packages = venv / "lib/python3.11/site-packages"
    wheel = packages / "pytriton/tritonserver"
    for part in ("bin", "backends"):
        shutil.copytree(wheel / part, folder / part)
    shutil.copy(wheel / "python_backend_stubs/3.11/triton_python_backend_stub", folder / "backends/python")
    (folder / "backends/onnxruntime").mkdir()
    (folder / "backends/onnxruntime/model.py").write_text(BACKEND)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
        "VIRTUAL_ENV": str(venv),
        "PATH": f"{venv}/bin:{os.environ['PATH']}",
    }
    return folder / "bin/tritonserver", environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(binary: Path, environment: Mapping[str, str], repository: Path, log: Path) -> Iterator[tuple[str, str]]:
    """A tritonserver on a repository: its HTTP and gRPC addresses."""
    http, grpc = free_port(), free_port()
    command = [
        str(binary), f"--model-repository={repository}", f"--backend-directory={binary.parent.parent / 'backends'}",
        "--disable-auto-complete-config", f"--http-port={http}", f"--grpc-port={grpc}", "--allow-metrics=false",
        "--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--model-control-mode=none",
    ]  # fmt: skip
    with log.open("wb") as output, subprocess.Popen(
        command, env=dict(environment), stdout=output, stderr=output, start_new_session=True
    ) as process:  # fmt: skip
        try:
            end = time.monotonic() + 120
            while not answers(f"http://127.0.0.1:{http}/v2/health/ready"):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < end, log.read_text()[-4000:]
                time.sleep(0.2)
            yield f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
