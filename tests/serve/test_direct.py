"""The short way of inference requests: what takes it, what does not, and that nobody can tell from the answers."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from served import checksum_model, decode_answer, infer, make_run, mlp_model, serving

from mpdeploy.serve import direct, protocol
from mpdeploy.serve.connection import READ_TIMEOUT_S, connection_class
from mpdeploy.serve.dtypes import array_from_raw
from mpdeploy.serve.messages import BadRequestError
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
    deadline = time.monotonic() + 10
    while "mpdeploy_inflight_bytes 0.0" not in server.get("/metrics").decode():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.infer(x(1))[0] == 200


def test_a_second_signal_ends_it_at_once(tmp_path):
    run = make_run(tmp_path / "run", mlp_model((16, 4)), name="small")
    with serving(run, "--drain-s", 60) as served, socket.create_connection((served.host, served.port), timeout=20):
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        begin = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(20)
        assert time.monotonic() - begin < 10  # without it: the 60 seconds of --drain-s


def test_a_run_that_changes_is_loaded_by_itself_with_watch(tmp_path):
    run = make_run(tmp_path / "run", mlp_model((16, 4)), name="small")
    with serving(run, "--watch") as served:
        make_run(tmp_path / "next", mlp_model((16, 4), scale=2.0), name="small")
        run.rename(tmp_path / "old")
        (tmp_path / "next").rename(run)
        deadline = time.monotonic() + 30
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
    closed = []
    found.transport = SimpleNamespace(close=lambda: closed.append("close"), abort=lambda: closed.append("abort"))
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def open_twice(workers: int) -> None:
        options = ServerOptions(run=run, grpc_port=port, workers=workers)
        doors = []
        try:
            doors = [await _start_grpc(SimpleNamespace(), options)]
            doors.append(await _start_grpc(SimpleNamespace(), options))
        finally:
            for door in doors:
                await door.stop(0)

    asyncio.run(open_twice(2))
    with pytest.raises(Exception, match="cannot be opened"):
        asyncio.run(open_twice(1))


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
