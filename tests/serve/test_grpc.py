"""The gRPC door, asked by tritonclient: every datatype, errors as statuses, deadlines, streams in order, tokens and TLS.

Behind it stands a manager that answers with what it was sent, so that what is tested is the door.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("grpc_tools")
tritonclient = pytest.importorskip("tritonclient.grpc")
import grpc  # noqa: E402
from served import wait_for  # noqa: E402
from tritonclient.grpc import service_pb2, service_pb2_grpc  # noqa: E402
from tritonclient.utils import InferenceServerException  # noqa: E402

from mpdeploy.artifact import TensorSpec  # noqa: E402
from mpdeploy.errors import UnavailableError, UsageError  # noqa: E402
from mpdeploy.serve import messages  # noqa: E402
from mpdeploy.serve.dtypes import NUMPY_OF, datatype_of  # noqa: E402
from mpdeploy.serve.grpc_messages import CONTENTS_OF, load_protocol, request_from_message  # noqa: E402
from mpdeploy.serve.grpc_reading import Reading  # noqa: E402
from mpdeploy.serve.grpc_server import GrpcOptions, start_grpc  # noqa: E402

NONFINITE = {"x": np.array([[np.nan, np.inf, -np.inf, -0.0]], np.float32)}
ERRORS = [
    (messages.BadRequestError("bad"), "INVALID_ARGUMENT"),
    (messages.UnauthorizedError("who"), "UNAUTHENTICATED"),
    (messages.UnknownModelError("none"), "NOT_FOUND"),
    (messages.TooLargeError("large"), "RESOURCE_EXHAUSTED"),
    (messages.ModelFailedError("failed"), "INTERNAL"),
    (messages.UnavailableServeError("later"), "UNAVAILABLE"),
    (messages.OverloadedError("full", retry_after_s=2.5), "RESOURCE_EXHAUSTED"),
    (messages.DeadlineError("late"), "DEADLINE_EXCEEDED"),
]


class Echo:
    """A manager that answers with its inputs; the model's name says what else happens."""

    def __init__(self) -> None:
        self.requests: list[messages.InferRequest] = []
        self.loaded: list[Any] = []
        self.cancelled = threading.Event()

    async def infer(self, request: messages.InferRequest) -> messages.InferResponse:
        self.requests.append(request)
        if request.model_name.startswith("error-"):
            raise ERRORS[int(request.model_name.removeprefix("error-"))][0]
        if request.model_name == "bug":
            raise ZeroDivisionError("secret")
        if request.model_name == "slow":
            try:
                await asyncio.sleep(float(request.parameters.get("seconds", 60)))
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        outputs = {name.replace("in", "out", 1): array for name, array in request.inputs.items()}
        if request.outputs:
            outputs = {output.name: outputs[output.name] for output in request.outputs}
        return messages.InferResponse(request.model_name, "3", request.id, outputs, request.parameters)

    def metadata(self, name: str, version: str | None = None) -> messages.ModelMetadata:
        if name != "echo":
            raise messages.UnknownModelError(f"there is no model '{name}'")
        inputs = (TensorSpec("image", "bfloat16", ("batch", 1, None)), TensorSpec("text", "object", (2,)))
        return messages.ModelMetadata(name, ("2", "3"), "onnxruntime_onnx", inputs, (TensorSpec("y", "float16", ()),))

    def ready(self, name: str, version: str | None = None) -> bool:
        return name == "echo" and version in (None, "3")

    def server_ready(self) -> bool:
        return True

    def index(self) -> list[dict[str, Any]]:
        return [
            {"name": "echo", "version": "3", "state": "READY", "reason": ""},
            {"name": "gone", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"},
        ]

    async def load(self, name: str, parameters: Any) -> None:
        self.loaded.append((name, dict(parameters)))

    async def unload(self, name: str) -> None:
        self.loaded.remove((name, {"path": "elsewhere"}))

    def statistics(self, name: str | None = None, version: str | None = None) -> dict[str, Any]:
        success = {"count": 5, "ns": 700}
        return {
            "model_stats": [
                {
                    "name": "echo",
                    "version": "3",
                    "inference_count": 9,
                    "inference_stats": {"success": success},
                    "new": 1,
                }
            ]
        }


class Door:
    """An open door in a thread with a loop of its own."""

    def __init__(self, options: GrpcOptions | None = None) -> None:
        self.manager = Echo()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self.do(start_grpc(self.manager, "127.0.0.1", 0, options))
        self.address = f"127.0.0.1:{self._server.port}"

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def stop(self, grace: float = 0.0) -> None:
        self.do(self._server.stop(grace))

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    opened = Door(GrpcOptions(max_request_bytes=8 * 2**20, version="1.2.3", max_stream_in_flight=4))
    yield opened
    opened.close()


@pytest.fixture
def open_door() -> Iterator[Callable[..., Door]]:
    doors: list[Door] = []

    def opened(**options: Any) -> Door:
        doors.append(Door(GrpcOptions(**options)))
        return doors[-1]

    yield opened
    for each in doors:
        each.close()


@pytest.fixture(scope="module")
def client(door: Door) -> Iterator[Any]:
    with tritonclient.InferenceServerClient(door.address) as made:
        yield made


@pytest.fixture(scope="module")
def stub(door: Door) -> Iterator[Any]:
    with grpc.insecure_channel(door.address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(name: str, array: np.ndarray[Any, Any]) -> Any:
    made = tritonclient.InferInput(name, list(array.shape), datatype_of(array.dtype))
    made.set_data_from_numpy(array)
    return made


def values_of(datatype: str) -> np.ndarray[Any, Any]:
    """Values at both ends of a datatype, shape [2, 3]."""
    if datatype == "BYTES":
        return np.array([[b"", b"\x00\xff", "é".encode()], [b"a" * 1000, b"b", b"\n"]], np.object_)
    dtype = NUMPY_OF[datatype]
    if dtype.kind == "b":
        return np.array([[True, False, True], [False, False, True]])
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return np.array([[limits.min, limits.max, 0], [1, 2, limits.max - 1]], dtype)
    limits = ml_dtypes.finfo(dtype)
    return np.array([[limits.min, limits.max, limits.tiny], [-0.0, np.inf, 1.5]], dtype)


# -- the protocol ------------------------------------------------------------------------------------------------------


def test_names_and_numbers_are_those_of_tritons_own_client():
    theirs = service_pb2.DESCRIPTOR

    def compare(mine: Any, other: Any) -> int:
        for field in mine.fields:
            found = other.fields_by_name[field.name]
            kind = lambda f: (f.message_type or f.enum_type or f).full_name if f.message_type or f.enum_type else f.type  # noqa: E731
            assert (field.number, field.is_repeated, kind(field)) == (found.number, found.is_repeated, kind(found))
            assert (field.containing_oneof is None) == (found.containing_oneof is None)
        return len(mine.fields) + sum(
            compare(each, other.nested_types_by_name[each.name]) for each in mine.nested_types
        )

    protocol = load_protocol()
    counted = sum(
        compare(cls.DESCRIPTOR, theirs.message_types_by_name[name]) for name, cls in protocol.messages.items()
    )
    assert counted > 90
    service = theirs.services_by_name["GRPCInferenceService"]
    for method in protocol.methods:
        found = service.methods_by_name[method.name]
        assert (found.client_streaming, found.server_streaming) == (method.streams, method.streams)
        assert found.input_type.name == method.request.DESCRIPTOR.name


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("echo")
    assert not client.is_model_ready("echo", "2")
    assert not client.is_model_ready("other")
    server = client.get_server_metadata()
    assert (server.name, server.version) == ("mpdeploy", "1.2.3")
    model = client.get_model_metadata("echo", as_json=True)
    assert model == {
        "name": "echo",
        "versions": ["2", "3"],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": "image", "datatype": "BF16", "shape": ["-1", "1", "-1"]},
            {"name": "text", "datatype": "BYTES", "shape": ["2"]},
        ],
        "outputs": [{"name": "y", "datatype": "FP16"}],
    }


def test_statistics_and_the_repository(client, door):
    found = client.get_inference_statistics("echo").model_stats[0]
    assert (found.inference_count, found.inference_stats.success.ns) == (9, 700)
    index = client.get_model_repository_index().models
    assert [(item.name, item.state) for item in index] == [("echo", "READY"), ("gone", "UNAVAILABLE")]
    request = service_pb2.RepositoryModelLoadRequest(model_name="echo")
    request.parameters["path"].string_param = "elsewhere"
    with grpc.insecure_channel(door.address) as channel:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).RepositoryModelLoad(request)
    assert door.manager.loaded == [("echo", {"path": "elsewhere"})]
    client.unload_model("echo")
    assert door.manager.loaded == []


