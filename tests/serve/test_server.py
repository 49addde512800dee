"""`mpdeploy serve` in a process of its own: what it answers, whom it cuts off, how it reloads and how it ends."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from served import (
    Served,
    checksum_model,
    decode_answer,
    infer,
    make_run,
    mlp_model,
    serving,
    table_model,
    wait_for,
)

from mpdeploy.serve.metrics import model_key
from mpdeploy.serve.protocol import encode_request


def x(seed: int, rows: int = 1, width: int = 16):
    return {"x": np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "sums", checksum_model(), name="sums")


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    """One server for all tests that leave it as it was."""
    log = tmp_path_factory.mktemp("log") / "access.jsonl"
    arguments = ("--access-log", log, "--max-body-mb", 1, "--max-inflight-mb", 8, "--read-only")
    with serving(run, *arguments) as served:
        served.access_log = log  # type: ignore[attr-defined]
        yield served


def test_what_it_prints_when_it_is_ready(server, run):
    document = server.document
    assert (document["model"], document["engine"], document["verdict"]) == ("sums", "onnxruntime", "pass")
    assert document["run"] == str(run)
    assert document["url"].startswith("http://127.0.0.1:")


@pytest.mark.parametrize("binary", [True, False])
def test_it_answers(server, binary):
    feed = x(1, rows=3)
    status, outputs = server.infer(feed, binary=binary)
    assert status == 200
    np.testing.assert_array_equal(outputs["y"], feed["x"] * 2)
    np.testing.assert_allclose(outputs["total"], feed["x"].sum(axis=1), rtol=1e-5)


def test_the_protocol_s_other_endpoints(server):
    assert server.get("/v2")["name"] == "mpdeploy"
    assert server.get("/v2/health/live") == server.get("/v2/health/ready") == server.get(f"{server.path}/ready") == b""
    metadata = server.get(f"{server.path}/versions/1")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}]
    assert metadata["parameters"]["verdict"] == "pass"
    assert server.get(f"{server.path}/config")["max_batch_size"] == 32
    before = server.get(f"{server.path}/stats")["model_stats"][0]["inference_count"]
    server.infer(x(1, rows=4))
    assert server.get("/v2/models/stats")["model_stats"][0]["inference_count"] == before + 4
    status, _, body = server.call("POST", "/v2/repository/index", {})
    assert (status, json.loads(body)[0]["state"]) == (200, "READY")
    metrics = server.get("/metrics").decode()
    assert f'nv_inference_count{{model="sums",version="1"}} {before + 4}.0' in metrics
    assert "# TYPE nv_inference_request_success counter" in metrics


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", None, 404),
        ("GET", "/v2/models/none", None, 404),
        ("GET", "/v2/models/sums/versions/9", None, 404),
        ("GET", "/v2/models/sums/nothing", None, 404),
        ("POST", "/v2/models/none/infer", {"inputs": []}, 404),
        ("GET", "/v2/models/sums/infer", None, 405),
        ("POST", "/v2", {}, 405),
        ("POST", "/v2/models/sums/infer", {}, 400),
        ("POST", "/v2/models/sums/infer", b"\x00garbage\xff", 400),
        ("POST", "/v2/models/sums/infer", {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}, 400),
        ("POST", "/v2/models/sums/infer", {"inputs": [{"name": "x", "datatype": "FP64", "shape": [1, 16], "data": [1] * 16}]}, 400),
        ("POST", "/v2/repository/index", b"[]", 400),
        ("POST", "/v2/repository/models/sums/load", {}, 400),
        ("POST", "/v2/repository/models/sums/unload", {}, 400),
    ],
)  # fmt: skip
def test_what_it_cannot_answer_gets_a_status_and_a_reason(server, method, path, body, status):
    found, headers, content = server.call(method, path, body)
    assert found == status
    assert headers["content-type"] == "application/json"
    assert json.loads(content)["error"]


def test_a_compressed_body_is_unpacked_up_to_the_limit(server):
    body, headers = encode_request(x(1))
    status, _, _ = server.call(
        "POST", f"{server.path}/infer", gzip.compress(body), {**headers, "content-encoding": "gzip"}
    )
    assert status == 200
    bomb = gzip.compress(b" " * 50_000_000)
    status, _, content = server.call("POST", f"{server.path}/infer", bomb, {"content-encoding": "gzip"})
    assert (status, "unpacked" in json.loads(content)["error"]) == (413, True)
    assert server.call("POST", f"{server.path}/infer", b"no gzip", {"content-encoding": "gzip"})[0] == 400


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_body_is_refused_where_some_of_it_would_be_lost(server, encoding):
    body, headers = encode_request(x(1), binary=False)
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    whole = pack(body)
    for content, status in (
        (whole, 200),
        (whole[:-1], 400),  # the checksum is not complete
        (whole[:-8] + b"\0" * 8, 400),
        (pack(body + b" ") + pack(b"more"), 400),
        (b"", 400),
    ):
        found, _, answer = server.call(
            "POST", f"{server.path}/infer", content, {**headers, "content-encoding": encoding}
        )
        assert found == status, (len(content), answer)


def test_a_body_without_json_is_the_input(server):
    sent = x(1, rows=3)["x"]
    headers = {"inference-header-content-length": "0"}
    status, got, content = server.call("POST", f"{server.path}/infer", sent.tobytes(), headers)
    assert status == 200, content
    outputs = decode_answer(content, got["inference-header-content-length"])
    np.testing.assert_array_equal(outputs["y"], sent * 2)
    status, _, content = server.call("POST", f"{server.path}/infer", sent.tobytes()[:-1], headers)
    assert (status, b"input 'x'" in content) == (400, True), content


def raw(server, content: bytes, *, until: float = 20) -> bytes:
    """What the server answers to bytes, until it closes."""
    with socket.create_connection((server.host, server.port), timeout=until) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(content)
        answer = b""
        with contextlib.suppress(OSError):
            while part := connection.recv(65536):
                answer += part
        return answer


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server):
    head = b"POST /v2/models/sums/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n"
    assert raw(server, head + b"x" * 1000).startswith(b"HTTP/1.1 413")
    status, _, _ = server.call("POST", f"{server.path}/infer", b"x" * 3_000_000)
    assert status == 413
    chunk = b"%x\r\n%s\r\n" % (100_000, b"x" * 100_000)
    head = b"POST /v2/models/sums/infer HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    assert raw(server, head + chunk * 30).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\x01\x02garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v2/models/sums/infer HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /v2/models/sums/infer HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
    ],
)
def test_garbage_bytes_are_refused(server, content):
    assert raw(server, content).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "content",
    [
        b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000,
        b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"y" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(5000)) + b"\r\n",
    ],
)
def test_a_huge_head_is_refused(server, content):
    assert raw(server, content).startswith(b"HTTP/1.1 431")
    assert server.infer(x(1))[0] == 200


def test_the_access_log_has_a_line_a_request(server):
    server.call("GET", "/v2/health/live?from=test")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        lines = server.access_log.read_text().splitlines() if server.access_log.exists() else []
        found = [json.loads(line) for line in lines if "health/live" in line]
        if found:
            break
        time.sleep(0.1)
    assert found[-1]["status"] == 200
    assert {"time", "client", "method", "path", "bytes_in", "bytes_out", "ms"} <= set(found[-1])


def test_tritonclient_is_content(server):
    tritonclient = pytest.importorskip("tritonclient.http")
    feed = x(3, rows=2)["x"]
    with contextlib.closing(tritonclient.InferenceServerClient(f"{server.host}:{server.port}")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("sums")
        assert not client.is_model_ready("none")
        for binary in (True, False):
            given = tritonclient.InferInput("x", list(feed.shape), "FP32")
            given.set_data_from_numpy(feed, binary_data=binary)
            wanted = [tritonclient.InferRequestedOutput(name, binary_data=not binary) for name in ("total", "y")]
            result = client.infer("sums", [given], outputs=wanted, request_id="7", timeout=5_000_000)
            np.testing.assert_array_equal(result.as_numpy("y"), feed * 2)
            assert result.get_response()["id"] == "7"
        compressed = client.infer("sums", [given], request_compression_algorithm="gzip")
        np.testing.assert_array_equal(compressed.as_numpy("y"), feed * 2)
        assert client.get_model_metadata("sums")["platform"] == "onnxruntime_onnx"
        assert client.get_model_config("sums")["input"][0]["data_type"] == "TYPE_FP32"
        assert client.get_inference_statistics("sums")["model_stats"][0]["inference_stats"]["success"]["count"] > 0
        assert client.get_model_repository_index()[0]["name"] == "sums"
        with pytest.raises(Exception, match="no model"):
            client.get_model_metadata("none")


# -- servers of their own ----------------------------------------------------------------------------------------------


def hammer(served, stop: threading.Event, seed: int, width: int = 16) -> tuple[int, list[str]]:
    """Ask until told to stop; every answer must be that of its own request. Requests answered, and what went wrong."""
    count, wrong = 0, []
    connection = served.connect()
    while not stop.is_set():
        feed = x(seed * 100_000 + count, rows=1 + count % 3, width=width)
        try:
            status, outputs = infer(connection, served.path, feed)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            connection = served.connect()
            wrong.append(f"{type(error).__name__}: {error}")
            continue
        if status != 200:
            wrong.append(f"{status}: {outputs}")
        elif not np.allclose(outputs["total"], feed["x"].sum(axis=1), rtol=1e-4, atol=1e-4):
            wrong.append("another request's answer")
        count += 1
    connection.close()
    return count, wrong


@contextlib.contextmanager
def hammering(served: Served, count: int) -> Iterator[list[Future[tuple[int, list[str]]]]]:
    """So many that `hammer` it until the block ends; what they found is there then."""
    stop = threading.Event()
    with ThreadPoolExecutor(count) as pool:
        try:
            yield [pool.submit(hammer, served, stop, seed) for seed in range(count)]
        finally:
            stop.set()


def success(served: Served) -> float:
    """Requests that were answered, by all versions and processes."""
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in served.get("/metrics").decode().splitlines()
        if line.startswith("nv_inference_request_success{")
    )


def test_a_new_version_takes_over_under_load_without_a_failed_request(tmp_path, run):
    root = tmp_path / "runs"
    root.mkdir()
    shutil.copytree(run, root / "first")
    make_run(root / "second", checksum_model(), name="sums")
    make_run(root / "broken", checksum_model(), name="sums", limits={"onnxruntime": -1.0})
    with serving(root / "first", "--repository", root) as served:
        load = f"/v2/repository/models/{served.model}/load"
        with hammering(served, 3) as hammers:
            wait_for(lambda: success(served) > 20)
            status, _, content = served.call("POST", load, {"parameters": {"run": "broken"}})
            assert (status, "fail" in json.loads(content)["error"]) == (503, True)  # and version 1 serves on
            assert served.get(f"{served.path}/versions/1/ready") == b""
            assert served.call("POST", load, {"parameters": {"run": "second"}})[0] == 200
            assert served.get(served.path)["versions"] == ["2"]
            assert served.call("GET", f"{served.path}/versions/1")[0] == 404
            before = success(served)
            wait_for(lambda: success(served) > before + 20)
        results = [each.result() for each in hammers]
        assert [wrong for _, wrong in results] == [[], [], []]
        assert success(served) == sum(count for count, _ in results)  # those of version 1 are still counted
        for name, status in (("../first", 404), ("nowhere", 404), (7, 400)):
            assert served.call("POST", load, {"parameters": {"run": name}})[0] == status
        assert served.call("POST", "/v2/repository/models/first/load", {})[0] == 200
        assert served.call("POST", "/v2/repository/models/first/unload", {})[0] == 200
        states = {item["name"]: item["state"] for item in json.loads(served.call("POST", "/v2/repository/index")[2])}
        assert states == {"sums": "READY", "first": "UNAVAILABLE", "second": "UNAVAILABLE", "broken": "UNAVAILABLE"}
        # SIGHUP: the run that is served has changed on disk
        shutil.rmtree(root / "second")
        make_run(root / "second", mlp_model((16, 4)), name="sums")
        served.process.send_signal(signal.SIGHUP)
        wait_for(lambda: served.get(served.path)["versions"] == ["3"])
        assert [output["name"] for output in served.get(served.path)["outputs"]] == ["y"]


def test_it_answers_while_it_drains(tmp_path, run):
    with serving(run, "--drain-s", 300, folder=tmp_path) as served:
        with hammering(served, 1) as hammers:
            wait_for(lambda: success(served))
            served.process.send_signal(signal.SIGTERM)
            wait_for(lambda: served.call("GET", "/v2/health/ready")[0] == 503)  # no more requests, please
            assert served.call("GET", "/v2/health/live")[0] == 200
            assert served.infer(x(1))[0] == 200  # whoever asks all the same is answered
        assert hammers[0].result()[1] == []
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 1  # that cuts the draining short


def test_what_is_in_flight_at_the_end_is_answered(tmp_path, run):
    with (
        serving(run, "--drain-s", 0.2, "--delay-ms", 1000, folder=tmp_path) as served,
        contextlib.closing(served.connect()) as connection,
    ):
        assert infer(connection, served.path, x(1, rows=32))[0] == 200  # full, so at once; the connection is open now
        body, headers = encode_request(x(2))
        connection.request("POST", f"{served.path}/infer", body, headers)
        served.process.send_signal(signal.SIGTERM)
        assert connection.getresponse().status == 200
        assert served.process.wait(30) == 0
        assert "every request was answered" in served.log.read_text()


def test_slow_peers_are_cut_off_and_the_others_are_not(tmp_path, run, monkeypatch):
    with serving(run, "--header-timeout-s", 3, "--body-timeout-s", 3, folder=tmp_path) as served:
        begin = time.monotonic()
        silent = socket.create_connection((served.host, served.port), timeout=20)
        drip = socket.create_connection((served.host, served.port), timeout=20)
        drip.sendall(b"POST /v2/models/sums/infer HTTP/1.1\r\nhost: x\r\n")
        body = socket.create_connection((served.host, served.port), timeout=20)
        body.sendall(b"POST /v2/models/sums/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\nabc")
        assert served.infer(x(1))[0] == 200
        for connection in (silent, drip, body):
            answer = b""
            with contextlib.suppress(OSError):
                while part := connection.recv(4096):
                    answer += part
            if connection is silent:  # a browser opens some in advance, and would show the 408 for its next request
                assert answer == b""
            else:
                assert answer.startswith(b"HTTP/1.1 408"), answer
            connection.close()
        assert time.monotonic() - begin < 15
        assert (
            served.get("/metrics").decode().count("mpdeploy_inflight_bytes 0.0") == 1
        )  # what they held was given back


@pytest.mark.slow
def test_a_process_that_is_killed_is_replaced_and_counts_stay(tmp_path, run):
    key = model_key("sums", "1", "success")

    def shared() -> float:
        """What the processes have told each other: one that is killed loses the rest."""
        found = tmp_path.glob("mpdeploy-serve-*/counts-*.json")
        return sum(json.loads(path.read_text()).get(key, 0) for path in found)

    env = {"TMPDIR": str(tmp_path)}
    with serving(run, "--workers", 2, "--stop-s", 10, folder=tmp_path, env=env) as served:
        for seed in range(10):
            assert served.infer(x(seed))[0] == 200
        assert success(served) <= 10
        wait_for(lambda: shared() == 10)
        assert success(served) == 10
        victim, _ = served.document["processes"]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: "killed by signal 9" in served.log.read_text())
        for seed in range(10):  # the other one answers meanwhile
            assert served.infer(x(seed))[0] == 200
        wait_for(lambda: served.log.read_text().count(" serves: engine") == 3)
        wait_for(lambda: "mpdeploy_processes 2.0" in served.get("/metrics").decode())
        wait_for(lambda: shared() == 20)
        assert success(served) == 20


def test_a_token_opens_everything_but_probes_need_none(tmp_path, run):
    token = tmp_path / "token"
    token.write_text("correct horse battery\n")
    with serving(run, "--token-file", token, folder=tmp_path) as served:
        good = {"authorization": "Bearer correct horse battery"}
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/sums/ready", "/"):
            assert served.call("GET", path)[0] == 200
        for path in ("/v2", "/metrics", "/figures", "/v2/models/sums", "//", "/v2/models/sums/infer/ready"):
            assert served.call("GET", path)[0] == 401, path
            assert served.call("GET", path, headers={"authorization": "Bearer wrong"})[0] == 401
        for path in ("/v2/models/guess/ready", "/v2/models/sums/versions/7/ready"):
            for shown in ({}, {"authorization": "Bearer wrong"}):
                status, _, said = served.call("GET", path, headers=shown)
                assert (status, json.loads(said)) == (404, {"error": "there is no such model"})
            status, _, said = served.call("GET", path, headers=good)
            assert (status, b"sums" in said) == (404, True), said
        status, headers, _ = served.call("POST", "/v2/models/sums/infer", b"{}")
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert served.infer(x(1), binary=True)[0] == 401
        with contextlib.closing(served.connect()) as connection:
            assert infer(connection, served.path, x(1), headers=good)[0] == 200
        assert "correct horse" not in served.log.read_text()


@pytest.mark.slow
def test_overload_is_refused_at_once_and_what_is_accepted_is_answered(tmp_path):
    run = make_run(tmp_path / "run", mlp_model((256, 2000, 2000, 8)), batches=(1, 1, 2), name="slow")
    with serving(run, "--max-queue", 4, "--deadline-s", 2, folder=tmp_path) as served, ThreadPoolExecutor(24) as pool:
        feeds = [x(seed, width=256) for seed in range(24)]
        alone = [served.infer(feed)[1]["y"] for feed in feeds[:4]]
        # the first of each of them are all there before the server looks
        served.process.send_signal(signal.SIGSTOP)
        sent = threading.Barrier(24, lambda: served.process.send_signal(signal.SIGCONT), timeout=60)

        def ask(index: int) -> list[int]:
            statuses = []
            with contextlib.closing(served.connect()) as connection:
                for turn in range(6):
                    body, headers = encode_request(feeds[index])
                    connection.request("POST", f"{served.path}/infer", body, headers)
                    if not turn:
                        sent.wait()
                    response = connection.getresponse()
                    content = response.read()
                    statuses.append(response.status)
                    if response.status == 200 and index < 4:
                        length = int(response.getheader("inference-header-content-length", ""))
                        answer = np.frombuffer(content[length:], np.float32)
                        np.testing.assert_allclose(answer, alone[index].ravel(), rtol=1e-3, atol=1e-4)
                    elif response.status == 503:
                        assert int(response.getheader("retry-after", "")) >= 1
            return statuses

        statuses = [status for found in pool.map(ask, range(24)) for status in found]
        assert set(statuses) <= {200, 503, 504}
        assert statuses.count(200) > 5
        assert statuses.count(503) > 5
        wait_for(lambda: served.get("/figures")["models"]["slow"]["pending"] == 0)
        assert served.infer(feeds[0])[0] == 200


def test_a_client_that_has_gone_is_not_computed(tmp_path, run):
    with serving(run, "--delay-ms", 600_000, folder=tmp_path) as served:  # the engine waits for a full batch
        body, headers = encode_request(x(1))
        lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
        content = (
            f"POST {served.path}/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{lines}\r\n".encode()
            + body
        )
        for _ in range(20):
            with socket.create_connection((served.host, served.port), timeout=20) as connection:
                connection.sendall(content)
        wait_for(lambda: served.get("/figures")["models"]["sums"]["failures"].get("CANCELED") == 20)
        assert served.infer(x(2, rows=32))[0] == 200  # full by itself
        model = served.get("/figures")["models"]["sums"]
        assert model["pending"] == 0
        assert model["statistics"]["inference_count"] == 32


@pytest.mark.slow
def test_a_poisoned_request_among_good_ones(tmp_path):
    run = make_run(tmp_path / "run", table_model(rows=10), name="table")
    table = np.arange(30, dtype=np.float32).reshape(10, 3)
    with serving(run, folder=tmp_path) as served, ThreadPoolExecutor(8) as pool:

        def ask(index: int) -> bool:
            ids = np.array([[index % 10, 99 if index % 10 == 7 else 1]], np.int64)
            status, outputs = served.infer({"ids": ids})
            if index % 10 == 7:
                return status == 500 and "could not compute" in outputs
            return status == 200 and bool(np.array_equal(outputs["y"], table[ids]))

        assert all(pool.map(ask, range(100)))


@pytest.fixture
def certificate(tmp_path) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.mark.slow
def test_tls(tmp_path, run, certificate):
    cert, key = certificate
    with serving(run, "--tls-cert", cert, "--tls-key", key, folder=tmp_path) as served:
        assert served.document["url"].startswith("https://")
        context = ssl.create_default_context(cafile=cert)
        with contextlib.closing(http.client.HTTPSConnection(served.host, served.port, context=context)) as connection:
            assert infer(connection, served.path, x(1))[0] == 200


@pytest.mark.slow
def test_a_peer_that_begins_no_tls_is_cut_off(tmp_path, run, certificate):
    cert, key = certificate
    with (
        serving(run, "--tls-cert", cert, "--tls-key", key, "--header-timeout-s", 1, folder=tmp_path) as served,
        socket.create_connection((served.host, served.port), timeout=40) as silent,  # 60 s is what asyncio allows
        contextlib.suppress(ConnectionResetError),
    ):
        assert silent.recv(1) == b""
