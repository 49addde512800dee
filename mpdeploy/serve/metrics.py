"""Prometheus metrics under Triton's names, from the plain counters of all processes; Triton's figures it has none for are under `mpdeploy_`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from mpdeploy.errors import MissingExtraError
from mpdeploy.serve.shared import Counts
from mpdeploy.serve.statistics import DURATION_BUCKETS_MS, REASONS

# metric -> (key of `Statistics.to_flat`, divisor, what it says)
COUNTERS: dict[str, tuple[str, float, str]] = {
    "nv_inference_request_success": ("success", 1, "Requests that were answered"),
    "nv_inference_count": ("rows", 1, "Samples that were computed"),
    "nv_inference_exec_count": ("batches", 1, "Batches that were computed"),
    "nv_inference_request_duration_us": ("success_ns", 1e3, "Time from queueing to the answer, summed over requests"),
    "nv_inference_queue_duration_us": ("queue_ns", 1e3, "Time in the queue, summed over requests"),
    "nv_inference_compute_input_duration_us": ("input_ns", 1e3, "Time joining inputs, summed over requests"),
    "nv_inference_compute_infer_duration_us": ("infer_ns", 1e3, "Time in the engine, summed over requests"),
    "nv_inference_compute_output_duration_us": ("output_ns", 1e3, "Time splitting outputs, summed over requests"),
    "mpdeploy_padded_samples": ("padded_rows", 1, "Samples computed only to fill a batch"),
    "mpdeploy_nonfinite_requests": ("nonfinite_requests", 1, "Requests with a NaN or an infinity in their inputs"),
    "mpdeploy_retried_requests": ("retried", 1, "Requests computed alone after their batch failed"),
    "mpdeploy_shadow_compared": ("shadow/compared", 1, "Samples compared with the FP32 model"),
    "mpdeploy_shadow_dropped": ("shadow/dropped", 1, "Sampled requests the shadow comparison had no time for"),
    "mpdeploy_shadow_failed": ("shadow/failed", 1, "Shadow comparisons that the FP32 model could not compute"),
    "mpdeploy_recorded_samples": ("recorded/samples", 1, "Samples written for calibration"),
    "mpdeploy_recorded_failed": ("recorded/failed", 1, "Sampled requests that could not be written"),
}
GAUGES: dict[str, tuple[str, str]] = {
    "nv_inference_pending_request_count": ("gauge/pending", "Requests that are queued or computed now"),
    "mpdeploy_shadow_up": ("gauge/min/shadow/up", "1 while the shadow compares, 0 once a fault has ended it"),
    "mpdeploy_shadow_rel_l2": ("gauge/max/shadow/rel_l2", "Distance from the FP32 model, of the worst output"),
    "mpdeploy_shadow_alert": ("gauge/max/shadow/alert", "1 while that distance is above its limit"),
}
SERVER_GAUGES: dict[str, tuple[str, str]] = {
    "mpdeploy_processes": ("gauge/processes", "Processes behind the port"),
    "mpdeploy_connections": ("gauge/connections", "Open connections"),
    "mpdeploy_inflight_bytes": ("gauge/inflight_bytes", "Bytes of requests and answers that are held"),
}
_TRITON_TOTAL = re.compile(rb"^(# (?:HELP|TYPE) nv_\w+?)_total ", re.MULTILINE)


def model_key(name: str, version: str, key: str) -> str:
    """A counter of a model's version, as one name among all counters of a process."""
    gauge = re.match(r"gauge/(max/|min/)?", key)
    prefix, rest = (gauge.group(0), key[gauge.end() :]) if gauge else ("", key)
    return f"{prefix}model/{name}/{version}/{rest}"


def of_model(counts: Counts, name: str, version: str) -> Counts:
    """The counters of a model's version, under their own names."""
    found: Counts = {}
    for prefix in ("", "gauge/", "gauge/max/", "gauge/min/"):
        start = f"{prefix}model/{name}/{version}/"
        found |= {prefix + key[len(start) :]: value for key, value in counts.items() if key.startswith(start)}
    return found


def models_in(counts: Counts) -> list[tuple[str, str]]:
    """(name, version) of all models that were ever counted."""
    found = {tuple(key.split("/")[1:3]) for key in counts if key.startswith("model/")}
    return sorted((name, version) for name, version in found)


def exposition(counts: Counts, info: list[dict[str, str]]) -> tuple[str, bytes]:
    """What `/metrics` answers: content type and text.

    Args:
        counts: of all processes.
        info: labels of each model that is loaded.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """
    try:
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    except ImportError as error:
        raise MissingExtraError.for_extra("prometheus-client", "serve") from error
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(lambda: _families(counts, info)))
    text = _TRITON_TOTAL.sub(rb"\1 ", generate_latest(registry))
    return CONTENT_TYPE_LATEST, text


class _Collector:
    def __init__(self, collect: Callable[[], Iterator[Any]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Any]:
        """What prometheus-client calls."""
        return self._collect()


def _families(counts: Counts, info: list[dict[str, str]]) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

    models = [(name, version, of_model(counts, name, version)) for name, version in models_in(counts)]
    for metric, (key, divisor, text) in COUNTERS.items():
        triton = metric.startswith("nv_")
        family = (
            Metric(metric, text, "counter")
            if triton
            else CounterMetricFamily(metric, text, labels=["model", "version"])
        )
        for name, version, values in models:
            if key not in values:
                continue
            value = values[key] / divisor
            if triton:  # Triton's counters have no `_total`
                family.add_sample(metric, {"model": name, "version": version}, value)
            else:
                family.add_metric([name, version], value)
        yield family
    failures = Metric("nv_inference_request_failure", "Requests that got an error, by reason", "counter")
    durations = HistogramMetricFamily(
        "mpdeploy_request_duration_seconds", "Time from queueing to the answer", labels=["model", "version"]
    )
    for name, version, values in models:
        for reason in REASONS:
            labels = {"model": name, "version": version, "reason": reason}
            failures.add_sample(failures.name, labels, values.get(f"failures/{reason}", 0))
        seen, buckets = 0.0, []
        for index, bound in enumerate((*DURATION_BUCKETS_MS, None)):
            seen += values.get(f"by_duration/{index}", 0)
            buckets.append(("+Inf" if bound is None else repr(bound / 1000), seen))
        durations.add_metric([name, version], buckets, values.get("success_ns", 0) / 1e9)
    yield failures
    yield durations
    for metric, (key, text) in GAUGES.items():
        family = GaugeMetricFamily(metric, text, labels=["model", "version"])
        for name, version, values in models:
            if key in values:
                family.add_metric([name, version], values[key])
        yield family
    for metric, (key, text) in SERVER_GAUGES.items():
        if key in counts:
            yield GaugeMetricFamily(metric, text, value=counts[key])
    labels_of = ("model", "version", "engine", "precision", "verdict")
    loaded = GaugeMetricFamily("mpdeploy_model_info", "1 for each model that is loaded", labels=list(labels_of))
    for item in info:
        loaded.add_metric([item[label] for label in labels_of], 1)
    yield loaded