# -- tensors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", NUMPY_OF)
def test_a_raw_tensor_comes_back_as_it_was_sent(client, datatype):
    sent = values_of(datatype)
    # tritonclient widens BF16 to float32 on its way out and in
    given = sent.astype(np.float32) if datatype == "BF16" else sent
    put = tritonclient.InferInput("in", list(sent.shape), datatype)
    put.set_data_from_numpy(given)
    result = client.infer("echo", [put])
    assert result.get_output("out").datatype == datatype
    found = result.as_numpy("out")
    if datatype == "BYTES":
        assert found.tolist() == sent.tolist()
    else:
        np.testing.assert_array_equal(found, given)


@pytest.mark.parametrize("datatype", CONTENTS_OF)
def test_typed_contents_are_read(stub, door, datatype):
    sent = values_of(datatype)
    request = service_pb2.ModelInferRequest(model_name="echo")
    put = request.inputs.add(name="in", datatype=datatype, shape=sent.shape)
    getattr(put.contents, CONTENTS_OF[datatype]).extend(sent.ravel().tolist())
    stub.ModelInfer(request)
    found = door.manager.requests[-1].inputs["in"]
    assert (found.dtype, found.tolist()) == (sent.dtype, sent.tolist())


@pytest.mark.parametrize("datatype", ["FP32", "BYTES", "BF16"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4)])
def test_a_tensor_without_elements_keeps_its_shape(client, datatype, shape):
    empty = np.empty(shape, np.float32 if datatype == "BF16" else NUMPY_OF[datatype])
    put = tritonclient.InferInput("in", list(shape), datatype)
    put.set_data_from_numpy(empty)
    assert list(client.infer("echo", [put]).get_output("out").shape) == list(shape)


