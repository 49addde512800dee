"""The other servers, each in an environment of its own, on the same model with ONNX Runtime on one thread.

Each is set up as its documentation has it for throughput on one core, with batches of up to 32 where it can form them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from load import Call
from models import SAMPLE_SHAPES

from mpdeploy.artifact import Array
from mpdeploy.serve.protocol import encode_request


@dataclass(frozen=True)
class Server:
    """How a peer is started: written files, a command, where it answers when it is ready, and what it is asked."""

    command: list[str]
    ready: str
    call: Call
    env: Mapping[str, str]


@dataclass(frozen=True)
class Peer:
    """A server. `packages`: what `pip` installs for it; `python`: of the environment."""

    name: str
    protocol: str
    packages: tuple[str, ...]
    prepare: Callable[[Path, Path, Path, int], Server]
    python: str = "python3.11"


SESSION = """
import numpy as np, onnxruntime
def session():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
"""


def v2_call(path: str, sample: Array, *, binary: bool) -> Call:
    """A request of the Open Inference Protocol for one sample."""
    body, headers = encode_request({"x": sample[None]}, binary=binary)
    return Call(path, body, headers)


def plain_call(path: str, field: str, sample: Array) -> Call:
    """One sample as plain JSON."""
    return Call(path, json.dumps({field: sample.tolist()}).encode(), {"content-type": "application/json"})


def _file(folder: Path, name: str, model: Path, text: str) -> Path:
    path = folder / name
    path.write_text(f"MODEL = {str(model)!r}\n{SESSION}{text}")
    return path


def _sample(model: Path) -> Array:
    """What is asked of the model of a run: RUN/20-export/model.fp32.onnx."""
    shape = SAMPLE_SHAPES[model.parent.parent.name]
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def mlserver(venv: Path, folder: Path, model: Path, port: int) -> Server:
    """MLServer: a custom runtime with its adaptive batching."""
    _file(folder, "runtime.py", model, """
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
class Runtime(MLModel):
    async def load(self):
        self.session = session()
        return True
    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        y = self.session.run(None, {"x": x})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)])
""")  # fmt: skip
    (folder / "settings.json").write_text(json.dumps({
        "http_port": port, "grpc_port": port + 1, "metrics_port": port + 2, "parallel_workers": 0, "debug": False,
        "host": "127.0.0.1",
    }))  # fmt: skip
    (folder / "model-settings.json").write_text(json.dumps({
        "name": "m", "implementation": "runtime.Runtime", "max_batch_size": 32, "max_batch_time": 0.001,
    }))  # fmt: skip
    call = v2_call("/v2/models/m/infer", _sample(model), binary=False)
    return Server(
        [f"{venv}/bin/mlserver", "start", str(folder)], "/v2/models/m/ready", call, {"PYTHONPATH": str(folder)}
    )


def kserve(venv: Path, folder: Path, model: Path, port: int) -> Server:
    """KServe's own SDK: V2 with binary tensors, one request at a time (it forms no batches)."""
    path = _file(folder, "serve.py", model, f"""
import kserve
from kserve import InferOutput, InferResponse
class Served(kserve.Model):
    def __init__(self):
        super().__init__("m")
        self.session = session()
        self.ready = True
    def predict(self, request, headers=None, response_headers=None):
        y = self.session.run(None, {{"x": request.inputs[0].as_numpy()}})[0]
        output = InferOutput(name="y", shape=list(y.shape), datatype="FP32")
        output.set_data_from_numpy(y, binary_data=True)
        return InferResponse(response_id=request.id or "0", model_name="m", infer_outputs=[output])
kserve.ModelServer(http_port={port}, enable_grpc=False, workers=1, access_log_format=None).start([Served()])
""")  # fmt: skip
    call = v2_call("/v2/models/m/infer", _sample(model), binary=True)
    return Server([f"{venv}/bin/python", str(path)], "/v2/models/m/ready", call, {})


def litserve(venv: Path, folder: Path, model: Path, port: int) -> Server:
    """LitServe with its batching."""
    path = _file(folder, "serve.py", model, f"""
import litserve
class Api(litserve.LitAPI):
    def setup(self, device):
        self.session = session()
    def decode_request(self, request):
        return np.asarray(request["input"], np.float32)
    def batch(self, inputs):
        return np.stack(inputs)
    def predict(self, x):
        return self.session.run(None, {{"x": x}})[0]
    def unbatch(self, output):
        return list(output)
    def encode_response(self, output):
        return {{"output": output.tolist()}}
if __name__ == "__main__":
    server = litserve.LitServer(Api(max_batch_size=32, batch_timeout=0.001), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port={port}, num_api_servers=1, generate_client_file=False, log_level="error")
""")  # fmt: skip
    return Server([f"{venv}/bin/python", str(path)], "/health", plain_call("/predict", "input", _sample(model)), {})


