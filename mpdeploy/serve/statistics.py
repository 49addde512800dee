"""What a version of a model has done: plain counters, changed on the event loop's thread alone, and cheap enough for every request."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from typing import Any

DURATION_BUCKETS_MS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
REASONS = ("REJECTED", "CANCELED", "BACKEND", "DEADLINE", "OTHER")
"""Why a request failed, under Triton's names and `DEADLINE`."""
RECENT = 2000


@dataclass(slots=True)
class Statistics:
    """Counters since the version was loaded. Durations are in nanoseconds, summed over requests as Triton does.

    Attributes:
        rows: samples that were answered (Triton: inference count).
        batches: how often the engine ran.
        batch_sizes: samples in a batch -> [how often, ns in the engine].
        padded_rows: samples that were computed only to fill a batch.
        nonfinite_requests: requests with a NaN or an infinity in their inputs: they are data, and counted.
        by_duration: requests whose duration is in each of DURATION_BUCKETS_MS, and one more above.
        recent_ns: durations of the latest requests, for percentiles.
    """

    success: int = 0
    success_ns: int = 0
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    failure_ns: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    rows: int = 0
    batches: int = 0
    batch_sizes: dict[int, list[int]] = field(default_factory=dict)
    padded_rows: int = 0
    nonfinite_requests: int = 0
    retried: int = 0
    last_ms: int = 0
    by_duration: list[int] = field(default_factory=lambda: [0] * (len(DURATION_BUCKETS_MS) + 1))
    recent_ns: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))

    def answered(self, duration_ns: int) -> None:
        """A request got its answer."""
        self.success += 1
        self.success_ns += duration_ns
        self.by_duration[bisect_left(DURATION_BUCKETS_MS, duration_ns / 1e6)] += 1
        self.recent_ns.append(duration_ns)

    def failed(self, reason: str, duration_ns: int = 0) -> None:
        """A request got an error, or nobody waited for its answer."""
        self.failures[reason] += 1
        self.failure_ns += duration_ns

    def ran(self, rows: int, size: int, requests: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """The engine ran once, for so many samples, on a batch of `size`, for so many requests."""
        self.rows += rows
        self.batches += 1
        self.padded_rows += size - rows
        self.input_ns += input_ns * requests
        self.infer_ns += infer_ns * requests
        self.output_ns += output_ns * requests
        entry = self.batch_sizes.setdefault(size, [0, 0])
        entry[0] += 1
        entry[1] += infer_ns
        self.last_ms = int(time.time() * 1000)

    def percentiles_ms(self) -> dict[str, float | None]:
        """p50, p90 and p99 of the latest requests in this process."""
        ordered = sorted(self.recent_ns)
        if not ordered:
            return {"p50": None, "p90": None, "p99": None}
        return {
            f"p{percent}": round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] / 1e6, 3)
            for percent in (50, 90, 99)
        }

    def to_flat(self) -> dict[str, float]:
        """Every counter under one flat name, for sums over processes."""
        flat: dict[str, float] = {name: getattr(self, name) for name in _PLAIN}
        flat |= {f"failures/{reason}": count for reason, count in self.failures.items()}
        flat |= {f"by_duration/{index}": count for index, count in enumerate(self.by_duration)}
        for size, (count, ns) in self.batch_sizes.items():
            flat[f"batch_sizes/{size}/count"] = count
            flat[f"batch_sizes/{size}/ns"] = ns
        return flat


_PLAIN = (
    "success", "success_ns", "failure_ns", "queue_ns", "input_ns", "infer_ns", "output_ns", "rows", "batches",
    "padded_rows", "nonfinite_requests", "retried", "last_ms",
)  # fmt: skip


def triton_statistics(name: str, version: str, flat: dict[str, float]) -> dict[str, Any]:
    """Counters in the shape of Triton's statistics extension."""

    def duration(count: float, ns: float) -> dict[str, int]:
        return {"count": int(count), "ns": int(ns)}

    success = flat.get("success", 0)
    failures = sum(value for key, value in flat.items() if key.startswith("failures/"))
    sizes = sorted({int(key.split("/")[1]) for key in flat if key.startswith("batch_sizes/")})
    return {
        "name": name,
        "version": version,
        "last_inference": int(flat.get("last_ms", 0)),
        "inference_count": int(flat.get("rows", 0)),
        "execution_count": int(flat.get("batches", 0)),
        "inference_stats": {
            "success": duration(success, flat.get("success_ns", 0)),
            "fail": duration(failures, flat.get("failure_ns", 0)),
            "queue": duration(success, flat.get("queue_ns", 0)),
            "compute_input": duration(success, flat.get("input_ns", 0)),
            "compute_infer": duration(success, flat.get("infer_ns", 0)),
            "compute_output": duration(success, flat.get("output_ns", 0)),
            "cache_hit": duration(0, 0),
            "cache_miss": duration(0, 0),
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": duration(0, 0),
                "compute_infer": duration(flat[f"batch_sizes/{size}/count"], flat[f"batch_sizes/{size}/ns"]),
                "compute_output": duration(0, 0),
            }
            for size in sizes
        ],
    }
