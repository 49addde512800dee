"""What the server is told: one frozen record, checked where it is declared. It travels to worker processes as it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from mpdeploy.errors import UsageError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
MIB = 2**20


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise UsageError(f"{name} {value}: {least} is the least.")


def _above(name: str, value: float, bound: float) -> None:
    if not value > bound:
        raise UsageError(f"{name} {value}: it must be above {bound}.")


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a model is loaded and run.

    Attributes:
        engine: this engine and no other; None: the best that may be served.
        allow_failed: serve an engine whose verdict is fail or unvalidated.
        instances: engines on each device, each with a thread of its own.
        threads: an engine's own threads on a CPU; None: the cores this process may use, shared out.
        max_queue: requests that may wait; more are refused with 503.
        delay_ms: how long a batch that is not full waits for more requests; 0: not at all.
        inline_ms: a batch that an engine on a CPU computes in this time is computed on the event loop's own thread, since to wake
            another takes longer; 0: never; None: 0.5, and 5 where this process has one core.
        pad: axis and rising lengths: requests are filled up with zeros to the next of them, so that they share a batch.
        deadline_s: of a request that sets none.
        warmup_s: the longest that warming up may take before the rest of it is left out.
        shadow_rate: the share of requests that are computed by the FP32 model too; 0: none.
        shadow_limit: relative L2 distance from the FP32 model above which the drift alert is raised.
        record: folder that sampled requests are written to; None: nowhere.
        record_rate: the share of requests that are written.
        record_max: the most samples that a process writes, over all versions.
    """

    engine: str | None = None
    allow_failed: bool = False
    instances: int = 1
    threads: int | None = None
    max_queue: int = 1024
    delay_ms: float = 0.0
    inline_ms: float | None = None
    pad: tuple[tuple[str, tuple[int, ...]], ...] = ()
    deadline_s: float = 30.0
    warmup_s: float = 20.0
    shadow_rate: float = 0.0
    shadow_limit: float = 1e-2
    record: Path | None = None
    record_rate: float = 0.01
    record_max: int = 4096

    def __post_init__(self) -> None:
        _at_least("--instances", self.instances, 1)
        _at_least("--max-queue", self.max_queue, 1)
        _at_least("--delay-ms", self.delay_ms, 0)
        if self.inline_ms is not None:
            _at_least("--inline-ms", self.inline_ms, 0)
        for axis, sizes in self.pad:
            if not sizes or any(after <= before for before, after in pairwise((0, *sizes))):
                raise UsageError(f"--pad {axis}: lengths must rise from 1 up; found {list(sizes)}.")
        if len({axis for axis, _ in self.pad}) < len(self.pad):
            raise UsageError("--pad names an axis twice.")
        _above("--deadline-s", self.deadline_s, 0)
        _above("--shadow-limit", self.shadow_limit, 0)
        if self.threads is not None:
            _at_least("--threads", self.threads, 1)
        for name, rate in (("--shadow-rate", self.shadow_rate), ("--record-rate", self.record_rate)):
            if not 0 <= rate <= 1:
                raise UsageError(f"{name} {rate}: a share of the requests is between 0 and 1.")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Everything `mpdeploy serve` is told.

    Attributes:
        run: the run directory.
        name: of the model in URLs; None: the pipeline's.
        host: to bind.
        port: to bind; 0: any that is free.
        grpc_port: of gRPC; None: no gRPC; 0: any that is free.
        model: how models are loaded and run.
        repository: folder of run directories that `load` may take models from; None: only `run` itself, read again.
        read_only: refuse load and unload.
        watch: load the run again when its run.json changes.
        workers: processes behind the port, on a CPU.
        devices: GPUs, one process each; empty: no choice is made.
        max_body_bytes: of a request.
        max_header_bytes: of a request's head.
        max_inflight_bytes: of all requests and answers that are held at a time: of an answer that was given, what the client does not
            fetch, from 64 KiB a connection up (with TLS, what lies beneath it is not seen). Answers that are to be computed do not count.
        max_connections: that are open at a time.
        header_timeout_s: for a request's head to arrive.
        body_timeout_s: for its body, at more than 64 KiB/s.
        keep_alive_s: how long an idle connection stays open.
        drain_s: how long the server answers on, not ready, before it stops listening.
        stop_s: how long requests in flight may take after that.
        tls_cert, tls_key: PEM files.
        token: that clients must show as `Authorization: Bearer`; None: none.
        access_log: file for one JSON line a request, `-` for stderr; None: none.
        log_format: `json` or `text`.
        otlp_endpoint: where OpenTelemetry traces go; None: nowhere.
    """

    run: Path
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    model: ModelOptions = ModelOptions()
    repository: Path | None = None
    read_only: bool = False
    watch: bool = False
    workers: int = 1
    devices: tuple[str, ...] = ()
    max_body_bytes: int = 64 * MIB
    max_header_bytes: int = 32 * 1024
    max_inflight_bytes: int = 512 * MIB
    max_connections: int = 2048
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keep_alive_s: int = 75
    drain_s: float = 0.0
    stop_s: float = 30.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token: str | None = None
    access_log: str | None = None
    log_format: str = "text"
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not NAME.fullmatch(self.name):
            raise UsageError(f"--name {self.name!r} is no model name.", hint="letters, digits, '.', '_' and '-'")
        for name, port in (("--port", self.port), ("--grpc-port", self.grpc_port)):
            if port is not None and not 0 <= port <= 65535:
                raise UsageError(f"{name} {port} is no port.", hint="0 takes any that is free")
        _at_least("--workers", self.workers, 1)
        _at_least("--max-body-mb", self.max_body_bytes, 1)
        _at_least("--max-connections", self.max_connections, 1)
        _above("--header-timeout-s", self.header_timeout_s, 0)
        if self.max_inflight_bytes < self.max_body_bytes:
            raise UsageError(
                f"--max-inflight-mb is smaller than --max-body-mb: {self.max_inflight_bytes} and {self.max_body_bytes} bytes.",
                hint="a request of the largest size must fit",
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("TLS needs both --tls-cert and --tls-key.")
        for path in (self.tls_cert, self.tls_key):
            if path is not None and not path.is_file():
                raise UsageError(f"There is no file {path}.")
        if self.token is not None and len(self.token) < 8:
            raise UsageError("The bearer token is shorter than 8 characters.", hint="openssl rand -hex 32 makes one")
        if self.log_format not in ("json", "text"):
            raise UsageError(f"--log-format {self.log_format}: json or text.")
        if self.devices and self.workers > 1:
            raise UsageError("--devices and --workers: there is one process a device.", hint="leave --workers out")
        if self.num_processes > 1 and self.grpc_port == 0:
            raise UsageError("Several processes need a gRPC port that is known.", hint="give --grpc-port")

    @property
    def num_processes(self) -> int:
        """Processes behind the port."""
        return len(self.devices) or self.workers
