"""Counters, metrics, logs, traces and what processes share: sums that are right, and names that dashboards know."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

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
