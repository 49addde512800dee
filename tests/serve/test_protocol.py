"""The REST codec: what a body may say, and that whatever it says wrongly is named and never a fault of the server."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import decode_answer

from mpdeploy.artifact import TensorSpec
from mpdeploy.serve import protocol
from mpdeploy.serve.contract import Contract
from mpdeploy.serve.dtypes import BF16
from mpdeploy.serve.messages import BadRequestError, InferResponse
from mpdeploy.serve.protocol import decode_request, encode_request, encode_response

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def decoded(document, raw=b"", **more):
    body = json.dumps(document).encode()
    return decode_request(body + raw, str(len(body)).encode() if raw else None, "m", None, **more)


def tensor(**changes):
    value = {"name": "x", "datatype": "FP32", "shape": [2, 3], "data": X.ravel().tolist()}
    return {key: item for key, item in {**value, **changes}.items() if item is not None}


@pytest.mark.parametrize("binary", [True, False])
def test_what_a_client_encodes_is_what_the_server_decodes(binary):
    inputs = {"x": X, "text": np.array([b"a", "ä".encode()], np.object_), "none": np.empty((0, 2), np.int64)}
    body, headers = encode_request(inputs, binary=binary, outputs=("y",), request_id="q")
    length = headers.get("inference-header-content-length")
    request, wants_binary = decode_request(body, length.encode() if length else None, "m", "2")
    assert (request.model_name, request.model_version, request.id, wants_binary) == ("m", "2", "q", binary)
    assert [output.name for output in request.outputs] == ["y"]
    for name, array in inputs.items():
        np.testing.assert_array_equal(request.inputs[name], array)
        assert request.inputs[name].dtype == array.dtype


@pytest.mark.parametrize(
    ("default", "asked", "expected"),
    [(None, None, False), (True, None, True), (True, False, False), (False, True, True), (None, True, True)],
)
def test_an_output_is_binary_as_it_says_itself_else_as_the_request_says(default, asked, expected):
    document = {"inputs": [tensor()], "outputs": [{"name": "y"}]}
    if default is not None:
        document["parameters"] = {"binary_data_output": default}
    if asked is not None:
        document["outputs"] = [{"name": "y", "parameters": {"binary_data": asked}}]
    request, binary = decoded(document)
    body, head = encode_response(InferResponse("m", "1", "", {"y": X}), request, binary)
    assert (head is not None) is expected
    np.testing.assert_array_equal(decode_answer(body, str(head) if head else None)["y"], X)


def test_outputs_of_both_kinds_go_into_one_answer():
    request, binary = decoded(
        {"inputs": [tensor()], "outputs": [{"name": "a", "parameters": {"binary_data": True}}, {"name": "b"}]}
    )
    body, head = encode_response(InferResponse("m", "1", "i", {"a": X, "b": X + 1}), request, binary)
    answer = decode_answer(body, str(head))
    np.testing.assert_array_equal(answer["a"], X)
    np.testing.assert_array_equal(answer["b"], X + 1)
    assert json.loads(body[:head])["id"] == "i"


ANSWERS = [
    InferResponse(model, version, "", outputs)
    for model, version in (("m", "1"), ("m", "2"), ("n", "1"))
    for outputs in (
        {"y": X},
        {"y": X + 1},
        {"z": X},
        {"y": X, "z": X},
        {"y": X.astype(np.float16)},
        {"y": X.astype(BF16)},
        {"y": X[:1]},
        {"y": X.T},
        {"y": np.float32(3).reshape(())},
        {"y": np.zeros((0, 4), np.float32)},
        {"y": np.array([b"a", b""], object)},
        {"y": np.array([b"abcd", b"e"], object)},
        {"y": X > 0},
    )
] + [InferResponse("m", "1", "an id", {"y": X}), InferResponse("m", "1", "", {"y": X}, {"a": 1})]


def test_the_json_part_of_an_answer_that_was_made_before_says_what_it_would_say_anew(monkeypatch):
    request, binary = decoded({"inputs": [tensor()], "parameters": {"binary_data_output": True}})

    def anew(response):
        monkeypatch.setattr(protocol, "_HEADS", {})
        return encode_response(response, request, binary)

    expected = [anew(response) for response in ANSWERS]
    monkeypatch.setattr(protocol, "_HEADS", {})
    for _ in range(2):
        assert [encode_response(response, request, binary) for response in ANSWERS] == expected
    assert len(protocol._HEADS) == 3 * 10, "none of text, of an id, or of parameters; values make no difference"


def test_answers_of_ever_new_shapes_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(protocol, "_HEADS", {})
    request, binary = decoded({"inputs": [tensor()], "parameters": {"binary_data_output": True}})
    for rows in range(protocol.MAX_KNOWN_HEADS + 10):
        encode_response(InferResponse("m", "1", "", {"y": np.zeros(rows, np.int8)}), request, binary)
    assert 0 < len(protocol._HEADS) <= protocol.MAX_KNOWN_HEADS


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "must be a JSON object"),
        ({}, "'inputs' must be a list of at least one"),
        ({"inputs": []}, "'inputs' must be a list of at least one"),
        ({"inputs": {"x": 1}}, "'inputs' must be a list"),
        ({"inputs": [3]}, r"inputs\[0\] must be an object"),
        ({"inputs": [tensor(name=None)]}, r"inputs\[0\]: 'name' must be a string"),
        ({"inputs": [tensor(name="n" * 300)]}, "300 characters"),
        ({"inputs": [tensor(datatype=None)]}, "input 'x': 'datatype' is missing"),
        ({"inputs": [tensor(shape=None)]}, "input 'x': 'shape' is missing"),
        ({"inputs": [tensor(data=None)]}, "neither 'data' nor the parameter 'binary_data_size'"),
        ({"inputs": [tensor(), tensor()]}, "input 'x' is there twice"),
        ({"inputs": [tensor(parameters=[])]}, "'parameters' must be an object"),
        ({"inputs": [tensor(parameters={"binary_data_size": 4})]}, "both 'data' and the parameter"),
        ({"inputs": [tensor(data=None, parameters={"binary_data_size": 4})]}, "is 4, 0 bytes of the body are left"),
        ({"inputs": [tensor(data=None, parameters={"binary_data_size": -1})]}, "whole number from 0 up"),
        ({"inputs": [tensor(data=None, parameters={"binary_data_size": True})]}, "whole number from 0 up"),
        ({"inputs": [tensor(parameters={"shared_memory_region": "r"})]}, "shared memory is not supported"),
        ({"inputs": [tensor()], "id": 3}, "'id' must be a string"),
        ({"inputs": [tensor()], "parameters": 3}, "the request: 'parameters' must be an object"),
        ({"inputs": [tensor()], "parameters": {"binary_data_output": 1}}, "'binary_data_output' must be true or false"),
        ({"inputs": [tensor()], "parameters": {"timeout": "soon"}}, "'timeout' must be a whole number"),
        ({"inputs": [tensor()], "outputs": {}}, "'outputs' must be a list"),
        ({"inputs": [tensor()], "outputs": [{}]}, r"outputs\[0\]: 'name'"),
        ({"inputs": [tensor()], "outputs": [{"name": "y"}, {"name": "y"}]}, "asked for twice"),
        ({"inputs": [tensor()], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "'binary_data' must be"),
        ({"inputs": [tensor()], "outputs": [{"name": "y", "parameters": {"classification": 3}}]}, "classification"),
    ],
)
def test_a_body_that_is_wrong_is_refused_with_the_field_that_is(document, message):
    with pytest.raises(BadRequestError, match=message):
        decoded(document)


@pytest.mark.parametrize(
    ("body", "length", "message"),
    [
        (b"", None, "no JSON"),
        (b"{", None, "no JSON"),
        (b"[" * 100_000, None, "no JSON"),
        (b"NaN" + b"[" * 100_000, None, "no JSON"),
        (b"\xff\xfe", None, "no JSON"),
        (b"{}", b"3", "says 3, the body has 2 bytes"),
        (b"{}", b"-1", "whole number"),
        (b"{}", b"9" * 30, "whole number"),
        (b"{}", "٣".encode(), "whole number"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}zz', b"66", "2 bytes more"),
    ],
)
def test_bytes_that_are_no_body_are_refused(body, length, message):
    with pytest.raises(BadRequestError, match=message):
        decode_request(body, length, "m", None)


def test_python_s_bare_nan_is_read():
    request, _ = decode_request(
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[NaN,-Infinity]}]}', None, "m", None
    )
    np.testing.assert_array_equal(request.inputs["x"], np.array([np.nan, -np.inf], np.float32))


def test_the_sooner_of_parameter_and_header_is_the_deadline():
    for timeout_ms, seconds in ((b"2000", 2), (None, 5), (b"8000", 5)):
        begin = time.monotonic()
        request, _ = decoded({"inputs": [tensor()], "parameters": {"timeout": 5_000_000}}, timeout_ms=timeout_ms)
        assert begin + seconds <= request.deadline <= time.monotonic() + seconds
    request, _ = decoded({"inputs": [tensor()]})
    assert request.deadline is None


VALID, HEADERS = encode_request({"x": X, "t": np.array([b"ab"], np.object_)}, outputs=("y",))
HEAD = int(HEADERS["inference-header-content-length"])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.data())
def test_a_body_with_flipped_bytes_is_read_or_refused(changes, data):
    body = bytearray(VALID)
    for position, value in changes:
        body[position] = value
    cut = data.draw(st.integers(0, len(body)))
    for content, length in (
        (bytes(body), HEAD),
        (bytes(body[:cut]), HEAD),
        (bytes(body), data.draw(st.integers(0, 999))),
    ):
        try:
            request, _ = decode_request(content, str(length).encode(), "m", None)
        except BadRequestError:
            continue
        assert all(isinstance(array, np.ndarray) for array in request.inputs.values())


def contract_of(*inputs: TensorSpec) -> Contract:
    return Contract.of(inputs, [TensorSpec("y", "float32", (None,))], batches=(1, 1, 8))


@pytest.mark.parametrize("shape", [(None, 3), (2, None), (2, 3)])
def test_a_body_without_json_has_the_shape_that_its_size_says(shape):
    found = contract_of(TensorSpec("x", "float32", shape)).input_of_raw(X.tobytes())
    np.testing.assert_array_equal(found["x"], X)


@pytest.mark.parametrize("shape", [(None,), (1,), (None, 1)])
def test_a_body_without_json_is_one_text(shape):
    found = contract_of(TensorSpec("x", "object", shape)).input_of_raw(b"some text")
    assert (found["x"].shape, found["x"].ravel().tolist()) == ((1,) * len(shape), [b"some text"])


@pytest.mark.parametrize(
    "inputs",
    [
        [],
        [TensorSpec("x", "float32", (None, None))],
        [TensorSpec("x", "float32", None)],
        [TensorSpec("x", "float32", (None, 5))],
        [TensorSpec("x", "float32", (None, 0))],
        [TensorSpec("x", "object", (None, 2))],
        [TensorSpec("x", "float32", (None, 3)), TensorSpec("z", "float32", (None, 3))],
    ],
    ids=str,
)
def test_a_body_without_json_is_refused_where_its_shape_is_not_known(inputs):
    with pytest.raises(BadRequestError):
        contract_of(*inputs).input_of_raw(X.tobytes())