def test_a_scalar_and_values_that_are_not_finite_come_back(client):
    scalar = np.array(2.5, np.float64)
    assert client.infer("echo", [tensor("in", scalar)]).as_numpy("out").shape == ()
    found = client.infer("echo", [tensor("in", NONFINITE["x"])]).as_numpy("out")
    assert found.tobytes() == NONFINITE["x"].tobytes()


def test_a_large_tensor_comes_back(client):
    large = np.random.default_rng(0).standard_normal((1, 1_900_000), dtype=np.float32)
    np.testing.assert_array_equal(client.infer("echo", [tensor("in", large)]).as_numpy("out"), large)


def test_id_version_parameters_and_chosen_outputs_are_given_back(client, door):
    inputs = [tensor("in0", np.ones(2, np.int8)), tensor("in1", np.zeros(3, np.int8))]
    result = client.infer(
        "echo", inputs, model_version="3", outputs=[tritonclient.InferRequestedOutput("out1")], request_id="abc",
        parameters={"whole": 7, "text": "t", "yes": True},
    )  # fmt: skip
    answer = result.get_response()
    assert (answer.id, answer.model_version) == ("abc", "3")
    assert [output.name for output in answer.outputs] == ["out1"]
    assert door.manager.requests[-1].model_version == "3"
    assert dict(door.manager.requests[-1].parameters) == {"whole": 7, "text": "t", "yes": True}


# -- requests that say one thing and hold another ----------------------------------------------------------------------


def fault(change: Callable[[Any], None]) -> Any:
    request = service_pb2.ModelInferRequest(model_name="echo")
    put = request.inputs.add(name="in", datatype="INT8", shape=[2])
    put.contents.int_contents.extend([1, 2])
    change(request)
    return request


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.inputs[0].contents.int_contents.append(3), "takes 2 elements, 'int_contents' has 3"),
        (lambda r: r.inputs[0].contents.int_contents.__setitem__(0, 200), "200 in 'int_contents' is no INT8"),
        (lambda r: r.inputs[0].contents.fp32_contents.append(1.0), "INT8 goes into 'int_contents', found"),
        (lambda r: setattr(r.inputs[0], "datatype", "FP16"), "FP16 has no typed contents"),
        (lambda r: setattr(r.inputs[0], "datatype", "INT7"), "no datatype 'INT7'"),
        (lambda r: r.inputs[0].shape.__setitem__(0, -1), "'shape' must hold whole numbers"),
        (lambda r: r.inputs[0].shape.extend([2**62, 2**62]), "too large"),
        (lambda r: r.raw_input_contents.append(b"12"), "one of them only"),
        (lambda r: r.raw_input_contents.extend([b"12", b"34"]), "has 2 entries for 1 inputs"),
        (lambda r: (r.inputs[0].ClearField("contents"), r.raw_input_contents.append(b"1")), "takes 2 bytes"),
        (lambda r: r.inputs.append(r.inputs[0]), "given twice"),
        (lambda r: setattr(r.inputs[0].parameters["shared_memory_region"], "string_param", "x"), "no shared memory"),
    ],
)  # fmt: skip
def test_a_request_that_contradicts_itself_is_an_invalid_argument(stub, change, said):
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(fault(change))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in caught.value.details()