def bentoml(venv: Path, folder: Path, model: Path, port: int) -> Server:
    """BentoML with its adaptive batching."""
    _file(folder, "service.py", model, """
import bentoml
@bentoml.service(workers=1, traffic={"timeout": 60})
class Served:
    def __init__(self):
        self.session = session()
    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=1000)
    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.session.run(None, {"x": np.asarray(x, np.float32)})[0]
""")  # fmt: skip
    command = [f"{venv}/bin/bentoml", "serve", "service:Served", "--port", str(port), "--host", "127.0.0.1"]
    call = plain_call("/predict", "x", _sample(model)[None])
    env = {"BENTOML_HOME": str(folder / "home"), "BENTOML_DO_NOT_TRACK": "True", "PYTHONPATH": str(folder)}
    return Server([*command, "--working-dir", str(folder)], "/readyz", call, env)


def triton(venv: Path, folder: Path, model: Path, port: int) -> Server:
    """A real tritonserver (of the wheel nvidia-pytriton) with its Python backend and its dynamic batching."""
    packages = venv / "lib/python3.11/site-packages"
    wheel = packages / "pytriton/tritonserver"
    for part in ("bin", "backends"):
        shutil.copytree(wheel / part, folder / part, dirs_exist_ok=True)
    shutil.copy(wheel / "python_backend_stubs/3.11/triton_python_backend_stub", folder / "backends/python")
    version = folder / "repository/m/1"
    version.mkdir(parents=True)
    _file(version, "model.py", model, """
import triton_python_backend_utils as triton
class TritonPythonModel:
    def initialize(self, args):
        self.session = session()
    def execute(self, requests):
        parts = [triton.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        y = self.session.run(None, {"x": np.concatenate(parts)})[0]
        ends = np.cumsum([len(part) for part in parts])[:-1]
        return [triton.InferenceResponse([triton.Tensor("y", rows)]) for rows in np.split(y, ends)]
""")  # fmt: skip
    dims = ", ".join(map(str, _sample(model).shape))
    (version.parent / "config.pbtxt").write_text(f"""
name: "m"
backend: "python"
max_batch_size: 32
input [ {{ name: "x", data_type: TYPE_FP32, dims: [ {dims} ] }} ]
output [ {{ name: "y", data_type: TYPE_FP32, dims: [ 10 ] }} ]
dynamic_batching {{ }}
instance_group [ {{ kind: KIND_CPU, count: 1 }} ]
""")
    env = {
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"), "VIRTUAL_ENV": str(venv),
        "PYTHONPATH": str(packages), "PATH": f"{venv}/bin:/usr/bin:/bin",
    }  # fmt: skip
    command = [
        str(folder / "bin/tritonserver"), f"--model-repository={folder / 'repository'}",
        f"--backend-directory={folder / 'backends'}", f"--http-port={port}", "--allow-grpc=false",
        "--allow-metrics=false", "--http-address=127.0.0.1", "--disable-auto-complete-config",
    ]  # fmt: skip
    call = v2_call("/v2/models/m/infer", _sample(model), binary=True)
    return Server(command, "/v2/health/ready", call, env)


PEERS = (
    Peer("Triton, Python backend", "V2 binary", ("nvidia-pytriton==0.7.0", "numpy<2", "onnxruntime"), triton, "/usr/bin/python3.11"),
    Peer("MLServer", "V2 JSON", ("mlserver==1.7.1", "onnxruntime"), mlserver),
    Peer("KServe SDK", "V2 binary", ("kserve==0.21.0", "onnxruntime"), kserve),
    Peer("LitServe", "JSON", ("litserve==0.2.19", "onnxruntime"), litserve),
    Peer("BentoML", "JSON", ("bentoml==1.4.39", "onnxruntime"), bentoml),
)  # fmt: skip


def environment(peer: Peer, folder: Path) -> tuple[Path | None, str]:
    """The peer's environment below `folder`, made where it is missing; or None and why it cannot be had."""
    venv = folder / key(peer)
    if (venv / "bin").is_dir():
        return venv, ""
    python = shutil.which(peer.python)
    if python is None:
        return None, f"there is no {peer.python}"
    commands: list[list[Any]] = [
        [python, "-m", "venv", venv], [venv / "bin/pip", "install", "--quiet", "--disable-pip-version-check", *peer.packages]
    ]  # fmt: skip
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(venv, ignore_errors=True)
            return (
                None,
                f"it does not install: {done.stderr.strip().splitlines()[-1][:200] if done.stderr else done.returncode}",
            )
    return venv, ""


def key(peer: Peer) -> str:
    """The name of its environment's folder."""
    return peer.prepare.__name__
