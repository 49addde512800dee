"""Valid requests with some bytes changed, put in, taken out or doubled, for both codecs and for a live server."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np

from mpdeploy.serve.dtypes import NUMPY_OF
from mpdeploy.serve.messages import ServeError
from mpdeploy.serve.protocol import decode_request, encode_request

WORDS = (b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"[]", b"{}", b'""', b'"BYTES"', b'"FP32"', b'"BOOL"', b"[1,2]", b"9" * 40,
         b"\\ud800", b"\xff\xfe", b"[[[[", b'"shape"', b'"data"', b'"binary_data_size"', b"\x00", b"18446744073709551616")  # fmt: skip
"""What a byte-wise change seldom makes."""


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four changes."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.random(), rng.randrange(len(changed) + 1)
        if kind < 0.4 and changed:
            changed[at % len(changed)] = rng.randrange(256)
        elif kind < 0.6:
            changed[at:at] = rng.choice(WORDS)
        elif kind < 0.75:
            del changed[at : at + rng.randint(1, 8)]
        elif kind < 0.9:
            other = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[other : other + rng.randint(1, 32)]
        else:
            word = rng.choice(WORDS)
            changed[at : at + len(word)] = word
    return bytes(changed)


VALUES = (None, True, 0, 1, -1, 2**31, 2**63, 2**70, 1.5, 1e308, "", "x", "y", "FP32", "BYTES", "NaN", "\u0000", [], [1], [[1]], [1, [2]],
          {}, {"x": 1}, "9" * 300, [0] * 100, [2**40, 2**40], "shared_memory_region")  # fmt: skip
"""What a field of a document is replaced by."""


def restructured(head: bytes, rng: random.Random) -> bytes:
    """A JSON document with one or two of its fields replaced, taken out, doubled or renamed: what a byte-wise change seldom reaches."""
    document = json.loads(head)
    for _ in range(rng.randint(1, 2)):
        place = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(min(len(place), 8)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.75:
                place = place[key]
                continue
            kind = rng.random()
            if kind < 0.7:
                place[key] = copy.deepcopy(rng.choice(VALUES))
            elif kind < 0.85:
                del place[key]
            elif isinstance(place, list):
                place.append(copy.deepcopy(place[key]))
            else:
                place[rng.choice(("id", "data", "shape", "parameters", "outputs", "timeout", "binary_data_size"))] = (
                    copy.deepcopy(place[key])
                )
            break
    return json.dumps(document).encode()


def rest_seeds() -> list[tuple[bytes, bytes | None]]:
    """Valid bodies of every datatype, in JSON and in binary, with the length of the JSON where raw bytes follow."""
    seeds: list[tuple[bytes, bytes | None]] = []
    for datatype, dtype in NUMPY_OF.items():
        array = np.array([[b"text", b"\xc3\xa9"]], object) if datatype == "BYTES" else np.array([[1, 0]]).astype(dtype)
        for binary in (False, True):
            body, headers = encode_request({"x": array, "other": array}, outputs=("y",), binary=binary, request_id="7")
            seeds.append((body, headers.get("inference-header-content-length", "").encode() or None))
    nested = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2, 2], "data": [[[1, 2], ["NaN", None]]]}]}
    nested["parameters"] = {"timeout": 1000, "priority": 1, "binary_data_output": False}  # type: ignore[assignment]
    return [*seeds, (json.dumps(nested).encode(), None)]


def _of_the_client(error: ServeError) -> str:
    """The name of an error that a request may cause; any other is raised again."""
    if error.status >= 500:
        raise error
    return type(error).__name__


def fuzz_rest(count: int, seed: int) -> dict[str, int]:
    """Decode so many mutated bodies. Anything but an answer or a ServeError of the client's is raised."""
    rng, seeds = random.Random(seed), rest_seeds()
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        body, length = rng.choice(seeds)
        if rng.random() < 0.6:
            split = len(body) if length is None else int(length)
            front = restructured(body[:split], rng)
            body, length = front + body[split:], None if length is None else b"%d" % len(front)
        else:
            body = mutated(body, rng)
        if length is not None and rng.random() < 0.1:
            length = mutated(length, rng)
        try:
            decode_request(body, length, "m", None)
            outcomes["decoded"] += 1
        except ServeError as error:
            outcomes[_of_the_client(error)] += 1
    return dict(outcomes)


def fuzz_grpc(count: int, seed: int) -> dict[str, int]:
    """Read so many mutated gRPC messages, likewise."""
    from mpdeploy.serve.grpc_messages import CONTENTS_OF, load_protocol, request_from_message
    from mpdeploy.serve.grpc_reading import Reading

    request = load_protocol().messages["ModelInferRequest"]
    seeds = []
    for datatype, field in CONTENTS_OF.items():
        message = request(model_name="m", id="7")
        tensor = message.inputs.add(name="x", datatype=datatype, shape=[1, 2])
        values = {"bytes_contents": [b"a", b"b"], "bool_contents": [True, False]}.get(str(field), [1, 2])
        getattr(tensor.contents, str(field)).extend(values)
        message.parameters["timeout"].int64_param = 1000
        message.outputs.add(name="y")
        seeds.append(message.SerializeToString())
    raw = request(model_name="m")
    raw.inputs.add(name="a", datatype="BYTES", shape=[2])
    raw.inputs.add(name="b", datatype="BF16", shape=[2, 2])
    raw.raw_input_contents.extend([b"\1\0\0\0a\0\0\0\0", b"12345678"])
    seeds.append(raw.SerializeToString())
    reading = Reading(2**30)
    read = reading.reader_of(request)
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        found = read(mutated(rng.choice(seeds), rng))
        try:
            request_from_message(found.checked())
            outcomes["decoded"] += 1
        except ServeError as error:
            outcomes[_of_the_client(error)] += 1
        finally:
            reading.done(found)
    assert reading.inflight_bytes == 0
    return dict(outcomes)


def mutated_requests(count: int, seed: int) -> Iterator[bytes]:
    """Whole HTTP requests to the model `sums`: mostly the body is changed, sometimes the head too."""
    rng = random.Random(seed)
    x = np.random.default_rng(0).standard_normal((2, 256), np.float32)
    seeds = [encode_request({"x": x[:rows]}, binary=binary) for rows in (0, 1, 2) for binary in (True, False)]
    for _ in range(count):
        body, headers = rng.choice(seeds)
        # the JSON part of a binary body is a small share of it: aim there as often as elsewhere
        split = int(headers.get("inference-header-content-length", 0))
        if split and rng.random() < 0.7:
            front = restructured(body[:split], rng) if rng.random() < 0.7 else mutated(body[:split], rng)
            body = front + body[split:]
            if rng.random() < 0.9:
                headers = {**headers, "inference-header-content-length": str(len(front))}
        else:
            body = mutated(body, rng)
        lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
        head = f"POST /v2/models/sums/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{lines}\r\n".encode()
        if rng.random() < 0.2:
            head = mutated(head, rng)
        yield head + body
