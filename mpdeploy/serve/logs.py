"""Logs: one JSON object a line (or plain text for a terminal) on stderr, and an access log that no request waits for."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

MAX_WAITING = 100_000


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        value: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
        }
        if record.exc_info:
            value["exception"] = self.formatException(record.exc_info)
        return json.dumps(value, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A record for people: time, level where it is not `info`, message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))}  {level}{record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def set_up_logging(log_format: str) -> None:
    """Send what the server says to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.captureWarnings(True)
    logging.getLogger().handlers[:] = [handler]  # what libraries say goes there too
    for name, level in (("mpdeploy", logging.INFO), ("uvicorn", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
    # One line for each garbage request would let a stranger fill the disk; they are counted by status instead.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


class AccessLog:
    """One JSON line a request: time, client, method, path, status, bytes, milliseconds. Written twice a second by `flush`.

    Args:
        target: a file that is appended to, or `-` for stderr.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._waiting: list[tuple[Any, ...]] = []
        self._lost = 0
        self._lock = threading.Lock()

    def add(self, scope: Any, status: int, received: int, sent: int, seconds: float) -> None:
        """Note a request."""
        if len(self._waiting) >= MAX_WAITING:
            self._lost += 1
            return
        self._waiting.append(
            (time.time(), scope["client"], scope["method"], scope["path"], status, received, sent, seconds)
        )

    def flush(self) -> None:
        """Write what was noted; from any thread."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            lost, self._lost = self._lost, 0
            if not waiting and not lost:
                return
            lines = [
                json.dumps(
                    {
                        "time": _utc(at),
                        "client": client[0] if client else None,
                        "method": method,
                        "path": path,
                        "status": status,
                        "bytes_in": received,
                        "bytes_out": sent,
                        "ms": round(seconds * 1000, 3),
                    },
                    ensure_ascii=False,
                )
                for at, client, method, path, status, received, sent, seconds in waiting
            ]
            if lost:
                lines.append(json.dumps({"time": _utc(time.time()), "lost_lines": lost}))
            text = "\n".join(lines) + "\n"
            if self._target == "-":
                sys.stderr.write(text)
                sys.stderr.flush()
            else:  # opened anew each time: a file that was rotated away is not written to any more
                with Path(self._target).open("a", encoding="utf-8") as file:
                    file.write(text)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"
