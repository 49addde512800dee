"""Run directories around small ONNX models, made in a fraction of a second: engines that ONNX Runtime really builds, evidence that is
really measured. And a server of one in a thread of its own, for tests to speak HTTP with."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mpdeploy.artifact import Array, Dataset, FileArtifact, Golden, OnnxModel
from mpdeploy.building import describe_model
from mpdeploy.config import Gate
from mpdeploy.engines import backend
from mpdeploy.engines.base import default_profile
from mpdeploy.files import write_json
from mpdeploy.gates.evidence import Evidence, Place, arrays_of_drift
from mpdeploy.gates.gate import decide, gate_json
from mpdeploy.measure.drift import drift_of
from mpdeploy.run_dir import RunDir, StageRecord
from mpdeploy.serve.protocol import encode_request

FLOAT = TensorProto.FLOAT


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[Any]]],
    outputs: Mapping[str, tuple[int, Sequence[Any]]],
    constants: Mapping[str, Array] | None = None,
) -> onnx.ModelProto:
    """A model from its nodes; inputs and outputs are name -> (element type, shape)."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def checksum_model(width: int = 16) -> onnx.ModelProto:
    """x [n, width] -> y = 2x and total = the sum of each sample: an answer proves whose it is."""
    return model_of(
        [
            helper.make_node("Add", ["x", "x"], ["y"]),
            helper.make_node("ReduceSum", ["x", "axes"], ["total"], keepdims=0),
        ],
        {"x": (FLOAT, ["n", width])},
        {"y": (FLOAT, ["n", width]), "total": (FLOAT, ["n"])},
        {"axes": np.array([1], np.int64)},
    )


def mlp_model(sizes: Sequence[int] = (784, 512, 512, 10), scale: float = 1.0) -> onnx.ModelProto:
    """A stack of dense layers, x [n, first] -> y [n, last]."""
    rng = np.random.default_rng(0)
    nodes, constants, last = [], {}, "x"
    for index, (before, after) in enumerate(itertools.pairwise(sizes)):
        constants[f"w{index}"] = (rng.standard_normal((before, after)) / before**0.5 * scale).astype(np.float32)
        name = "y" if index == len(sizes) - 2 else f"h{index}"
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [name if name == "y" else f"m{index}"]))
        if name != "y":
            nodes.append(helper.make_node("Relu", [f"m{index}"], [name]))
        last = name
    return model_of(nodes, {"x": (FLOAT, ["n", sizes[0]])}, {"y": (FLOAT, ["n", sizes[-1]])}, constants)


def table_model(rows: int = 10) -> onnx.ModelProto:
    """ids [n, 2] -> y = rows of a table: ONNX Runtime refuses a batch with an id that is not in it."""
    table = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    return model_of(
        [helper.make_node("Gather", ["table", "ids"], ["y"], axis=0)],
        {"ids": (TensorProto.INT64, ["n", 2])},
        {"y": (FLOAT, ["n", 2, 3])},
        {"table": table},
    )


def identity_model(kind: int, shape: Sequence[Any] = ("n", 3)) -> onnx.ModelProto:
    """x -> y = x, of any element type."""
    return model_of([helper.make_node("Identity", ["x"], ["y"])], {"x": (kind, shape)}, {"y": (kind, shape)})


def make_run(
    path: Path,
    model: onnx.ModelProto,
    *,
    samples: Mapping[str, Array] | None = None,
    engines: Sequence[str] = ("onnxruntime",),
    limits: Mapping[str, float] | None = None,
    unvalidated: Sequence[str] = (),
    batches: tuple[int, int, int] = (1, 8, 32),
    lengths: Mapping[str, tuple[int, ...]] | None = None,
    name: str = "model",
) -> Path:
    """A run directory as a pipeline would leave it: exported model, golden answers, engines, evidence, verdicts.

    Args:
        path: of the run.
        model: its FP32 model.
        samples: golden inputs; random ones where None.
        engines: to build.
        limits: engine -> limit of its drift gate (rel L2); 1e-3 where not named. A negative one cannot be met.
        unvalidated: engines that count as never measured.
        batches: of the profile.
        lengths: input -> shape of a sample batch, for symbolic axes.
        name: of the pipeline.
    """
    run = RunDir.create(path)
    file = run.folder("20-export") / "model.fp32.onnx"
    onnx.save(model, file)
    described = describe_model(file)
    exported = OnnxModel(described.path, described.sha256, described.inputs, described.outputs, {"precision": "fp32"})
    samples = dict(samples or _random_samples(exported, lengths or {}))
    profile = default_profile(exported.inputs, batches, {name: array.shape for name, array in samples.items()})
    gates = [
        Gate(id=f"drift-{e}", metric="rel_l2", limit=(limits or {}).get(e, 1e-3), at=f"engine/{e}") for e in engines
    ]
    places, golden = {}, None
    for engine in engines:
        row = backend(engine)
        built = row.build(exported, profile, {}, run.folder(f"40-build/{engine}"))
        run.put(StageRecord(f"40-build/{engine}", "done", {}, {"engine": built}))
        with row.load(built) as runner:
            outputs = {key: array for key, array in runner.infer(samples).items() if array.dtype.kind == "f"}
        if golden is None:
            golden = Golden(Dataset(samples, np.arange(len(next(iter(samples.values()))))), outputs)
            if any(array.dtype.kind == "O" for array in samples.values()):  # numpy keeps no text
                np.savez(run.path / "20-export" / "golden.npz", ids=golden.dataset.ids)
            else:
                golden.save(run.path / "20-export" / "golden.npz")
        status = "unvalidated" if engine in unvalidated else "measured"
        arrays = arrays_of_drift(drift_of([(golden.outputs, outputs)])) if outputs and status == "measured" else {}
        facts = {} if outputs else {"num_kept": 0}
        places[f"engine/{engine}"] = Place(
            f"engine/{engine}", "fp32", f"40-build/{engine}", status=status, arrays=arrays, facts=facts,
            digests={"artifact": built.sha256, "source": exported.sha256},
        )  # fmt: skip
    if not any(array.dtype.kind == "f" for array in (golden.outputs if golden else {}).values()):
        gates = [Gate(id="kept", metric="num_kept", limit=0, at="engine/*")]
    answers = FileArtifact.of(run.path / "20-export" / "golden.npz")
    run.put(StageRecord("20-export", "done", {}, {"model": exported, "golden": answers}))
    evidence = Evidence(places, {"golden": answers.sha256}, {})
    evidence.save(run.folder("evidence"))
    index = FileArtifact.of(run.path / "evidence" / "index.json")
    run.put(StageRecord("50-validate", "done", {}, {"evidence": index}))
    run.set_header(pipeline=name, gates=[gate.to_json() for gate in gates], chosen_engine=engines[0])
    write_json(run.path / "gate.json", gate_json(decide(gates, evidence), evidence, name, gates))
    return path


