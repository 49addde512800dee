"""Counters, metrics, logs, traces and what processes share: sums that are right, and names that dashboards know."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import numpy as np
import pytest
from served import infer, make_run, mlp_model, serving, wait_for

from mpdeploy.errors import UsageError
from mpdeploy.serve.logs import AccessLog, JsonFormatter
from mpdeploy.serve.messages import UnavailableServeError
from mpdeploy.serve.metrics import exposition, model_key
from mpdeploy.serve.options import ModelOptions, ServerOptions
from mpdeploy.serve.shared import Shared
from mpdeploy.serve.statistics import Statistics, triton_statistics


def filled() -> Statistics:
    statistics = Statistics()
    statistics.ran(5, 8, 2, input_ns=10, infer_ns=1000, output_ns=20)
    statistics.answered(3_000_000)
    statistics.answered(30_000_000)
    statistics.failed("REJECTED", 7)
    return statistics


def counts_of(statistics: Statistics) -> dict[str, float]:
    return {model_key("m", "1", key): value for key, value in statistics.to_flat().items()} | {
        model_key("m", "1", "gauge/pending"): 3
    }


def test_statistics_have_triton_s_shape():
    found = triton_statistics("m", "1", filled().to_flat())
    assert (found["inference_count"], found["execution_count"]) == (5, 1)
    stats = found["inference_stats"]
    assert stats["success"] == {"count": 2, "ns": 33_000_000}
    assert stats["fail"] == {"count": 1, "ns": 7}
    assert stats["compute_infer"] == {"count": 2, "ns": 2000}  # each request waited for all of it
    assert found["batch_stats"][0]["batch_size"] == 8
    assert found["batch_stats"][0]["compute_infer"] == {"count": 1, "ns": 1000}


def test_metrics_have_triton_s_names():
    text = exposition(counts_of(filled()), [])[1].decode()
    for line in (
        'nv_inference_request_success{model="m",version="1"} 2.0',
        'nv_inference_request_failure{model="m",reason="REJECTED",version="1"} 1.0',
        'nv_inference_count{model="m",version="1"} 5.0',
        'nv_inference_exec_count{model="m",version="1"} 1.0',
        'nv_inference_request_duration_us{model="m",version="1"} 33000.0',
        'nv_inference_compute_infer_duration_us{model="m",version="1"} 2.0',
        'nv_inference_pending_request_count{model="m",version="1"} 3.0',
        'mpdeploy_padded_samples_total{model="m",version="1"} 3.0',
        'mpdeploy_request_duration_seconds_bucket{le="0.005",model="m",version="1"} 1.0',
        'mpdeploy_request_duration_seconds_bucket{le="+Inf",model="m",version="1"} 2.0',
        'mpdeploy_request_duration_seconds_count{model="m",version="1"} 2.0',
        "# TYPE nv_inference_request_success counter",
    ):
        assert line in text.splitlines(), line


def test_metrics_are_read_by_prometheus_own_parser():
    from prometheus_client.parser import text_string_to_metric_families

    families = {
        family.name: family
        for family in text_string_to_metric_families(exposition(counts_of(filled()), [])[1].decode())
    }
    assert families["nv_inference_request_success"].type == "counter"
    assert families["mpdeploy_request_duration_seconds"].type == "histogram"


def test_percentiles_are_of_the_latest_requests():
    statistics = Statistics()
    assert statistics.percentiles_ms()["p50"] is None
    for index in range(100):
        statistics.answered(index * 1_000_000)
    assert statistics.percentiles_ms() == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_counts_of_all_processes_are_summed_and_those_of_dead_ones_stay(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    counts = {"model/m/1/success": 5, "gauge/model/m/1/pending": 2, "gauge/max/model/m/1/x": 9}
    try:
        for pid in (child.pid, dead.pid):
            (tmp_path / f"counts-{pid}.json").write_text(json.dumps(counts))
        own = {"model/m/1/success": 1, "gauge/model/m/1/pending": 1, "gauge/max/model/m/1/x": 4}
        shared = Shared(tmp_path)
        shared.write_counts(own)
        assert shared.sum_counts(own) == {
            "model/m/1/success": 11,
            "gauge/model/m/1/pending": 3,
            "gauge/max/model/m/1/x": 9,
        }
    finally:
        child.kill()
        child.wait()


def test_one_load_at_a_time_across_processes(tmp_path):
    first, second = Shared(tmp_path), Shared(tmp_path)
    with first.changing():
        assert first.publish({"m": {"run": "a", "version": 1}}).generation == 1
        with pytest.raises(UnavailableServeError), second.changing():
            pass
    with second.changing():
        assert second.publish({}).generation == 2
    assert first.wanted().generation == 2


def test_a_log_record_is_one_line_of_json():
    record = logging.LogRecord("mpdeploy.serve", logging.ERROR, "f", 1, "two\nlines of %s", ("ä",), None)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "two\nlines of ä"
    assert json.loads(line)["level"] == "error"


def test_a_log_of_json_is_nothing_but_json_from_start_to_end(tmp_path):
    """Without --json, and no terminal: what collects a container's log sees all of this."""
    run = make_run(tmp_path / "run", mlp_model((16, 4)), name="small")
    with subprocess.Popen(
        [sys.executable, "-m", "mpdeploy", "serve", str(run), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        lines = []
        while "listening: http://127.0.0.1:" not in (line := server.stdout.readline()):
            assert line, lines
            lines.append(line)
        server.send_signal(signal.SIGTERM)
        lines += [line, *server.stdout]
    assert server.returncode == 0
    messages = [json.loads(line)["message"] for line in lines]
    assert messages[0].startswith("small 1 serves")
    assert messages[-1].startswith("ended")


def test_the_access_log_loses_lines_rather_than_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("mpdeploy.serve.logs.MAX_WAITING", 3)
    log = AccessLog(str(tmp_path / "log"))
    scope = {"client": ("1.2.3.4", 5), "method": "GET", "path": '/"\n'}
    for _ in range(5):
        log.add(scope, 200, 1, 2, 0.5)
    log.flush()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert len(lines) == 4
    assert lines[0]["path"] == '/"\n'
    assert lines[-1]["lost_lines"] == 2


def test_a_span_is_a_child_of_the_client_s():
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from mpdeploy.serve.tracing import Tracer

    exporter = export.InMemorySpanExporter()
    tracer = Tracer("", exporter=exporter)
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with tracer.request("m", [(b"traceparent", f"00-{trace}-{parent}-01".encode()), (b"x", b"y")]):
        pass
    tracer.close()
    (span,) = exporter.get_finished_spans()
    assert format(span.context.trace_id, "032x") == trace
    assert format(span.parent.span_id, "016x") == parent
    assert span.attributes["mpdeploy.model"] == "m"


class Collector(BaseHTTPRequestHandler):
    """Takes spans, or never answers."""

    hangs = False
    bodies: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.bodies.append(gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
        if self.hangs:
            time.sleep(60)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *values: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def collecting(*, hangs: bool):
    handler = type("Handler", (Collector,), {"hangs": hangs, "bodies": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as collector:
        collector.daemon_threads, collector.block_on_close = True, False
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{collector.server_port}/v1/traces", handler.bodies
        collector.shutdown()


def test_every_request_has_its_span_at_the_collector(tmp_path):
    messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    run = make_run(tmp_path / "run", mlp_model((16, 4)), name="small")
    with collecting(hangs=False) as (url, bodies):

        def collected() -> list[Any]:
            sent = [messages.ExportTraceServiceRequest.FromString(body) for body in bodies]
            return [
                span
                for each in sent
                for resource in each.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            ]

        often = {"OTEL_BSP_SCHEDULE_DELAY": "200"}  # ms
        with serving(run, "--otlp-endpoint", url, env=often) as served:
            with contextlib.closing(served.connect()) as connection:
                for index in range(200):
                    shape = (1, 16 if index % 10 else 5)
                    infer(connection, served.path, {"x": np.zeros(shape, np.float32)})
            wait_for(
                lambda: len(collected()) >= 200
            )  # before the end, which does not wait for a collector that is late
        spans = collected()
    assert {span.name for span in spans} == {"infer small"}
    assert [len(spans), sum(span.status.code == 2 for span in spans)] == [200, 20], "those with an error say so"


@pytest.mark.parametrize("kind", ["hangs", "gone"])
def test_a_collector_that_takes_nothing_holds_up_neither_requests_nor_the_end(tmp_path, kind):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    run = make_run(tmp_path / "run", mlp_model((16, 4)), name="small")
    with collecting(hangs=True) as (url, _):
        if kind == "gone":
            url = "http://127.0.0.1:9/v1/traces"
        with serving(run, "--otlp-endpoint", url, "--drain-s", 0) as served:
            with contextlib.closing(served.connect()) as connection:
                for _ in range(50):
                    assert infer(connection, served.path, {"x": np.zeros((1, 16), np.float32)})[0] == 200
            time.sleep(6)  # the exporter sends every five seconds
            begin = time.monotonic()
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(40) == 0
            assert time.monotonic() - begin < 15  # OpenTelemetry alone: 30 seconds
            said = [json.loads(line)["message"] for line in served.log.read_text().splitlines()]
            if kind == "hangs":
                assert any("took none" in message for message in said)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: ServerOptions(run, port=70000), "no port"),
        (lambda run: ServerOptions(run, name="a/b"), "no model name"),
        (lambda run: ServerOptions(run, workers=0), "--workers 0"),
        (lambda run: ServerOptions(run, workers=2, devices=("0",)), "one process a device"),
        (lambda run: ServerOptions(run, tls_cert=run), "both"),
        (lambda run: ServerOptions(run, token="short"), "shorter than 8"),
        (lambda run: ServerOptions(run, max_inflight_bytes=1), "smaller than"),
        (lambda run: ModelOptions(shadow_rate=1.5), "between 0 and 1"),
        (lambda run: ModelOptions(deadline_s=0), "must be above 0"),
        (lambda run: ModelOptions(delay_ms=-1), "0 is the least"),
    ],
)
def test_options_are_checked_where_they_are_declared(tmp_path, make, message):
    with pytest.raises(UsageError, match=message):
        make(tmp_path)
