"""The same questions to our server and to a real tritonserver, by NVIDIA's own client, over HTTP (JSON and binary) and gRPC.

The model gives back what it was sent, one tensor a datatype. What is tested is what both do; where they differ, the table says how.
The real server's half is slow and runs where MPDEPLOY_TRITON_VENV names one (see real_triton.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import real_triton
from onnx import TensorProto, helper

pytest.importorskip("tritonclient.grpc")
import tritonclient.grpc
import tritonclient.http
from served import make_run, model_of, serving
from tritonclient.utils import InferenceServerException

from mpdeploy.serve.dtypes import NUMPY_OF
from mpdeploy.serve.package import PackageRequest, package

KINDS = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}  # fmt: skip
"""Datatype -> ONNX's. BF16 is not among them: ONNX Runtime takes no such numpy array (its way through the doors is tested in test_grpc)."""
CLIENTS = ("json", "binary", "grpc")
NOT_IN_JSON = {"FP16": "the protocol's JSON has no FP16"}


@dataclass(frozen=True)
class Door:
    """A server that answers."""

    name: str
    http: str
    grpc: str


@pytest.fixture(scope="module")
def types_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model gives back each of its inputs."""
    shapes = {kind: ["n", f"length_{kind}"] for kind in KINDS}
    model = model_of(
        [helper.make_node("Identity", [f"in_{kind}"], [f"out_{kind}"]) for kind in KINDS],
        {f"in_{kind}": (KINDS[kind], shapes[kind]) for kind in KINDS},
        {f"out_{kind}": (KINDS[kind], shapes[kind]) for kind in KINDS},
    )
    folder = tmp_path_factory.mktemp("types")
    return make_run(folder / "types", model, lengths={f"in_{kind}": (1, 3) for kind in KINDS}, name="types")


@pytest.fixture(
    scope="module",
    params=["mpdeploy", pytest.param("triton", marks=[pytest.mark.slow, real_triton.needed()])],
)
def door(request: pytest.FixtureRequest, types_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "mpdeploy":
        with serving(types_run, "--grpc-port", 0, "--name", "types", folder=folder) as served:
            yield Door("mpdeploy", f"{served.host}:{served.port}", served.document["grpc"])
        return
    package(PackageRequest(types_run, "triton", folder / "package", name="types", allow_failed=True))
    binary, environment = real_triton.server_folder(folder / "server")
    with real_triton.running(binary, environment, folder / "package", folder / "log") as (http, grpc):
        yield Door("triton", http, grpc)


class Asking:
    """One of NVIDIA's clients, with one way to ask. In JSON, tensors that JSON does not have travel in binary beside the others."""

    def __init__(self, door: Door, kind: str) -> None:
        self.door = door.name
        self.kind = kind
        self.module: Any = tritonclient.grpc if kind == "grpc" else tritonclient.http
        self.client = self.module.InferenceServerClient(door.grpc if kind == "grpc" else door.http)

    def infer(
        self, arrays: dict[str, np.ndarray[Any, Any]], *outputs: str, model: str = "types", version: str = "",
        datatypes: dict[str, str] | None = None,
    ) -> Any:  # fmt: skip
        inputs = []
        for name, array in arrays.items():
            datatype = (datatypes or {}).get(name, name.removeprefix("in_"))
            put = self.module.InferInput(name, list(array.shape), datatype)
            put.set_data_from_numpy(array, **self._binary(datatype))
            inputs.append(put)
        asked = [
            self.module.InferRequestedOutput(name, **self._binary(name.removeprefix("out_")))
            for name in outputs or ["out_INT8"]
        ]
        return self.client.infer(model, inputs, model_version=version, outputs=asked)

    def refused(self, arrays: dict[str, np.ndarray[Any, Any]], *outputs: str, **more: Any) -> str:
        with pytest.raises(InferenceServerException) as caught:
            self.infer(arrays, *outputs, **more)
        return str(caught.value.status())

    def _binary(self, datatype: str) -> dict[str, bool]:
        return {} if self.kind == "grpc" else {"binary_data": self.kind == "binary" or datatype in NOT_IN_JSON}


@pytest.fixture(params=CLIENTS)
def asking(request: pytest.FixtureRequest, door: Door) -> Iterator[Asking]:
    made = Asking(door, request.param)
    yield made
    made.client.close()


def plain() -> dict[str, np.ndarray[Any, Any]]:
    """One small tensor for each input."""
    arrays: dict[str, np.ndarray[Any, Any]] = {f"in_{kind}": np.ones((1, 2), NUMPY_OF[kind]) for kind in KINDS}
    return arrays | {"in_BYTES": np.array([[b"a", b"b"]], np.object_)}


def extremes(kind: str) -> np.ndarray[Any, Any]:
    if kind == "BYTES":
        return np.array([["", "é\n\t\x00".encode()]], np.object_).astype(np.object_)
    dtype = NUMPY_OF[kind]
    if dtype.kind == "b":
        return np.array([[True, False]])
    if dtype.kind in "iu":
        return np.array([[np.iinfo(dtype).min, np.iinfo(dtype).max]], dtype)
    limits = ml_dtypes.finfo(dtype)
    return np.array([[limits.max, -limits.tiny]], dtype)


def same(found: Any, sent: np.ndarray[Any, Any]) -> bool:
    if sent.dtype == np.object_:
        texts = [[item if isinstance(item, bytes) else str(item).encode() for item in row] for row in sent]
        return [
            [bytes(item) if isinstance(item, bytes) else str(item).encode() for item in row] for row in found
        ] == texts
    return bool(found.dtype == sent.dtype and np.array_equal(found, sent, equal_nan=sent.dtype.kind == "f"))


