"""The short way of inference requests: what takes it, what does not, and that nobody can tell from the answers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from served import FLOAT, checksum_model, decode_answer, infer, make_run, mlp_model, model_of, serving, wait_for

from mpdeploy.serve import direct, protocol
from mpdeploy.serve.connection import READ_TIMEOUT_S, connection_class
from mpdeploy.serve.dtypes import array_from_raw
from mpdeploy.serve.messages import BadRequestError, InferResponse
from mpdeploy.serve.options import ServerOptions
from mpdeploy.serve.protocol import decode_request, encode_request
from mpdeploy.serve.server import _start_grpc


def x(seed: int, rows: int = 1):
    return {"x": np.random.default_rng(seed).standard_normal((rows, 16)).astype(np.float32)}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "sums", checksum_model(), name="sums")


@pytest.fixture(scope="module")
def server(run):
    with serving(run, "--max-body-mb", 3, "--max-inflight-mb", 8, "--read-only") as served:
        yield served


def request_bytes(
    seed: int, extra: bytes = b"", version: bytes = b"1.1", path: bytes = b"/v2/models/sums/infer"
) -> bytes:
    body, headers = encode_request(x(seed))
    lines = b"".join(f"{key}: {value}\r\n".encode() for key, value in headers.items())
    return b"POST %s HTTP/%s\r\nhost: x\r\ncontent-length: %d\r\n%s%s\r\n%s" % (
        path,
        version,
        len(body),
        lines,
        extra,
        body,
    )


def read_answers(connection: socket.socket, count: int) -> list[tuple[int, dict[str, str], bytes]]:
    """So many answers, in the order in which they come."""
    found, file = [], connection.makefile("rb")
    for _ in range(count):
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.decode().partition(": ")
            headers[name.lower()] = value
        found.append((status, headers, file.read(int(headers.get("content-length", 0)))))
    return found


def total(answer: tuple[int, dict[str, str], bytes]) -> float:
    return float(decode_answer(answer[2], answer[1]["inference-header-content-length"])["total"][0])


def test_requests_sent_at_once_are_answered_in_their_order(server):
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        parts = [
            request_bytes(1),
            b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n",
            request_bytes(2),
            request_bytes(3),
        ]
        connection.sendall(b"".join(parts))
        first, live, second, third = read_answers(connection, 4)
        assert [answer[0] for answer in (first, live, second, third)] == [200, 200, 200, 200]
        for answer, seed in ((first, 1), (second, 2), (third, 3)):
            assert total(answer) == pytest.approx(x(seed)["x"].sum(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (request_bytes(5, b"expect: 100-continue\r\n"), 2),
        (request_bytes(5, version=b"1.0"), 1),
        (request_bytes(5, b"connection: close\r\n"), 1),
        (request_bytes(5, b"content-encoding: identity\r\n"), 1),
        (request_bytes(5, path=b"/v2/models/sums/versions/1/infer"), 1),
        (request_bytes(5, path=b"/v2/models/%73ums/infer"), 1),
    ],
    ids=("expect", "http-1.0", "close", "encoding", "version", "quoted"),
)
def test_what_is_out_of_the_ordinary_is_answered_all_the_same(server, content, count):
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        connection.sendall(content)
        answer = read_answers(connection, count)[-1]
        assert answer[0] == 200
        assert total(answer) == pytest.approx(x(5)["x"].sum(), rel=1e-4, abs=1e-5)


def test_a_body_in_pieces_is_put_together(server):
    content = request_bytes(6)
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(content), 50):
            connection.sendall(content[start : start + 50])
            time.sleep(0.002)
        assert total(read_answers(connection, 1)[0]) == pytest.approx(x(6)["x"].sum(), rel=1e-4, abs=1e-5)


def test_a_body_without_a_length_is_read(server):
    body, headers = encode_request(x(7))
    with contextlib.closing(server.connect()) as connection:
        connection.request("POST", "/v2/models/sums/infer", iter([body[:40], body[40:]]), headers, encode_chunked=True)
        assert connection.getresponse().status == 200


@pytest.mark.parametrize(
    ("path", "status"), [("/v2/models/none/infer", 404), ("/v2/models/sums/versions/9/infer", 404)]
)
def test_an_unknown_model_is_unknown(server, path, status):
    body, headers = encode_request(x(1))
    assert server.call("POST", path, body, headers)[0] == status


def test_an_error_leaves_the_connection_usable(server):
    with contextlib.closing(server.connect()) as connection:
        for _ in range(3):
            status, message = infer(connection, server.path, {"x": np.zeros((1, 5), np.float32)})
            assert (status, "shape is [1, 5]" in str(message)) == (400, True)
            assert infer(connection, server.path, x(1))[0] == 200


def test_a_body_on_either_side_of_the_limit_is_answered_alike(server):
    for rows in (direct.DIRECT_BYTES // 64 - 100, direct.DIRECT_BYTES // 64 + 100):
        status, message = server.infer({"x": np.zeros((rows, 16), np.float32)})
        assert (status, "32 is the most" in str(message)) == (400, True)


def test_who_leaves_in_the_middle_of_a_body_holds_nothing(server):
    for _ in range(20):
        with socket.create_connection((server.host, server.port), timeout=20) as connection:
            connection.sendall(request_bytes(8)[:-100])
    wait_for(lambda: "mpdeploy_inflight_bytes 0.0" in server.get("/metrics").decode())
    assert server.infer(x(1))[0] == 200


def wide_model():
    """x [n, 1] -> y [n, 500000]: a few bytes ask for two megabytes a sample."""
    return model_of(
        [helper.make_node("Expand", ["x", "shape"], ["y"])],
        {"x": (FLOAT, ["n", 1])},
        {"y": (FLOAT, ["n", 500_000])},
        {"shape": np.array([1, 500_000], np.int64)},
    )


def test_answers_that_nobody_reads_keep_others_out(tmp_path):
    run = make_run(tmp_path / "run", wide_model(), batches=(1, 1, 16), name="wide")
    one = {"x": np.ones((1, 1), np.float32)}

    def held_becomes(enough) -> None:
        deadline = time.monotonic() + 30
        while not enough(served.get("/figures")["inflight_bytes"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with serving(run, "--max-body-mb", 1, "--max-inflight-mb", 8) as served:
        for rest in ("read", "left"):
            with contextlib.closing(served.connect()) as connection:
                body, headers = encode_request({"x": np.ones((16, 1), np.float32)})  # 32 MB, a system buffers up to 10
                connection.request("POST", f"{served.path}/infer", body, headers)
                held_becomes(lambda size: size > 8 * 2**20)
                assert served.infer(one)[0] == 503
                if rest == "read":
                    assert len(connection.getresponse().read()) > 32_000_000
            held_becomes(lambda size: size == 0)
            assert served.infer(one)[0] == 200


def test_a_second_signal_ends_it_at_once(tmp_path):
    run = make_run(tmp_path / "run", mlp_model((16, 4)), name="small")
    with serving(run, "--drain-s", 60) as served, socket.create_connection((served.host, served.port), timeout=20):
        served.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "stopping" in served.log.read_text())
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(30)  # without it: the 60 seconds of --drain-s


def test_a_run_that_changes_is_loaded_by_itself_with_watch(tmp_path):
    run = make_run(tmp_path / "run", mlp_model((16, 4)), name="small")
    with serving(run, "--watch") as served:
        make_run(tmp_path / "next", mlp_model((16, 4), scale=2.0), name="small")
        run.rename(tmp_path / "old")
        (tmp_path / "next").rename(run)
        deadline = time.monotonic() + 60
        with contextlib.closing(served.connect()) as connection:
            while infer(connection, served.path, x(1))[0] == 200 and served.get(served.path)["versions"] != ["2"]:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert served.get(served.path)["versions"] == ["2"]


# -- the connection's clock --------------------------------------------------------------------------------------------


def connection_at(**state):
    found = connection_class().__new__(connection_class())
    found.limits = ServerOptions(run=Path("run"), keep_alive_s=10)
    found.idle_since = found.blocked_since = found.reading_since = None
    found.unsent_bytes = 1000
    closed = []
    found.transport = SimpleNamespace(
        close=lambda: closed.append("close"),
        abort=lambda: closed.append("abort"),
        get_write_buffer_size=lambda: 1000,
    )
    for name, value in state.items():
        setattr(found, name, value)
    return found, closed


@pytest.mark.parametrize(
    ("state", "seconds", "expected"),
    [
        ({"idle_since": 100.0}, 9.0, []),
        ({"idle_since": 100.0}, 11.0, ["close"]),
        ({"blocked_since": 100.0}, READ_TIMEOUT_S - 1, []),
        ({"blocked_since": 100.0}, READ_TIMEOUT_S + 1, ["abort"]),
    ],
)
def test_idle_peers_are_closed_and_who_does_not_read_is_cut_off(state, seconds, expected):
    connection, closed = connection_at(**state)
    connection.sweep(100.0 + seconds)
    assert closed == expected


def test_who_reads_slowly_is_cut_off_only_when_it_stops():
    connection, closed = connection_at(blocked_since=100.0)
    for now in range(101, 200, 7):
        connection.transport.get_write_buffer_size = lambda left=1000 - now: left
        connection.sweep(float(now))
    connection.sweep(199.0 + READ_TIMEOUT_S)
    assert closed == []
    connection.sweep(200.0 + READ_TIMEOUT_S)
    assert closed == ["abort"]


# -- heads that come again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["FP32", "INT64", "FP16", "BF16", "UINT8", "BOOL"])
def test_a_head_that_comes_again_is_read_as_the_first_time(dtype, monkeypatch):
    monkeypatch.setattr(protocol, "_KNOWN", {})
    array = array_from_raw(dtype, [2, 3], bytes([1, 0] * 24)[: 6 * protocol.np.dtype(direct_dtype(dtype)).itemsize], "")
    body, headers = encode_request({"a": array, "b": array}, outputs=("y",))
    length = headers["inference-header-content-length"].encode()
    for content, size in ((body, length), (b" " + body, b"%d" % (int(length) + 1))):  # aligned, and not
        first, binary = decode_request(content, size, "m", None, timeout_ms=b"1000")
        again, binary_again = decode_request(content, size, "m", "7", timeout_ms=b"2000")
        assert binary is binary_again is True
        assert (again.model_version, again.outputs, again.parameters) == ("7", first.outputs, first.parameters)
        assert again.deadline is not None
        assert again.deadline > first.deadline
        for name in ("a", "b"):
            assert again.inputs[name].dtype == first.inputs[name].dtype
            assert again.inputs[name].tobytes() == array.tobytes()
            assert again.inputs[name].shape == (2, 3)
            assert again.inputs[name].flags.aligned
    assert len(protocol._KNOWN) == (0 if dtype == "BOOL" else 2)
    with pytest.raises(BadRequestError, match="binary_data_size"):
        decode_request(body + b"x", length, "m", None)
    with pytest.raises(BadRequestError, match="binary_data_size"):
        decode_request(body[:-1], length, "m", None)


def direct_dtype(name: str):
    from mpdeploy.serve.dtypes import NUMPY_OF

    return NUMPY_OF[name]


def test_strangers_heads_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(protocol, "_KNOWN", {})
    for index in range(protocol.MAX_KNOWN_HEADS + 10):
        body, headers = encode_request({f"x{index}": np.zeros(1, np.float32)})
        decode_request(body, headers["inference-header-content-length"].encode(), "m", None)
    assert 0 < len(protocol._KNOWN) <= protocol.MAX_KNOWN_HEADS


# -- gRPC behind several processes -------------------------------------------------------------------------------------


def test_several_processes_share_the_grpc_port(run):
    pytest.importorskip("grpc_tools")

    async def open_twice(port: int, workers: int) -> None:
        doors = []
        try:
            for _ in range(2):
                options = ServerOptions(run=run, grpc_port=port, workers=workers)
                doors.append(await _start_grpc(SimpleNamespace(), options))
                port = doors[-1].port
        finally:
            for door in doors:
                await door.stop(0)
        assert [door.port for door in doors] == [port, port]

    with socket.socket() as probe:  # holds the port, and listens not
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        probe.bind(("127.0.0.1", 0))
        asyncio.run(open_twice(probe.getsockname()[1], 2))
    with pytest.raises(Exception, match="cannot be opened"):
        asyncio.run(open_twice(0, 1))


# -- who may take the short way ----------------------------------------------------------------------------------------


def at_the_door(url=b"/v2/models/m/infer", method=b"POST", version="1.1", alive=True, headers=(), cycle=None, **app):
    """What the door says to a request, and the bytes it then counts as held."""
    state = {"stopping": False, "inflight_bytes": 0, "authorised": True, "tracer": None} | app
    manager = SimpleNamespace(
        stopping=state["stopping"], serves=lambda name, number: name == "m" and number in (None, "1")
    )
    holder = SimpleNamespace(
        manager=manager,
        options=ServerOptions(run=Path("run"), max_body_bytes=1000, max_inflight_bytes=5000),
        inflight_bytes=state["inflight_bytes"],
        authorised=lambda headers: state["authorised"],
        tracer=state["tracer"],
        access_log=None,
    )
    connection = SimpleNamespace(
        url=url,
        headers=[(b"content-length", b"10"), *headers],
        cycle=cycle,
        flow=SimpleNamespace(write_paused=False),
        parser=SimpleNamespace(
            get_method=lambda: method, get_http_version=lambda: version, should_keep_alive=lambda: alive
        ),
    )
    door = direct.Door(holder)  # type: ignore[arg-type]
    found = [door.enter(connection) is not None for _ in range(2)]  # the second time from memory
    return found, holder.inflight_bytes - state["inflight_bytes"]


@pytest.mark.parametrize("url", [b"/v2/models/m/infer", b"/v2/models/m/versions/1/infer"])
def test_the_common_case_takes_the_short_way(url):
    assert at_the_door(url) == ([True, True], 20)


@pytest.mark.parametrize(
    "other",
    [
        {"url": b"/v2/models/other/infer"},
        {"url": b"/v2/models/m/versions/2/infer"},
        {"url": b"/v2/models/m/infer?x=1"},
        {"url": b"/v2/models/m/ready"},
        {"url": b"/v2/models/%6d/infer"},
        {"method": b"GET"},
        {"version": "1.0"},
        {"alive": False},
        {"headers": [(b"content-encoding", b"gzip")]},
        {"headers": [(b"expect", b"100-continue")]},
        {"headers": [(b"inference-header-content-length", b"0")]},
        {"headers": [(b"upgrade", b"websocket")]},
        {"headers": [(b"content-length", b"1001")]},
        {"cycle": SimpleNamespace(response_complete=False)},
        {"stopping": True},
        {"authorised": False},
        {"inflight_bytes": 4995},
        {"tracer": "a tracer"},
    ],
    ids=str,
)
def test_everything_else_takes_the_long_way(other):
    assert at_the_door(**other) == ([False, False], 0)


# -- heads that a connection has read before ---------------------------------------------------------------------------

HEADS = (
    b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n",
    b"POST /v2/models/m/infer HTTP/1.1\r\nContent-Length: %d\r\nx-request-timeout-ms: 60000\r\n\r\n",
    b"POST /v2/models/m/infer HTTP/1.1\r\ncontent-length: %d\r\nconnection: close\r\n\r\n",
    b"POST /v2/models/gone/infer HTTP/1.1\r\ncontent-length: %d\r\n\r\n",
    b"\r\nPOST /v2/models/m/infer HTTP/1.1\r\ncontent-length: %d\r\n\r\n",
    b"POST /v2/models/m/versions/2/infer HTTP/1.1\r\ncontent-length: %d\r\n\r\n",
)
LIVE = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"
BODIES = [b'{"inputs":[{"name":"x","datatype":"INT32","shape":[1],"data":[%d]}]}' % number for number in (1, 2, 33)]


class Wire:
    """A connection on a transport that keeps what is written; the model answers twice its input when it is told to."""

    def __init__(self, *, remember: bool, now: bool) -> None:
        from uvicorn import Config
        from uvicorn.server import ServerState

        manager = SimpleNamespace(
            stopping=False,
            serves=lambda name, number: name == "m",
            version=lambda name, number: SimpleNamespace(
                submit=self.submit,
                response=lambda request, outputs: InferResponse(name, number or "1", request.id, outputs),
            ),
        )
        options = ServerOptions(run=Path("run"))
        app = SimpleNamespace(
            manager=manager, options=options, inflight_bytes=0, tracer=None, access_log=None,
            authorised=lambda headers: True,
            error=lambda error: SimpleNamespace(status=error.status, headers=(), body=b"refused", close=False),
        )  # fmt: skip
        self.app, self.now, self.waiting, self.parsed = app, now, [], 0
        kind = type("Connection", (connection_class(),), {"limits": options, "door": direct.Door(app)})  # type: ignore[arg-type]
        self.connection = kind(
            config=Config(self.long_way, interface="asgi3", proxy_headers=False, log_config=None),
            server_state=ServerState(),
            app_state={},
        )
        self.written = b""
        self.closed = False
        self.connection.connection_made(
            SimpleNamespace(
                write=self.write, close=self.close, is_closing=lambda: self.closed, resume_reading=lambda: None,
                pause_reading=lambda: None, get_extra_info=lambda name, default=None: default,
                get_write_buffer_size=lambda: 0,
            )
        )  # fmt: skip
        feed = self.connection.parser
        self.connection.parser = SimpleNamespace(
            feed_data=self.feed, get_method=feed.get_method, get_http_version=feed.get_http_version,
            should_keep_alive=feed.should_keep_alive, should_upgrade=feed.should_upgrade,
        )  # fmt: skip
        self._feed, self.remember = feed.feed_data, remember

    async def long_way(self, scope, receive, send):
        size = 0
        while "gone" not in scope["path"]:  # whose answer does not wait for the body
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                break
        body = f"{scope['path']} {size}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    def submit(self, request, reply) -> None:
        self.waiting.append((reply, {"y": request.inputs["x"] * 2}))
        if self.now:
            self.answer()

    def answer(self) -> None:
        waiting, self.waiting = self.waiting, []
        for reply, outputs in waiting:
            reply.set_result(outputs)

    def feed(self, data: bytes) -> None:
        self.parsed += 1
        self._feed(data)

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    async def receive(self, chunk: bytes) -> None:
        if not self.closed:
            self.connection.data_received(chunk)
            if not self.remember:
                self.connection.seen = None
        for _ in range(8):
            await asyncio.sleep(0)

    def sum_up(self):
        connection = self.connection
        clocks = (
            connection.idle_since is None,
            connection.reading_since is None,
            connection.in_head,
            connection.head_bytes,
        )
        return self.written, self.closed, self.app.inflight_bytes, len(self.waiting), clocks


BLANK = b"\r\n" * (len(BODIES[0]) // 2 + 2) + b"\r" * (len(BODIES[0]) % 2)
"""As long as the body and the end of a head. A parser skips it between two requests."""
INNER = HEADS[0] % len(BODIES[0]) + BODIES[0]


@pytest.mark.parametrize(
    "chunks",
    [
        (
            INNER,
            HEADS[3] % (2 * len(INNER)),
            INNER,
            INNER,
            INNER,
        ),  # a body that looks like requests, answered before it comes
        (INNER, b"POST /v2/models/m/infer HTTP/1.1\r\nx: ", INNER, INNER),  # a head within a header
        (
            b"POST /v2/models/m/infer HTTP/1.1\r\nx: ",
            INNER.replace(b"/m/", b"/other/"),
            INNER.replace(b"/m/", b"/other/"),
        ),
        (HEADS[5] % len(BODIES[0]) + BODIES[0] + INNER, HEADS[5] % len(BODIES[0]) + BODIES[0]),
        (INNER, BLANK, b"\r\n\r\n" + BODIES[0], INNER),
        (INNER, BLANK, BLANK[: len(BLANK) - len(LIVE)] + LIVE, INNER),
        (INNER, BLANK, INNER, BLANK + INNER, INNER),
        (HEADS[0] % 0, b"\r\n\r\n", b"\r\n\r\n"),
    ],
    ids=["body", "header", "other", "two", "blank-body", "blank-get", "blank-between", "empty"],
)
def test_what_looks_like_a_head_that_was_seen_is_no_request_where_none_begins(chunks):
    assert asyncio.run(hear(chunks, now=True, remember=True)) == asyncio.run(hear(chunks, now=True, remember=False))


async def hear(chunks, *, now: bool, remember: bool):
    """What a connection has written and holds after each chunk; None: what waits is answered."""
    wire, found = Wire(remember=remember, now=now), []
    for chunk in chunks:
        if chunk is None:
            wire.answer()
        else:
            await wire.receive(chunk)
        found.append(wire.sum_up())
    return found


@st.composite
def conversations(draw):
    """Chunks as they may be read from one connection, and where what waits is answered (None)."""
    chunks: list[bytes | None] = [INNER] * draw(st.integers(0, 1))
    for _ in range(draw(st.integers(1, 7))):
        body = draw(st.sampled_from(BODIES))
        message = draw(st.sampled_from([HEADS[0]] * 8 + [*HEADS, HEADS[1]])) % len(body) + body
        if draw(st.integers(0, 9)) == 0:
            message = LIVE
        cuts = sorted(draw(st.lists(st.integers(1, len(message) - 1), max_size=2))) if draw(st.booleans()) else []
        pieces = [message[a:b] for a, b in itertools.pairwise([0, *cuts, len(message)]) if a < b]
        if draw(st.integers(0, 5)) == 0:
            pieces.insert(0, draw(st.sampled_from([BLANK, b"\r\n\r\n", b"\r\n"])))
        if chunks and chunks[-1] is not None and draw(st.integers(0, 4)) == 0:
            chunks[-1] += pieces.pop(0)
        chunks += pieces
        if draw(st.integers(0, 3)):
            chunks.append(None)
    return chunks


@given(conversations(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_whether_a_head_was_seen_before_cannot_be_told_from_the_answers(chunks, now):
    assert asyncio.run(hear(chunks, now=now, remember=True)) == asyncio.run(hear(chunks, now=now, remember=False))


def test_a_head_that_was_seen_is_not_parsed_again_and_its_body_is_its_own():
    async def main():
        wire, parsed = Wire(remember=True, now=True), []
        for body in (BODIES[0], BODIES[1], BODIES[2], BODIES[1], BODIES[0]):  # BODIES[2] is one byte longer
            await wire.receive(HEADS[0] % len(body) + body)
            parsed.append(wire.parsed)
        return parsed, wire.written

    parsed, written = asyncio.run(main())
    assert parsed == [1, 1, 2, 3, 3]
    assert [int(part[: part.index(b"]")]) for part in written.split(b'"data":[')[1:]] == [2, 4, 66, 4, 2]


def test_what_a_peer_does_not_fetch_counts_as_held():
    async def main():
        wire, found = Wire(remember=True, now=True), []
        connection, buffered = wire.connection, [1000]
        connection.transport.get_write_buffer_size = lambda: buffered[0]
        for step in (
            connection.pause_writing,
            lambda: connection.sweep(time.monotonic()),
            connection.resume_writing,
            connection.pause_writing,
            lambda: connection.connection_lost(OSError("reset")),
        ):
            step()
            found.append(wire.app.inflight_bytes)
            buffered[0] -= 100
        return found

    assert asyncio.run(main()) == [1000, 900, 0, 700, 0]


@pytest.mark.parametrize("what", ["stopping", "gone", "full", "unread"])
def test_what_has_changed_since_a_head_was_seen_counts(what):
    async def main():
        wire = Wire(remember=True, now=True)
        message = HEADS[0] % len(BODIES[0]) + BODIES[0]
        await wire.receive(message)
        if what == "stopping":
            wire.app.manager.stopping = True
        elif what == "gone":
            wire.app.manager.serves = lambda name, number: False
        elif what == "full":
            wire.app.inflight_bytes = wire.app.options.max_inflight_bytes
        else:
            wire.connection.pause_writing()
        await wire.receive(message)
        written = wire.written
        wire.connection.resume_writing()
        return wire.parsed, written

    parsed, written = asyncio.run(main())
    assert parsed == 2
    assert (b"/v2/models/m/infer %d" % len(BODIES[0]) in written) == (what != "unread"), (
        "the long way answers, when it is read"
    )


def test_a_head_of_any_length_is_not_kept():
    body = BODIES[0]
    head = b"POST /v2/models/m/infer HTTP/1.1\r\ncontent-length: %d\r\nx: %s\r\n\r\n"

    async def parsed(size: int) -> int:
        wire = Wire(remember=True, now=True)
        for _ in range(2):
            await wire.receive(head % (len(body), b"x" * size) + body)
        return wire.parsed

    assert [asyncio.run(parsed(size)) for size in (100, direct.MAX_SEEN)] == [1, 2]


# -- what a connection does not put up with ----------------------------------------------------------------------------

CHUNKED = b"POST /v2/models/m/infer HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"


def written_after(*chunks: bytes, late: bool = False) -> tuple[bytes, bool, list[tuple[bytes, bytes]]]:
    """What a connection has written after these chunks (and all time), whether it closed, and the headers it holds."""

    async def main():
        wire = Wire(remember=True, now=True)
        for chunk in chunks:
            await wire.receive(chunk)
        if late:
            wire.connection.sweep(time.monotonic() + 1e6)
        return wire.written, wire.closed, wire.connection.headers

    return asyncio.run(main())


def test_trailers_are_forgotten():
    written, closed, headers = written_after(CHUNKED, b"x: y\r\nexpect: 100-continue\r\n" * 1000 + b"\r\n")
    assert (written.count(b"HTTP/1.1 200"), closed) == (1, False)
    assert headers == [(b"transfer-encoding", b"chunked")]
    assert written_after(CHUNKED + b"x: y\r\n\r\n", INNER)[0].count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("piece", [b"x: y\r\n" * 200, b"y" * 1200], ids=["many", "long"])
def test_trailers_without_end_are_refused(piece):
    written, closed, _ = written_after(CHUNKED, b"x: ", *[piece] * 28)
    assert (written.count(b"HTTP/1.1 431"), closed) == (1, True)
    assert b"trailers are too large" in written


def test_a_body_in_many_chunks_is_not_too_large_for_a_head():
    chunk = b"%x\r\n%s\r\n" % (10_000, b"x" * 10_000)
    written, _, _ = written_after(CHUNKED[:-3], *[chunk] * 20, b"0\r\n\r\n")
    assert b"HTTP/1.1 200" in written
    assert b" 200003" in written


BEFORE = pytest.mark.parametrize("before", [(), (INNER,), (LIVE,)], ids=["first", "after-short-way", "after-long-way"])


@BEFORE
@pytest.mark.parametrize("lines", [b"x: " + b"y" * 40_000, b"x: y\r\n" * 300 + b"\r\n"], ids=["long", "many"])
def test_a_huge_head_is_refused_whatever_was_answered_before(before, lines):
    written, closed, _ = written_after(*before, b"GET / HTTP/1.1\r\n" + lines)
    assert (written.count(b"HTTP/1.1 200"), written.count(b"HTTP/1.1 431"), closed) == (len(before), 1, True)


@BEFORE
@pytest.mark.parametrize("late", [b"POST /v2/models/m/infer HTTP/1.1\r\n", INNER[:-1], CHUNKED])
def test_a_late_request_is_told_so_whatever_was_answered_before(before, late):
    written, closed, _ = written_after(*before, late, late=True)
    assert (written.count(b"HTTP/1.1 200"), written.count(b"HTTP/1.1 408"), closed) == (len(before), 1, True)


def test_a_body_that_comes_late_for_an_answer_is_not_answered_twice():
    written, closed, _ = written_after(HEADS[3] % 100, late=True)
    assert (written.count(b"HTTP/1.1"), closed) == (1, True)


# -- who would rather speak HTTP/2 -------------------------------------------------------------------------------------

UPGRADE = b"POST /v2/models/%s/infer HTTP/1.1\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMA\r\n"


@pytest.mark.parametrize("model", [b"m", b"other"], ids=["short-way", "long-way"])
@pytest.mark.parametrize("cut", [None, -len(BODIES[0]), -5, 50], ids=["one", "head-body", "in-body", "in-head"])
def test_a_request_for_another_protocol_is_answered_once_with_its_body(model, cut):
    content = UPGRADE % model + b"content-length: %d\r\n\r\n%s" % (len(BODIES[0]), BODIES[0])
    pieces = [content] if cut is None else [content[:cut], content[cut:]]
    written, closed, _ = written_after(*pieces, *pieces, INNER + content + LIVE)
    assert (written.count(b"HTTP/1.1 200"), written.count(b"HTTP/1.1"), closed) == (5, 5, False)
    assert written.count(b'"data":[2]') + written.count(b"/other/infer %d" % len(BODIES[0])) == 4


def test_a_chunked_request_for_another_protocol_is_answered_too():
    content = UPGRADE % b"m" + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    assert written_after(content, LIVE)[0].count(b"HTTP/1.1 200") == 2
    assert b"/infer 3" in written_after(content)[0]


def test_a_huge_head_that_asks_for_another_protocol_is_refused():
    written, closed, _ = written_after(UPGRADE % b"m" + b"x: y\r\n" * 300 + b"content-length: 3\r\n\r\nabc")
    assert (written.count(b"HTTP/1.1 431"), written.count(b"HTTP/1.1"), closed) == (1, 1, True)
