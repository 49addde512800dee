"""What a server must survive, each with its figures; every answer is checked against its own request.

python faults.py overload [--seconds 60]     ten times what the server can compute: memory, deadlines, no answer lost or swapped
python faults.py kill                        one of two processes is killed with SIGKILL, again and again, under load
python faults.py reload                      two runs of the model are loaded in turns, again and again under load
python faults.py fuzz [--count 100000]       mutated requests, at the codecs and at a live server: no crash, no 500
python faults.py soak [--minutes 10]         steady load; resident memory over time

Prints JSON and exits with 1 where something failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from fuzzing import fuzz_grpc, fuzz_rest, mutated_requests
from load import cpu_seconds, free_port, pin, running
from models import make_run
from standstill import Standstills

from mpdeploy.serve.protocol import encode_request

WIDTH = 256
GAP_S = 0.05
"""Times without an answer are noted from here on."""
SILENT_S = 1.0
"""Under load the server may not be silent for so long on all connections together. Time in which a core stood still is taken off."""

MAX_REFUSAL = 0.2
"""Of the processor time that an answer costs: to refuse must be far cheaper than to compute. By the wall clock it would be a matter of
what else the machine does."""


@dataclass
class Tally:
    """What the clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    swapped: int = 0
    lost: int = 0
    refused: int = 0
    spans: list[tuple[float, float]] = field(default_factory=list)
    """When each 200 was asked for, and read, by `time.monotonic()`."""
    last: float | None = None
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """Times of more than `GAP_S` without an answer on any connection, since `last` was set."""

    def answered(self, status: int, begin: float) -> None:
        now = time.monotonic()
        self.statuses[status] += 1
        if self.last is not None and now - self.last > GAP_S:
            self.gaps.append((self.last, now))
        self.last = now
        if status == 200:
            self.spans.append((begin, now))

    def to_json(self) -> dict[str, Any]:
        times = sorted(end - begin for begin, end in self.spans)
        at = lambda share: round(1e3 * times[int((len(times) - 1) * share)], 2) if times else None  # noqa: E731
        return {
            "answers_by_status": dict(sorted(self.statuses.items())), "swapped_or_wrong": self.swapped,
            "lost": self.lost, "connections_refused": self.refused,
            "ms_of_200": {"p50": at(0.5), "p99": at(0.99), "max": at(1.0)},
        }  # fmt: skip


class Client:
    """One connection that is opened anew when it breaks."""

    def __init__(self, port: int, tally: Tally, seed: int, model: str) -> None:
        self.port, self.tally, self.model = port, tally, model
        self.rng = np.random.default_rng(seed)
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self) -> int | None:
        """One request of one to three samples, checked; its status, or None where the connection broke."""
        x = self.rng.standard_normal((1 + int(self.rng.integers(3)) % 2, WIDTH), np.float32)
        body, headers = encode_request({"x": x}, outputs=("y", "total"))
        begin = time.monotonic()
        try:
            status, length, content = await self.send(f"/v2/models/{self.model}/infer", body, headers)
        except ConnectionRefusedError:
            self.tally.refused += 1
            await asyncio.sleep(0.05)
            return None
        except (OSError, asyncio.IncompleteReadError):
            self.tally.lost += 1
            self.close()
            return None
        self.tally.answered(status, begin)
        if status == 200:
            raw = np.frombuffer(content[length:], np.float32)
            good = len(raw) == x.size + len(x) and np.array_equal(raw[: x.size], (x + x).ravel())
            good = good and np.allclose(raw[x.size :], x.sum(axis=1), rtol=1e-3, atol=1e-3)
            self.tally.swapped += not good
        return status

    async def connect(self) -> None:
        self.streams = await asyncio.open_connection("127.0.0.1", self.port)

    async def send(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, int, bytes]:
        if self.streams is None:
            await self.connect()
        assert self.streams is not None
        reader, writer = self.streams
        lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
        writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{lines}\r\n".encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        fields = dict(line.split(": ", 1) for line in head[1:] if line)
        content = await reader.readexactly(int(fields["content-length"]))
        if fields.get("connection") == "close":
            self.close()
        return int(head[0].split()[1]), int(fields.get("inference-header-content-length", 0)), content

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
        self.streams = None


