"""A connection that keeps its peer honest: uvicorn's HTTP protocol with limits on the head, on slow senders and on slow readers.

uvicorn has a time limit between requests only: a peer that sends a byte a minute, or never reads its answer, would stay for ever.
One sweep a second looks at all connections, so that a request costs no timer.
"""

from __future__ import annotations

import asyncio
import time
from functools import lru_cache
from typing import Any

from mpdeploy.errors import MissingExtraError
from mpdeploy.serve.direct import Direct, Door, SeenHead
from mpdeploy.serve.options import ServerOptions

BODY_BYTES_A_SECOND = 64 * 1024
"""A body that comes more slowly than this, after its first `body_timeout_s`, is cut off."""
MAX_HEADERS = 256
READ_TIMEOUT_S = 30.0
"""A peer that takes nothing of its answer for so long is cut off."""


@lru_cache(maxsize=1)
def connection_class() -> type[asyncio.Protocol]:
    """The protocol class for uvicorn's `http` setting; `limits` on it must be set before it is used.

    Raises:
        MissingExtraError: uvicorn or httptools is not installed.
    """
    try:
        from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
        from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
    except ImportError as error:
        raise MissingExtraError.for_extra("uvicorn with httptools", "serve") from error

    class Connection(HttpToolsProtocol):  # type: ignore[misc]
        """See the module."""

        limits: ServerOptions
        door: Door | None = None
        cycle: Any
        parser: Any

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.lost = False
            self.head_bytes = 0
            self.body_bytes = 0
            self.chunk_bytes = 0
            self.in_head = True
            self.upgrading = False
            # whether the parser has read whole requests only, the last of them (if any) on the short way
            self.between = True
            self.seen: SeenHead | None = None
            self.idle_since: float | None = None
            self.reading_since: float | None = time.monotonic()
            self.blocked_since: float | None = None
            self.unsent_bytes = 0
            if len(self.connections) > self.limits.max_connections:
                self.refuse(503, b"too many connections", b"retry-after: 1\r\n")

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost = True
            self.reading_since = self.blocked_since = self.idle_since = None
            self.hold_unsent(0)
            if type(self.cycle) is Direct:
                self.cycle.lost()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            seen, between, before = self.seen, self.between, self.cycle
            if seen is not None and len(data) == seen.length and data.startswith(seen.head):
                assert self.door is not None
                direct = self.door.enter_again(self, seen)
                if direct is not None:
                    self.idle_since = None
                    self.cycle = direct
                    direct.submit(data[seen.split :])
                    return
            self.chunk_bytes = len(data)
            self.head_bytes += self.chunk_bytes
            if self.in_head and self.reading_since is None:
                self.reading_since = time.monotonic()
            self.feed(data)
            self.seen = None  # it holds for what comes next alone
            if between and self.cycle is not before and type(self.cycle) is Direct:
                self.seen = SeenHead.of(data, self.cycle)
            if self.head_bytes > self.limits.max_header_bytes and not self.lost:
                self.refuse(431, b"the request's %s too large" % (b"head is" if self.in_head else b"trailers are"))

        def feed(self, data: bytes | memoryview) -> None:
            """Parse, and answer in HTTP/1.1 who would rather speak another protocol (RFC 9110, 7.8).

            Such a head is read a second time without that wish, with which the parser would leave the body to the other protocol.
            """
            while True:
                try:
                    self.parser.feed_data(data)
                except HttpParserError:
                    self.send_400_response("Invalid HTTP request received.")
                except HttpParserUpgrade as upgrade:
                    if self.upgrading:
                        self.upgrading = False
                        head = self.plain_head()
                        self.parser = HttpRequestParser(self)
                        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
                        self.feed(head)
                        data = memoryview(data)[upgrade.args[0] :]
                        continue
                return

        def plain_head(self) -> bytes:
            """The head that was read, without the wish for another protocol."""
            lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
            lines += [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
            return b"\r\n".join((*lines, b"\r\n"))

        def on_message_begin(self) -> None:
            self.url = b""
            self.headers: list[tuple[bytes, bytes]] = []
            self.expect_100_continue = False
            self.in_head, self.between = True, False
            self.body_bytes = 0
            self.idle_since = None
            self.reading_since = time.monotonic()

        def on_header(self, name: bytes, value: bytes) -> None:
            if self.in_head:
                super().on_header(name, value)  # trailers are read and forgotten

        def on_headers_complete(self) -> None:
            most, seen = self.limits.max_header_bytes, self.head_bytes + self.chunk_bytes
            self.head_bytes = 0
            too_large = len(self.headers) > MAX_HEADERS or (seen > most and self.head_size() > most)
            if too_large:
                self.refuse(431, b"the request's head is too large")
            self.in_head = False
            if not too_large and self.door is not None and (direct := self.door.enter(self)) is not None:
                self.cycle = direct
                return
            if not too_large and self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
                self.upgrading = True
                return
            url, headers, expects = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()  # makes the scope, which the short way does without
            self.url, self.headers, self.expect_100_continue = url, headers, expects
            self.scope["headers"] = headers
            self.scope["mpdeploy.connection"] = self
            super().on_headers_complete()
            if too_large:
                self.cycle.disconnected = True  # nothing is computed for it

        def head_size(self) -> int:
            """Bytes of the head that was read."""
            return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

        def on_body(self, body: bytes) -> None:
            self.body_bytes += len(body)
            self.head_bytes = 0
            if type(self.cycle) is Direct:
                self.cycle.parts.append(body)
            else:
                super().on_body(body)

        def on_message_complete(self) -> None:
            if self.upgrading:
                return
            self.in_head = True
            self.head_bytes = 0
            self.reading_since = None
            if type(self.cycle) is Direct:
                self.between = True
                if not self.lost:
                    self.cycle.complete()
            else:
                super().on_message_complete()

        def answer(self, status: int, headers: bytes, body: bytes, close: bool) -> None:
            """Write an answer, in one piece, and be ready for the next request."""
            for name, value in self.server_state.default_headers:
                headers += b"%s: %s\r\n" % (name, value)
            self.transport.write(
                b"%s%scontent-length: %d\r\n%s\r\n%s"
                % (STATUS_LINE[status], headers, len(body), b"connection: close\r\n" if close else b"", body)
            )
            if close:
                self.transport.close()
            self.on_response_complete()

        def on_response_complete(self) -> None:
            """As uvicorn's, with `sweep` in place of a timer a request."""
            self.server_state.total_requests += 1
            if self.transport.is_closing():
                return
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            else:
                self.idle_since = time.monotonic()

        def pause_writing(self) -> None:
            self.blocked_since = time.monotonic()
            self.hold_unsent(self.transport.get_write_buffer_size())
            super().pause_writing()

        def resume_writing(self) -> None:
            self.blocked_since = None
            self.hold_unsent(0)
            super().resume_writing()

        def hold_unsent(self, size: int) -> None:
            """Count so many bytes, which the peer has not taken yet, as held: the answer they are of is done with and no longer counts."""
            if self.door is not None:
                self.door.app.inflight_bytes += size - self.unsent_bytes
            self.unsent_bytes = size

        def is_lost(self) -> bool:
            """Whether the peer has gone."""
            return self.lost

        def sweep(self, now: float) -> None:
            """Cut the peer off if it has used up its time."""
            if self.blocked_since is not None:
                unsent = self.transport.get_write_buffer_size()
                if unsent < self.unsent_bytes:
                    self.blocked_since = now
                self.hold_unsent(unsent)
            if self.blocked_since is not None and now - self.blocked_since > READ_TIMEOUT_S:
                self.transport.abort()
            elif self.idle_since is not None and now - self.idle_since > self.limits.keep_alive_s:
                self.transport.close()
            elif self.reading_since is not None:
                seconds = now - self.reading_since
                if self.in_head:
                    if seconds > self.limits.header_timeout_s:
                        if self.head_bytes:
                            self.refuse(408, b"the request's head took too long")
                        else:  # opened in advance: it would take an answer now for that to its first request
                            self.transport.close()
                elif seconds > self.limits.body_timeout_s + self.body_bytes / BODY_BYTES_A_SECOND:
                    self.refuse(408, b"the request's body took too long")

        def refuse(self, status: int, message: bytes, extra: bytes = b"") -> None:
            """Answer with an error, as far as no answer has begun, and close."""
            self.reading_since = None
            if self.transport.is_closing():
                return
            cycle = self.cycle
            # until a head is complete, the cycle is that of the request before
            if cycle is None or not cycle.response_started or (self.in_head and cycle.response_complete):
                body = b'{"error":"' + message + b'"}'
                self.transport.write(
                    b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%sconnection: close\r\n\r\n%s"
                    % (status, _REASONS[status], len(body), extra, body)
                )
            self.transport.close()
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    return Connection


_REASONS = {
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}