def _random_samples(model: OnnxModel, lengths: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    found = {}
    for spec in model.inputs:
        shape = [
            axis if isinstance(axis, int) else 8 if position == 0 else lengths[spec.name][position]
            for position, axis in enumerate(spec.shape or ())
        ]
        if spec.dtype == "object":
            found[spec.name] = np.full(shape, "text", np.object_)
        elif spec.dtype.startswith("float"):
            found[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        else:
            found[spec.name] = rng.integers(0, 2, shape).astype(spec.dtype)
    return found


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until it holds: how long that takes is a busy machine's business."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- a server in a process of its own ----------------------------------------------------------------------------------


class Served:
    """`mpdeploy serve` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], document: dict[str, Any], log: Path) -> None:
        self.process = process
        self.document = document
        self.log = log
        host, _, port = document["url"].partition("://")[2].rpartition(":")
        self.host, self.port, self.model = host, int(port), document.get("model", "model")

    @property
    def path(self) -> str:
        return f"/v2/models/{self.model}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=30)

    def call(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        with contextlib.closing(self.connect()) as connection:
            return send(connection, method, path, body, headers)

    def get(self, path: str) -> Any:
        status, _, body = self.call("GET", path)
        assert status == 200, (status, body)
        return json.loads(body) if body[:1] in (b"{", b"[") else body

    def infer(
        self, inputs: Mapping[str, Array], *, binary: bool = True, **more: Any
    ) -> tuple[int, dict[str, Array] | str]:
        with contextlib.closing(self.connect()) as connection:
            return infer(connection, self.path, inputs, binary=binary, **more)

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def stop(self, number: int = signal.SIGTERM, timeout: float = 30) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout)


def send(
    connection: http.client.HTTPConnection, method: str, path: str, body: Any = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:  # fmt: skip
    content = json.dumps(body) if isinstance(body, dict | list) else body
    connection.request(method, path, content, dict(headers or {}))
    response = connection.getresponse()
    return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()


def infer(
    connection: http.client.HTTPConnection, path: str, inputs: Mapping[str, Array], *, binary: bool = True,
    headers: Mapping[str, str] | None = None, **more: Any,
) -> tuple[int, dict[str, Array] | str]:  # fmt: skip
    """Status and outputs by name (or the error's text)."""
    body, sent = encode_request(inputs, binary=binary, **more)
    status, got, content = send(connection, "POST", f"{path}/infer", body, {**sent, **(headers or {})})
    if status != 200:
        return status, json.loads(content)["error"]
    return status, decode_answer(content, got.get("inference-header-content-length"))


def decode_answer(content: bytes, length: str | None) -> dict[str, Array]:
    from mpdeploy.serve.dtypes import array_from_json, array_from_raw

    head = json.loads(content[: int(length)] if length else content)
    position, found = int(length or 0), {}
    for output in head["outputs"]:
        if "data" in output:
            found[output["name"]] = array_from_json(output["datatype"], output["shape"], output["data"], "")
        else:
            end = position + output["parameters"]["binary_data_size"]
            found[output["name"]] = array_from_raw(output["datatype"], output["shape"], content[position:end], "")
            position = end
    assert position in (0, len(content))
    return found


@contextlib.contextmanager
def serving(
    run: Path, *arguments: object, folder: Path | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """A server of a run; it is stopped, and must end well, when the block ends."""
    log = (folder or run.parent) / f"serve-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "mpdeploy", "serve", str(run), "--port", "0", "--json", "--log-format", "json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    with log.open("w") as errors, subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
    ) as process:  # fmt: skip
        try:
            text = ""
            assert process.stdout is not None
            timer = threading.Timer(90, process.kill)
            timer.start()
            for line in process.stdout:
                text += line
                if line.startswith("}"):
                    break
            timer.cancel()
            assert text.rstrip().endswith("}"), log.read_text()
            document = json.loads(text)
            assert "url" in document, document
            served = Served(process, document, log)
            yield served
            if process.poll() is None:
                assert served.stop() == 0, log.read_text()
        finally:
            if process.poll() is None:
                process.kill()