def test_bytes_that_are_no_message_are_an_invalid_argument_and_no_traceback(door, caplog):
    before = len(door.manager.requests)
    with grpc.insecure_channel(door.address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for garbage in (b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f"):
            with pytest.raises(grpc.RpcError) as caught:
                call(garbage, timeout=10)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "no ModelInferRequest" in caught.value.details()
    assert len(door.manager.requests) == before
    assert "Traceback" not in caplog.text


def test_a_message_with_bytes_changed_at_random_is_read_or_refused_and_never_crashes():
    message = load_protocol().messages["ModelInferRequest"]
    request = message(model_name="m", id="x")
    request.inputs.add(name="a", datatype="BYTES", shape=[2])
    request.inputs.add(name="b", datatype="BF16", shape=[2, 2])
    request.parameters["k"].int64_param = 3
    request.raw_input_contents.extend([b"\1\0\0\0a\0\0\0\0", b"12345678"])
    typed = fault(lambda r: None)
    reading, random, found = Reading(2**20), np.random.default_rng(0), {"read": 0, "refused": 0}
    read = reading.reader_of(message)
    for number in range(5000):
        content = bytearray((request if number % 2 else typed).SerializeToString())
        for place in random.integers(0, len(content), random.integers(1, 4)):
            content[place] = random.integers(0, 256)
        taken = read(bytes(content))
        reading.done(taken)
        try:
            request_from_message(taken.checked())
            found["read"] += 1
        except messages.BadRequestError:
            found["refused"] += 1
    assert found["read"] > 100
    assert found["refused"] > 100
    assert reading.inflight_bytes == 0


def test_a_request_above_the_limit_is_refused(client):
    with pytest.raises(InferenceServerException) as caught:
        client.infer("echo", [tensor("in", np.zeros((1, 3_000_000), np.float32))])
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


# -- errors, deadlines, cancellation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(index, code) for index, (_, code) in enumerate(ERRORS)])
def test_an_error_of_the_manager_has_its_status(stub, number, code):
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(service_pb2.ModelInferRequest(model_name=f"error-{number}"))
    assert (caught.value.code().name, caught.value.details()) == (code, ERRORS[number][0].message)
    pushback = dict(caught.value.trailing_metadata()).get("grpc-retry-pushback-ms")
    assert pushback == ("2500" if isinstance(ERRORS[number][0], messages.OverloadedError) else None)


def test_what_is_unexpected_is_logged_and_says_nothing(stub, caplog):
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(service_pb2.ModelInferRequest(model_name="bug"))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
    assert "secret" in caplog.text


def test_a_calls_deadline_is_the_requests(stub, door):
    stub.ModelInfer(service_pb2.ModelInferRequest(model_name="echo"))
    assert door.manager.requests[-1].deadline is None
    begin = time.monotonic()
    stub.ModelInfer(service_pb2.ModelInferRequest(model_name="echo"), timeout=20)
    end = time.monotonic()
    assert begin + 15 < door.manager.requests[-1].deadline <= end + 20.5


@pytest.mark.parametrize(("timeout_us", "seconds"), [(3_000_000, 3), (0, None), (60_000_000, 20)])
def test_tritons_timeout_is_a_deadline_too_and_the_sooner_counts(client, door, timeout_us, seconds):
    begin = time.monotonic()
    inputs = [tensor("in", np.ones(1, np.int8))]
    client.infer("echo", inputs, timeout=timeout_us, client_timeout=None if seconds is None else 20)
    found, end = door.manager.requests[-1].deadline, time.monotonic()
    assert (found is None) if seconds is None else begin + seconds - 2 < found <= end + seconds + 0.5


def test_a_call_that_is_cancelled_is_cancelled_in_the_manager(stub, door):
    door.manager.cancelled.clear()
    door.manager.requests.clear()
    call = stub.ModelInfer.future(service_pb2.ModelInferRequest(model_name="slow"))
    wait_for(lambda: door.manager.requests)
    assert not door.manager.requests[-1].cancelled()
    call.cancel()
    assert door.manager.cancelled.wait(10)


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_answers_in_order_and_goes_on_after_an_error(door):
    answers: queue.Queue[Any] = queue.Queue()
    with tritonclient.InferenceServerClient(door.address) as streaming:
        streaming.start_stream(lambda result, error: answers.put((result, error)))
        for index in range(20):
            model = "error-0" if index == 7 else "slow"
            # the first ones take longest: answers that came as they were ready would be in another order
            streaming.async_stream_infer(
                model, [tensor("in", np.full(2, index, np.int32))], request_id=str(index),
                parameters={"seconds": "0.2" if index < 4 else "0"},
            )  # fmt: skip
        found = [answers.get(timeout=20) for _ in range(20)]
        streaming.stop_stream()
    for index, (result, error) in enumerate(found):
        if index == 7:
            assert "bad" in str(error)
        else:
            assert error is None
            assert result.get_response().id == str(index)
            assert result.as_numpy("out").tolist() == [index, index]


def test_a_stream_that_is_cut_off_leaves_nothing_running(door):
    door.manager.cancelled.clear()
    door.manager.requests.clear()
    cut = threading.Event()

    def requests() -> Iterator[Any]:
        yield service_pb2.ModelInferRequest(model_name="slow")
        cut.wait(60)

    with grpc.insecure_channel(door.address) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(requests())
        try:
            wait_for(lambda: door.manager.requests)
            assert not door.manager.cancelled.is_set()
        finally:
            call.cancel()
            cut.set()
    assert door.manager.cancelled.wait(10)


# -- the door itself ---------------------------------------------------------------------------------------------------


def test_with_a_token_only_probes_are_open(open_door):
    guarded = open_door(token="correct horse")
    with tritonclient.InferenceServerClient(guarded.address) as anyone:
        assert anyone.is_server_ready()
        assert anyone.is_model_ready("echo")
        for headers in (None, {"authorization": "Bearer wrong"}, {"authorization": "correct horse"}):
            with pytest.raises(InferenceServerException) as caught:
                anyone.get_model_metadata("echo", headers=headers)
            assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
        assert anyone.get_model_metadata("echo", headers={"authorization": "Bearer correct horse"}).name == "echo"
        answers: queue.Queue[Any] = queue.Queue()
        anyone.start_stream(lambda result, error: answers.put(error))
        with contextlib.suppress(InferenceServerException):  # where the refusal is faster than the first request
            anyone.async_stream_infer("echo", [tensor("in", np.ones(1, np.int8))])
        assert "UNAUTHENTICATED" in str(answers.get(timeout=10))
        with contextlib.suppress(InferenceServerException):
            anyone.stop_stream()
    assert guarded.manager.requests == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes the certificate, is not installed")
def test_with_a_certificate_only_tls_is_spoken(open_door, tmp_path: Path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    port = open_door(certificate=certificate, key=key).address.rpartition(":")[2]
    with tritonclient.InferenceServerClient(f"localhost:{port}", ssl=True, root_certificates=str(certificate)) as made:
        assert made.is_server_live()
    with tritonclient.InferenceServerClient(f"localhost:{port}") as plain, pytest.raises(InferenceServerException):
        plain.is_server_live(client_timeout=5)


def test_calls_beyond_the_limit_are_refused(open_door):
    narrow = open_door(max_concurrent=1)
    with grpc.insecure_channel(narrow.address) as channel:
        service = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        first = service.ModelInfer.future(service_pb2.ModelInferRequest(model_name="slow"))
        wait_for(lambda: narrow.manager.requests)
        with pytest.raises(grpc.RpcError) as caught:
            service.ServerLive(service_pb2.ServerLiveRequest())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()


def test_messages_in_progress_are_limited_in_bytes_and_given_back(open_door):
    narrow = open_door(max_inflight_bytes=1_000_000, max_request_bytes=1_000_000)
    half = tensor("in", np.zeros((1, 150_000), np.float32))
    with tritonclient.InferenceServerClient(narrow.address) as asking:
        for _ in range(5):  # more in all than the limit, one after the other
            asking.infer("echo", [half])
        slow = [asking.async_infer("slow", [half], lambda result, error: None) for _ in range(1)]
        wait_for(lambda: narrow.manager.requests[-1].model_name == "slow")
        with pytest.raises(InferenceServerException) as caught:
            asking.infer("echo", [half])
        assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        slow[0].cancel()
        assert narrow.manager.cancelled.wait(10)
        for _ in range(5):
            asking.infer("echo", [half])


def test_a_stop_answers_what_is_in_progress(open_door):
    closing = open_door()
    with grpc.insecure_channel(closing.address) as channel:
        service = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name="slow", id="last")
        request.parameters["seconds"].double_param = 0.3
        call = service.ModelInfer.future(request)
        wait_for(lambda: closing.manager.requests)
        closing.stop(grace=10)
        assert call.result(timeout=10).id == "last"


def test_a_port_that_is_taken_is_an_error():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(UnavailableError, match="cannot be opened"):
            asyncio.run(start_grpc(Echo(), "127.0.0.1", holder.getsockname()[1]))


@pytest.mark.parametrize(
    "options", [{"certificate": Path("c.pem")}, {"max_request_bytes": 0}, {"max_stream_in_flight": 0}]
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(UsageError):
        GrpcOptions(**options)
