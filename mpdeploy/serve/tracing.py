"""OpenTelemetry spans, one a request, for those who ask for them; nothing is imported and nothing costs where nobody does."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from mpdeploy.environment import package_version
from mpdeploy.errors import MissingExtraError

log = logging.getLogger("mpdeploy.serve")

CLOSE_S = 3.0
"""A collector that takes no spans holds up the end of the server for so long; OpenTelemetry would wait for 30 s, and so do most who then kill."""


class Tracer:
    """Sends spans over OTLP/HTTP, in batches, from a thread of its own. Those that its queue of 2,048 does not hold are lost.

    Args:
        endpoint: like `http://collector:4318/v1/traces`.
        exporter: in place of OTLP's, for tests.

    Raises:
        MissingExtraError: the extra `telemetry` is not installed.
    """

    def __init__(self, endpoint: str, *, exporter: Any = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint=endpoint)
        except ImportError as error:
            raise MissingExtraError.for_extra("opentelemetry", "telemetry") from error
        resource = Resource.create(
            {"service.name": "mpdeploy", "service.version": package_version("mpdeploy") or "unknown"}
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mpdeploy.serve")
        self._propagator = TraceContextTextMapPropagator()
        self._server_kind = trace.SpanKind.SERVER

    @contextlib.contextmanager
    def request(self, model: str, headers: Sequence[tuple[bytes, bytes]]) -> Iterator[Any]:
        """A span around a request, a child of the client's where it sent `traceparent`."""
        carrier = {
            key.decode("latin-1"): value.decode("latin-1")
            for key, value in headers
            if key in (b"traceparent", b"tracestate")
        }
        context = self._propagator.extract(carrier) if carrier else None
        with self._tracer.start_as_current_span(
            f"infer {model}", context=context, kind=self._server_kind, attributes={"mpdeploy.model": model}
        ) as span:
            yield span

    def close(self) -> None:
        """Send what waits, as far as the collector takes it within `CLOSE_S`."""
        closing = threading.Thread(target=self._provider.shutdown, name="close-traces", daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            log.warning("the collector of traces took none for %g s: the last are lost", CLOSE_S)
