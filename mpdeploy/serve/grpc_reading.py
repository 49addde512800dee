"""Bytes into messages for the gRPC door, with a limit on all that are in progress at a time: memory stays bounded under overload.

What is wrong with the bytes is a value and not raised: gRPC would log a traceback for every piece of garbage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpdeploy.serve.messages import BadRequestError, OverloadedError, ServeError


@dataclass(frozen=True, slots=True)
class Read:
    """What was read: a message, or why there is none; `size` bytes are given back with `Reading.done`."""

    message: Any
    size: int

    def checked(self) -> Any:
        """The message.

        Raises:
            ServeError: there is none.
        """
        if isinstance(self.message, ServeError):
            raise self.message
        return self.message


class Reading:
    """Reads messages and counts the bytes of those in progress. Used on one event loop."""

    def __init__(self, max_inflight_bytes: int) -> None:
        self.inflight_bytes = 0
        self._limit = max_inflight_bytes

    def reader_of(self, message: Any) -> Callable[[bytes], Read]:
        """A function that reads messages of a class."""
        from google.protobuf.message import DecodeError

        def read(content: bytes) -> Read:
            if self.inflight_bytes + len(content) > self._limit:
                return Read(OverloadedError(f"{self.inflight_bytes} bytes of requests are in progress; try again"), 0)
            try:
                found = message.FromString(content)
            except DecodeError as error:
                return Read(BadRequestError(f"the bytes are no {message.DESCRIPTOR.name}: {error}"), 0)
            self.inflight_bytes += len(content)
            return Read(found, len(content))

        return read

    def done(self, read: Read) -> None:
        """A message that was read has been answered."""
        self.inflight_bytes -= read.size
