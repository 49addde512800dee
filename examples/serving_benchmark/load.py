"""Load: `wrk` where it is installed, else a generator on plain sockets; and the processes of servers, pinned to a core.

Both send the same request over and over on `connections` connections, each waiting for its answer before it asks again.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

UNIT_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}


@dataclass(frozen=True)
class Load:
    """What one load came to. `cpu_us`: of the server's processes, for each request. `stolen`: the share of this machine's processor time
    that its host gave to others meanwhile, in percent; None where the system does not say."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    failed: int
    cpu_us: float | None = None
    stolen: float | None = None


@dataclass(frozen=True)
class Call:
    """The request that is repeated."""

    path: str
    body: bytes
    headers: Mapping[str, str]


def tool() -> str:
    """The generator that is used here."""
    return "wrk" if shutil.which("wrk") else "sockets"


def load(url: str, call: Call, connections: int, seconds: float, core: int | None, pid: int | None = None) -> Load:
    """Ask for so many seconds, from `core`; `pid` is the server's, whose processor time is counted."""
    before, times = cpu_seconds(pid), psutil.cpu_times()
    run = with_wrk if tool() == "wrk" else with_sockets
    found, count = run(url, call, connections, seconds, core)
    spent = cpu_seconds(pid) - before
    cpu_us = 1e6 * spent / count if pid and count else None
    return replace(found, cpu_us=cpu_us, stolen=stolen_since(times))


def stolen_since(before: Any) -> float | None:
    """Percent of all cores' time, since `before` (psutil.cpu_times()), that the host of this virtual machine gave to others."""
    now = psutil.cpu_times()
    if not hasattr(now, "steal"):
        return None
    total = sum(now[:8]) - sum(before[:8])  # up to steal: guests are counted in user already
    return 100 * (now.steal - before.steal) / total if total > 0 else 0.0


def with_wrk(url: str, call: Call, connections: int, seconds: float, core: int | None) -> tuple[Load, int]:
    with tempfile.TemporaryDirectory() as folder:
        body = Path(folder) / "body"
        body.write_bytes(call.body)
        script = Path(folder) / "load.lua"
        headers = "".join(f'wrk.headers["{key}"] = "{value}"\n' for key, value in call.headers.items())
        script.write_text(f'wrk.method = "POST"\nwrk.body = io.open("{body}", "rb"):read("*all")\n{headers}')
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency", "-s", str(script)]
        done = subprocess.run(
            [*command, url + call.path], capture_output=True, text=True, check=True, preexec_fn=lambda: pin(core)
        )
    text = done.stdout

    def number(pattern: str) -> float:
        match = re.search(pattern, text)
        return float(match.group(1)) if match else 0.0

    def milliseconds(percent: int) -> float:
        match = re.search(rf"{percent}%\s+([\d.]+)([a-z]+)", text)
        assert match, text
        return float(match.group(1)) * UNIT_MS[match.group(2)]

    failed = int(number(r"Non-2xx or 3xx responses: (\d+)")) + sum(
        map(int, re.findall(r"(?:connect|read|timeout) (\d+)", text))
    )
    count = int(number(r"(\d+) requests in"))
    return Load(number(r"Requests/sec:\s+([\d.]+)"), milliseconds(50), milliseconds(99), failed), count


def with_sockets(url: str, call: Call, connections: int, seconds: float, core: int | None) -> tuple[Load, int]:
    """In this process: a selector over plain sockets, which knows just enough HTTP to see where an answer ends."""
    before = os.sched_getaffinity(0)
    pin(core)
    host, _, port = url.partition("://")[2].partition(":")
    lines = "".join(f"{key}: {value}\r\n" for key, value in call.headers.items())
    request = f"POST {call.path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(call.body)}\r\n{lines}\r\n".encode()
    request += call.body
    times: list[float] = []
    failed = 0
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for _ in range(connections):
            peer = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.sendall(request)
            selector.register(peer, selectors.EVENT_READ, [time.perf_counter(), b""])
        begin = time.perf_counter()
        while (now := time.perf_counter()) - begin < seconds:
            for key, _ in selector.select(0.5):
                peer, state = key.fileobj, key.data
                assert isinstance(peer, socket.socket)
                part = peer.recv(2**18)
                state[1] += part
                if part and not _complete(state[1]):
                    continue
                failed += not state[1].startswith(b"HTTP/1.1 200")
                now = time.perf_counter()
                times.append(now - state[0])
                if not part:
                    selector.unregister(peer)
                    continue
                state[:] = [now, b""]
                peer.sendall(request)
        elapsed = time.perf_counter() - begin
    os.sched_setaffinity(0, before)
    times.sort()
    at = lambda share: 1e3 * times[min(len(times) - 1, int(len(times) * share))] if times else 0.0  # noqa: E731
    return Load(len(times) / elapsed, at(0.5), at(0.99), failed), len(times)


_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def _complete(answer: bytes) -> bool:
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    length = _LENGTH.search(answer, 0, end)
    if length is None:
        return answer.endswith(b"0\r\n\r\n")
    return len(answer) >= end + 4 + int(length.group(1))


# -- processes ---------------------------------------------------------------------------------------------------------


def pin(core: int | None) -> None:
    """Keep this process, and those it starts, on one core."""
    if core is not None:
        os.sched_setaffinity(0, {core})


def cpu_seconds(pid: int | None) -> float:
    """Processor time of a process and all below it."""
    if pid is None:
        return 0.0
    total = 0.0
    with contextlib.suppress(psutil.Error):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[object], ready_url: str, log: Path, core: int | None, env: Mapping[str, str] | None = None,
    cwd: Path | None = None, seconds: float = 120,
) -> Iterator[subprocess.Popen[bytes]]:  # fmt: skip
    """A server on its core, until the block ends.

    Raises:
        RuntimeError: it did not become ready; with the end of its log.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    with log.open("wb") as output, subprocess.Popen(
        list(map(str, command)), stdout=output, stderr=output, env=environment, cwd=cwd, start_new_session=True,
        preexec_fn=lambda: pin(core),
    ) as process:  # fmt: skip
        try:
            end = time.monotonic() + seconds
            while not answers(ready_url):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"it did not become ready: {log.read_text(errors='replace')[-400:]}")
                time.sleep(0.1)
            yield process
        finally:
            below = []
            with contextlib.suppress(psutil.Error):
                below = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            for child in below:
                with contextlib.suppress(psutil.Error):
                    child.kill()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status < 500)
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (urllib.error.URLError, OSError):
        return False