class Memory:
    """Resident memory of a server's processes, looked at every so often."""

    def __init__(self, pid: int, every_s: float) -> None:
        self.pid, self.every_s = pid, every_s
        self.seen_mib: list[float] = []

    async def watch(self) -> None:
        while True:
            with contextlib.suppress(psutil.Error):
                processes = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
                self.seen_mib.append(round(sum(process.memory_info().rss for process in processes) / 2**20, 1))
            await asyncio.sleep(self.every_s)

    def growth_mib(self) -> float:
        """Median of the last fifth over that of the second fifth: the first is warm-up."""
        part = max(1, len(self.seen_mib) // 5)
        return round(
            statistics.median(self.seen_mib[-part:]) - statistics.median(self.seen_mib[part : 2 * part] or [0]), 1
        )


async def until(end: float, work: Callable[[], Awaitable[Any]]) -> None:
    while time.monotonic() < end:
        await work()


@contextlib.contextmanager
def serving(folder: Path, model: str, *arguments: object, batches: tuple[int, int, int] = (1, 8, 32)) -> Any:
    """A server on the first core, this process on the others; yields process, port and log."""
    cores = sorted(os.sched_getaffinity(0))
    run = make_run(folder / model, model, batches)
    port, log = free_port(), folder / "server.log"
    command = [sys.executable, "-m", "mpdeploy", "serve", run, "--port", port, "--log-format", "json", *arguments]
    with running(command, f"http://127.0.0.1:{port}/v2/health/ready", log, cores[0]) as process:
        pin(cores[-1])
        yield process, port, log
        os.sched_setaffinity(0, cores)


async def overload(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ten times as many requests as the server can compute, sent by the clock, whatever becomes of them."""
    deadline_s = 1.0
    options = ("--max-queue", 64, "--deadline-s", deadline_s)
    cores = os.sched_getaffinity(0)
    with serving(folder, "heavy", *options, batches=(1, 2, 4)) as (process, port, _), Standstills(cores) as stood:
        alone = Tally()
        clients = [Client(port, alone, seed, "heavy") for seed in range(8)]
        end = time.monotonic() + min(5.0, arguments.seconds / 3)
        begin, spent = time.monotonic(), cpu_seconds(process.pid)
        await asyncio.gather(*(until(end, client.ask) for client in clients))
        now = time.monotonic()
        capacity = alone.statuses[200] / (now - begin - stood.seconds_within(begin, now))
        cost_alone = (cpu_seconds(process.pid) - spent) / alone.statuses[200]
        rate = 10 * capacity
        tally, late, resent = Tally(), 0, segments_resent()
        idle = deque(Client(port, tally, 1000 + seed, "heavy") for seed in range(400))
        for client in idle:
            await client.connect()
        memory = Memory(process.pid, max(0.25, arguments.seconds / 60))
        watching = asyncio.ensure_future(memory.watch())
        pending: set[asyncio.Task[None]] = set()

        async def ask(client: Client) -> None:
            await client.ask()
            idle.append(client)

        begin, sent, spent = time.monotonic(), 0, cpu_seconds(process.pid)
        tally.last = begin
        while (now := time.monotonic() - begin) < arguments.seconds:
            while sent + late < now * rate:
                if not idle:
                    late += 1  # no connection is free: this one is not sent
                    continue
                # in turns: the server closes a connection that asks nothing for long
                task = asyncio.ensure_future(ask(idle.popleft()))
                pending.add(task)
                task.add_done_callback(pending.discard)
                sent += 1
            await asyncio.sleep(0.002)
        if pending:
            await asyncio.wait(pending, timeout=deadline_s + 20 + stood.seconds_within(begin, time.monotonic()))
        tally.lost += len(pending)  # without an answer by now
        refusal = (cpu_seconds(process.pid) - spent - cost_alone * tally.statuses[200]) / max(1, tally.statuses[503])
        watching.cancel()
        after = Tally()
        await Client(port, after, 1, "heavy").ask()
        silence_s = max([end - begin - stood.seconds_within(begin, end) for begin, end in tally.gaps], default=0.0)
        slow = answered_after(port, deadline_s)
        answered = sum(tally.statuses.values())
        return {
            "capacity_per_s": round(capacity, 1), "offered_per_s": round((sent + late) / arguments.seconds, 1),
            "sent": sent, "not_sent_for_want_of_a_connection": late, **tally.to_json(),
            # of what is late here alone, the machine's TCP knows more than the server: `overload` in the README
            "answered_200_after_deadline": {"by_the_server": slow, "as_seen_here": sum(end - begin > deadline_s for begin, end in tally.spans)},
            "longest_silence_s": round(silence_s, 3), "tcp_segments_sent_again": None if resent is None else (segments_resent() or 0) - resent,
            "a_core_stood_still_s": round(stood.seconds_within(begin, time.monotonic()), 2),
            "server_cpu_ms": {"an_answer": round(1e3 * cost_alone, 3), "a_refusal": round(1e3 * refusal, 3)},
            "rss_mib": memory.seen_mib, "rss_growth_mib": memory.growth_mib(),
            "ok": sent == answered and not tally.swapped and not tally.lost and not slow and silence_s < SILENT_S and tally.statuses[503] > 0
            and set(tally.statuses) <= {200, 503, 504} and after.statuses[200] == 1 and memory.growth_mib() < 20
            and refusal < MAX_REFUSAL * cost_alone,
        }  # fmt: skip


def segments_resent() -> int | None:
    """TCP segments that this machine has sent again, since it started; None where it does not say."""
    try:
        rows = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:")]
        return int(dict(zip(*rows, strict=True))["RetransSegs"])
    except (OSError, KeyError, ValueError, TypeError):
        return None


def answered_after(port: int, seconds: float) -> int:
    """Requests that the server itself says it answered later than that."""
    counts = counted(port, "mpdeploy_request_duration_seconds_bucket", "le")
    return round(counts["+Inf"] - counts[str(seconds)])


def answers_by_version(port: int) -> dict[str, int]:
    """Version -> requests that the server says it answered, those that have drained too."""
    counts = counted(port, "nv_inference_request_success", "version")
    return {number: round(counts[number]) for number in sorted(counts, key=int)}


def counted(port: int, metric: str, label: str) -> dict[str, float]:
    """Value of a label -> what the server counts."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = response.read().decode().splitlines()
    return {
        line.partition(f'{label}="')[2].partition('"')[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith(f"{metric}{{")
    }


async def kill(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """SIGKILL to one of two processes every few seconds: what it held is lost, everything else is answered."""
    connections = 8
    with serving(folder, "sums", "--workers", 2) as (process, port, log):
        tally, kills = Tally(), 0
        while log.read_text().count(" serves: engine") < 2:
            await asyncio.sleep(0.1)
        end = time.monotonic() + arguments.seconds
        asking = [
            asyncio.ensure_future(until(end, Client(port, tally, seed, "sums").ask)) for seed in range(connections)
        ]
        while time.monotonic() < end - 2:
            await asyncio.sleep(min(4.0, arguments.seconds / 3))
            if log.read_text().count(" serves: engine") == 2 + kills:  # both are up: one goes on while the other starts
                os.kill(_workers(process.pid)[0], signal.SIGKILL)
                kills += 1
        await asyncio.gather(*asking)
        again = time.monotonic() + 20
        while log.read_text().count(" serves: engine") < 2 + kills and time.monotonic() < again:
            await asyncio.sleep(0.2)
        back = log.read_text().count(" serves: engine") - 2
        return {
            "kills": kills, "started_again": back, **tally.to_json(), "lost_a_kill_at_most": connections,
            "ok": kills > 0 and back == kills and not tally.swapped and tally.lost <= connections * kills
            and set(tally.statuses) == {200} and tally.statuses[200] > 100,
        }  # fmt: skip


def _workers(pid: int) -> list[int]:
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


async def reload(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Version after version under load, from two runs in turns: not one request fails, and the server counts answers of each version."""
    connections, fewest = 16, 3
    make_run(folder / "again", "sums")
    with serving(folder, "sums", "--repository", folder) as (_, port, _):
        tally, control, loads = Tally(), Client(port, Tally(), 0, "sums"), []
        end = time.monotonic() + arguments.seconds

        async def ask(client: Client) -> None:
            while not done.is_set():
                await client.ask()

        async def further_answers() -> None:
            """Until one at least was asked for after this call: each connection waits for a single answer."""
            so_far = tally.statuses[200]
            while tally.statuses[200] <= so_far + connections and not all(job.done() for job in asking):
                await asyncio.sleep(0.05)

        done = asyncio.Event()
        asking = [asyncio.ensure_future(ask(Client(port, tally, seed, "sums"))) for seed in range(connections)]
        await further_answers()
        while time.monotonic() < end or len(loads) < fewest:
            run = ("again", "sums")[len(loads) % 2]
            body = json.dumps({"parameters": {"run": run}}).encode()
            loads.append((await control.send("/v2/repository/models/sums/load", body, {}))[0])
            await further_answers()
        done.set()
        await asyncio.gather(*asking)
        by_version = answers_by_version(port)
        good = set(tally.statuses) == {200} and not tally.swapped and not tally.lost and set(loads) == {200}
        return {
            "loads": len(loads), "versions": sum(count > 0 for count in by_version.values()),
            "fewest_answers_of_a_version": min(by_version.values()), **tally.to_json(),
            "ok": good and list(by_version) == [str(number) for number in range(1, len(loads) + 2)]
            and min(by_version.values()) > 0 and sum(by_version.values()) == tally.statuses[200],
        }  # fmt: skip


async def soak(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Steady load from 32 connections, with some that break off: resident memory should not grow."""
    seconds = arguments.minutes * 60
    with serving(folder, "sums") as (process, port, _):
        tally, memory = Tally(), Memory(process.pid, max(0.5, seconds / 60))
        watching = asyncio.ensure_future(memory.watch())
        end = time.monotonic() + seconds
        rng = random.Random(0)

        async def broken() -> None:
            """A client that leaves in the middle of its body."""
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(
                    b"POST /v2/models/sums/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n"
                    + b"x" * rng.randrange(5000)
                )
                await writer.drain()
                writer.close()
            await asyncio.sleep(0.05)

        await asyncio.gather(
            *(until(end, Client(port, tally, seed, "sums").ask) for seed in range(32)), until(end, broken)
        )
        watching.cancel()
        growth, answered = memory.growth_mib(), tally.statuses[200]
        del tally.spans[:-100_000]
        return {
            "minutes": arguments.minutes, "requests": answered, **tally.to_json(), "rss_mib": memory.seen_mib,
            "rss_growth_mib": growth,
            "ok": set(tally.statuses) == {200} and not tally.swapped and not tally.lost and growth < max(5.0, 0.03 * memory.seen_mib[-1]),
        }  # fmt: skip


async def fuzz(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Mutated requests: the REST codec, the gRPC codec, and a live server, so many each."""
    found: dict[str, Any] = {}
    for name, function in (("rest_codec", fuzz_rest), ("grpc_codec", fuzz_grpc)):
        begin = time.monotonic()
        outcomes = function(arguments.count, arguments.seed)
        found[name] = {"inputs": arguments.count, "seconds": round(time.monotonic() - begin, 1), "outcomes": outcomes}
    with serving(folder, "sums", "--header-timeout-s", 2, "--body-timeout-s", 2) as (process, port, log):
        statuses: Counter[str] = Counter()
        begin = time.monotonic()
        requests = mutated_requests(arguments.count, arguments.seed)

        async def one_after_the_other() -> None:
            for content in requests:
                statuses[await thrown(port, content)] += 1

        await asyncio.gather(*(one_after_the_other() for _ in range(16)))
        tally = Tally()
        await Client(port, tally, 1, "sums").ask()
        faults = sum(" fault of the server" in line or "Traceback" in line for line in log.read_text().splitlines())
        found["live_server"] = {
            "inputs": sum(statuses.values()), "seconds": round(time.monotonic() - begin, 1), "answers": dict(sorted(statuses.items())),
            "tracebacks_in_log": faults, "alive": process.poll() is None and tally.statuses[200] == 1,
        }  # fmt: skip
    live = found["live_server"]
    # 504: the change made a deadline that had passed
    wrong = [status for status in live["answers"] if status.startswith(("5", "no")) and status != "504"]
    found["ok"] = live["alive"] and not faults and not wrong
    return found


async def thrown(port: int, content: bytes) -> str:
    """Throw bytes at the server, say that no more will come, and see what it answers first."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(content)
            writer.write_eof()
            line = await asyncio.wait_for(reader.readline(), 20)
        finally:
            writer.close()
    except TimeoutError:
        return "no answer in 20 s"
    except OSError:
        return "closed"
    return line.split()[1].decode("latin-1") if line.startswith(b"HTTP/1.1 ") else "closed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overload", "kill", "reload", "fuzz", "soak"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work = {"overload": overload, "kill": kill, "reload": reload, "fuzz": fuzz, "soak": soak}[arguments.what]
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(work(arguments, Path(folder)))
    print(
        json.dumps(
            {"what": arguments.what, "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **found}, indent=1
        )
    )
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