# -- tensors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_datatype_comes_back_as_it_was_sent(asking: Asking, kind: str) -> None:
    arrays = plain() | {f"in_{kind}": extremes(kind)}
    result = asking.infer(arrays, f"out_{kind}")
    assert same(result.as_numpy(f"out_{kind}"), arrays[f"in_{kind}"])


def test_values_that_are_not_finite_come_back_in_binary(asking: Asking) -> None:
    if asking.kind == "json":
        pytest.skip("the protocol's JSON has no NaN")
    arrays = plain() | {"in_FP32": np.array([[np.nan, -np.inf]], np.float32)}
    assert same(asking.infer(arrays, "out_FP32").as_numpy("out_FP32"), arrays["in_FP32"])


def test_a_tensor_without_elements_keeps_its_shape(asking: Asking) -> None:
    arrays = plain() | {"in_FP32": np.empty((1, 0), np.float32), "in_BYTES": np.empty((1, 0), np.object_)}
    result = asking.infer(arrays, "out_FP32", "out_BYTES")
    assert result.as_numpy("out_FP32").shape == (1, 0)
    assert result.as_numpy("out_BYTES").shape == (1, 0)


def test_a_tensor_of_16_megabytes_comes_back(asking: Asking) -> None:
    if asking.kind == "json":
        pytest.skip("16 MB of FP32 are 80 MB of JSON")
    large = np.random.default_rng(0).standard_normal((1, 4_000_000), dtype=np.float32)
    assert same(asking.infer(plain() | {"in_FP32": large}, "out_FP32").as_numpy("out_FP32"), large)


def test_a_batch_keeps_its_order(asking: Asking) -> None:
    arrays = {name: np.repeat(array, 5, axis=0) for name, array in plain().items()}
    arrays["in_INT32"] = np.arange(10, dtype=np.int32).reshape(5, 2)
    assert same(asking.infer(arrays, "out_INT32").as_numpy("out_INT32"), arrays["in_INT32"])


def test_a_batch_of_no_samples_is_refused_where_nothing_says_what_its_answer_looks_like(asking: Asking) -> None:
    arrays = {name: array[:0] for name, array in plain().items()}
    assert asking.refused(arrays) == expected(asking, "invalid")


def test_outputs_come_in_the_order_they_were_asked_for(asking: Asking) -> None:
    result = asking.infer(plain(), "out_UINT8", "out_BOOL")
    answer = result.get_response()
    names = [item["name"] for item in answer["outputs"]] if asking.kind != "grpc" else [o.name for o in answer.outputs]
    if asking.door == "triton":  # it promises no order: the Python backend is handed a set of names
        names.sort(reverse=True)
    assert names == ["out_UINT8", "out_BOOL"]


# -- metadata ----------------------------------------------------------------------------------------------------------


def test_health_and_metadata_agree(asking: Asking) -> None:
    client = asking.client
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("types")
    assert client.is_model_ready("types", "1")
    assert not client.is_model_ready("nothing")
    metadata = client.get_model_metadata("types")
    if asking.kind == "grpc":
        found = {item.name: (item.datatype, list(item.shape)) for item in metadata.inputs}
    else:
        found = {item["name"]: (item["datatype"], item["shape"]) for item in metadata["inputs"]}
    assert found == {f"in_{kind}": (kind, [-1, -1]) for kind in KINDS}


def test_statistics_count_what_was_answered(asking: Asking) -> None:
    def answered() -> int:
        found = asking.client.get_inference_statistics("types")
        if asking.kind == "grpc":
            return int(found.model_stats[0].inference_stats.success.count)
        return int(found["model_stats"][0]["inference_stats"]["success"]["count"])

    before = answered()
    asking.infer(plain(), "out_INT8")
    asking.infer(plain(), "out_INT8")
    assert answered() == before + 2


# -- errors ------------------------------------------------------------------------------------------------------------


def wrong_length(arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    arrays["in_INT8"] = np.ones((1, 2, 3), np.int8)


def missing(arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    del arrays["in_INT8"]


def unknown(arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    arrays["in_UINT128"] = np.ones((1, 2), np.uint8)


def uneven(arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    arrays["in_INT8"] = np.ones((2, 2), np.int8)


def wider(arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    arrays["in_INT8"] = np.ones((1, 2), np.int16)


def nothing(arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """The tensors are as they should be."""


REFUSED = {
    "a wrong number of axes": (wrong_length, {}, "invalid"),
    "a missing input": (missing, {}, "invalid"),
    "an unknown input": (unknown, {"datatypes": {"in_UINT128": "UINT8"}}, "invalid"),
    "another datatype": (wider, {"datatypes": {"in_INT8": "INT16"}}, "invalid"),
    "batches of two sizes": (uneven, {}, "invalid"),
    "an unknown model": (nothing, {"model": "nothing"}, "unknown"),
    "an unknown version": (nothing, {"version": "77"}, "unknown"),
}
STATUS = {
    ("grpc", "invalid"): "StatusCode.INVALID_ARGUMENT",
    ("grpc", "unknown"): "StatusCode.NOT_FOUND",
    ("http", "invalid"): "400",
    ("http", "unknown"): "404",
}
"""(client, kind of error) -> the status that both servers answer with."""


def expected(asking: Asking, kind: str) -> str:
    return STATUS["grpc" if asking.kind == "grpc" else "http", kind]


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_does_not_fit_is_refused_with_the_same_status(asking: Asking, case: str) -> None:
    change, more, kind = REFUSED[case]
    arrays = plain()
    change(arrays)
    assert asking.refused(arrays, **more) == expected(asking, kind)
    assert asking.infer(plain()).as_numpy("out_INT8").tolist() == [[1, 1]], "and the server goes on"


def test_an_unknown_output_is_refused(asking: Asking) -> None:
    assert asking.refused(plain(), "out_UINT128") == expected(asking, "invalid")
