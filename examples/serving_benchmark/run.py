"""mpdeploy's server against raw ONNX Runtime and against other servers: one command, ratios of one run, server and client on a core each.

python run.py                              all of it, about 10 minutes; environments of the peers are made below --venvs
python run.py --no-peers                   mpdeploy and raw ONNX Runtime alone
python run.py --quick                      a look, in 20 seconds; its numbers are not to be quoted

Writes results.json and results.md into --output.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from load import Call, Load, cpu_seconds, free_port, load, pin, running, stolen_since, tool
from models import RAW, SAMPLE_SHAPES, make_run
from peers import PEERS, environment, v2_call

from mpdeploy.environment import package_version

CONNECTIONS = (1, 16, 64)
CONSTANT = """
import uvicorn
async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"180")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"x" * 180})
uvicorn.run(app, port=%d, log_level="error", access_log=False, lifespan="off")
"""
"""The floor: the same HTTP server with an application that reads the request and answers a constant."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--venvs", type=Path, default=Path("venvs"), help="where the peers' environments are, or are made"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path())
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.no_peers, arguments.seconds, arguments.rounds = True, 1.0, 1
    cores = sorted(os.sched_getaffinity(0))
    server_core, client_core = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    if server_core is None:
        print("one core only: server and client share it, and the ratios mean little")
    found = Benchmark(arguments, server_core, client_core).measure()
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    text = as_markdown(found)
    (arguments.output / "results.md").write_text(text)
    print(text)


class Benchmark:
    """Measures in rounds: each round asks every server once at every number of connections, between two looks at raw ORT."""

    def __init__(self, arguments: argparse.Namespace, server_core: int | None, client_core: int | None) -> None:
        self.arguments = arguments
        self.server_core, self.client_core = server_core, client_core
        self.rows: dict[tuple[str, str, str, int], list[Load]] = {}
        self.raw: dict[str, list[dict[str, Any]]] = {}
        self.skipped: dict[str, str] = {}

    def measure(self) -> dict[str, Any]:
        load_before = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for model in ("mlp",) if self.arguments.quick else ("mlp", "cnn"):
                run = make_run(folder / model, model)
                file = run / "20-export" / "model.fp32.onnx"
                for _ in range(self.arguments.rounds):
                    self.round(model, run, file, folder)
        return {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": machine(load_before),
            "load_tool": tool(),
            "raw": {model: _raw_medians(rounds) for model, rounds in self.raw.items()},
            "rows": [
                {"model": key[0], "server": key[1], "protocol": key[2], "connections": key[3], **_medians(loads)}
                for key, loads in self.rows.items()
            ],
            "ratios": self.ratios(),
            "skipped": self.skipped,
        }

    def round(self, model: str, run: Path, file: Path, folder: Path) -> None:
        sample = np.random.default_rng(0).standard_normal(SAMPLE_SHAPES[model]).astype(np.float32)
        self.look_at_raw(model, file)
        if model == "mlp":
            self.constant(folder, sample)
        self.ours(model, run, sample, folder)
        self.look_at_raw(model, file)
        if self.arguments.no_peers or model != "mlp":
            return
        for peer in PEERS:
            venv, why = environment(peer, self.arguments.venvs.resolve())
            if venv is None:
                self.skipped[peer.name] = why
                continue
            with tempfile.TemporaryDirectory(dir=folder) as place:
                port = free_port()
                server = peer.prepare(venv, Path(place), file, port)
                url, log = f"http://127.0.0.1:{port}", folder / f"{peer.prepare.__name__}.log"
                try:
                    with running(
                        server.command, url + server.ready, log, self.server_core, server.env, Path(place)
                    ) as process:
                        self.ask(model, peer.name, peer.protocol, url, server.call, process.pid)
                except RuntimeError as error:
                    self.skipped[peer.name] = str(error)

    def look_at_raw(self, model: str, file: Path) -> None:
        seconds = min(1.0, self.arguments.seconds / 2)
        done = subprocess.run(
            [sys.executable, "-c", RAW, str(file), json.dumps(SAMPLE_SHAPES[model]), str(seconds)],
            capture_output=True, text=True, check=True, preexec_fn=lambda: pin(self.server_core),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.raw.setdefault(model, []).append(json.loads(done.stdout))

    def constant(self, folder: Path, sample: np.ndarray) -> None:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        with running(
            [sys.executable, "-c", CONSTANT % port], url, folder / "constant.log", self.server_core
        ) as process:
            call = v2_call("/", sample, binary=True)
            self.ask("mlp", "uvicorn, a constant", "HTTP", url, call, process.pid, (64,))

    def ours(self, model: str, run: Path, sample: np.ndarray, folder: Path) -> None:
        port, grpc_port = free_port(), free_port()
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mpdeploy", "serve", run, "--port", port, "--log-format", "json"]
        if not self.arguments.quick:
            command += ["--grpc-port", grpc_port]
        with running(command, url + "/v2/health/ready", folder / "mpdeploy.log", self.server_core) as process:
            for protocol, binary in (("V2 binary", True), ("V2 JSON", False)):
                call = v2_call(f"/v2/models/{model}/infer", sample, binary=binary)
                self.ask(model, "mpdeploy", protocol, url, call, process.pid)
            if self.arguments.quick or model != "mlp":
                return
            for connections in CONNECTIONS:
                pin_before = os.sched_getaffinity(0)
                pin(self.client_core)
                before, times = cpu_seconds(process.pid), psutil.cpu_times()
                try:
                    one = asyncio.run(
                        over_grpc(f"127.0.0.1:{grpc_port}", model, sample, connections, self.arguments.seconds)
                    )
                except ImportError as error:
                    self.skipped["mpdeploy, gRPC"] = str(error)
                    return
                finally:
                    os.sched_setaffinity(0, pin_before)
                spent = cpu_seconds(process.pid) - before
                count = max(1.0, one.requests_per_s * self.arguments.seconds)
                one = replace(one, cpu_us=1e6 * spent / count, stolen=stolen_since(times))
                self.rows.setdefault((model, "mpdeploy", "gRPC", connections), []).append(one)

    def ask(
        self,
        model: str,
        name: str,
        protocol: str,
        url: str,
        call: Call,
        pid: int,
        counts: tuple[int, ...] = (),
    ) -> None:
        first = load(url, call, 4, 1.0, self.client_core)  # the first requests of a server are not like the others
        if first.failed:
            raise RuntimeError(f"{first.failed} of its first requests failed")
        for connections in counts or ((1, 64) if self.arguments.quick else CONNECTIONS):
            one = load(url, call, connections, self.arguments.seconds, self.client_core, pid)
            self.rows.setdefault((model, name, protocol, connections), []).append(one)
            print(f"{model:4} {name:24} {protocol:10} c={connections:<3} {one.requests_per_s:8.0f}/s  "
                  f"p50 {one.p50_ms:7.2f} ms  p99 {one.p99_ms:7.2f} ms  failed {one.failed}", flush=True)  # fmt: skip

    def ratios(self) -> dict[str, dict[str, Any]]:
        """What the targets are about: each a ratio within this run, of medians over its rounds."""
        found: dict[str, dict[str, Any]] = {}

        def median(model: str, server: str, protocol: str, connections: int) -> dict[str, Any] | None:
            loads = self.rows.get((model, server, protocol, connections))
            return _medians(loads) if loads else None

        def note(what: str, value: float, target: str, met: bool) -> None:
            found[what] = {"value": round(value, 3), "target": target, "met": met}

        for model, connections, share in (("mlp", 64, 0.14), ("cnn", 16, 0.65)):
            one = median(model, "mpdeploy", "V2 binary", connections)
            if one and model in self.raw:
                raw = _raw_medians(self.raw[model])["batch 32"]["samples_per_s"]
                value = one["requests_per_s"] / raw
                note(
                    f"{model}, binary, c={connections}: share of raw batch-32 throughput",
                    value,
                    f">= {share}",
                    value >= share,
                )
                value = _raw_medians(self.raw[model])["batch 32"]["cpu_us"] / one["cpu_us"]
                note(
                    f"{model}, binary, c={connections}: the same in processor time",
                    value,
                    f">= {share}",
                    value >= share,
                )
        one, many = median("mlp", "mpdeploy", "V2 binary", 1), median("mlp", "mpdeploy", "V2 binary", 64)
        if one and many:
            over = one["p50_ms"] - _raw_medians(self.raw["mlp"])["batch 1"]["p50_ms"]
            note("mlp, binary, c=1: ms over raw", over, "<= 0.3", over <= 0.3)
            spread = many["p99_ms"] / many["p50_ms"]
            note("mlp, binary, c=64: p99 / p50", spread, "<= 2", spread <= 2)
            for peer in PEERS:
                theirs = median("mlp", peer.name, peer.protocol, 64)
                if theirs and theirs["requests_per_s"]:
                    least = 1.0 if peer.name.startswith("Triton") else 8.0
                    value = many["requests_per_s"] / theirs["requests_per_s"]
                    note(f"mlp, c=64: mpdeploy / {peer.name}", value, f">= {least:g}", value >= least)
        return found


async def over_grpc(address: str, model: str, sample: np.ndarray, concurrent: int, seconds: float) -> Load:
    """The same over gRPC, by coroutines in this process: Python's client is about as fast as Python's server."""
    import grpc

    from mpdeploy.serve.grpc_messages import SERVICE, load_protocol

    messages = load_protocol().messages
    message = messages["ModelInferRequest"](model_name=model)
    message.inputs.add(name="x", datatype="FP32", shape=[1, *sample.shape])
    message.raw_input_contents.append(sample.tobytes())
    times: list[float] = []
    async with grpc.aio.insecure_channel(address) as channel:
        infer = channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            request_serializer=messages["ModelInferRequest"].SerializeToString,
            response_deserializer=messages["ModelInferResponse"].FromString,
        )
        end = time.perf_counter() + seconds

        async def ask() -> None:
            while (begin := time.perf_counter()) < end:
                await infer(message)
                times.append(time.perf_counter() - begin)

        await asyncio.gather(*(ask() for _ in range(concurrent)))
    times.sort()
    return Load(len(times) / seconds, 1e3 * times[len(times) // 2], 1e3 * times[len(times) * 99 // 100], 0)


def _medians(loads: list[Load]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in asdict(loads[0]):
        values = [value for one in loads if (value := getattr(one, key)) is not None]
        found[key] = (sum(values) if key == "failed" else round(statistics.median(values), 3)) if values else None
    return found


def _raw_medians(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        f"batch {batch}": {
            key: round(statistics.median(one[batch][key] for one in rounds), 4) for key in rounds[0][batch]
        }
        for batch in ("1", "32")
    }


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def machine(load_before: float) -> dict[str, Any]:
    """Hardware and versions, for whoever reads the numbers."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    names = ("mpdeploy", "onnxruntime", "numpy", "uvicorn", "uvloop", "httptools", "orjson", "grpcio")
    return {
        "cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform(),
        "load_average_before": round(load_before, 2),
        "packages": {name: package_version(name) for name in names},
    }  # fmt: skip


def as_markdown(found: dict[str, Any]) -> str:
    where = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    lines = [
        f"{found['date']}, `{found['command']}`: {where['cpu']}, {where['cores']} cores, Python {where['python']}, load average "
        f"{where['load_average_before']} before; load by {found['load_tool']}. {versions}.", "",
    ]  # fmt: skip
    for model, raw in found["raw"].items():
        lines.append(
            f"Raw `session.run`, {model}: {raw['batch 1']['samples_per_s']:,.0f} samples/s in batches of 1 "
            f"({raw['batch 1']['p50_ms']:.3f} ms), {raw['batch 32']['samples_per_s']:,.0f} in batches of 32.  "
        )
    lines += [
        "",
        "| model | server | protocol | c | req/s | p50 ms | p99 ms | server CPU µs/req | stolen % | failed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['server']} | {row['protocol']} | {row['connections']} | {row['requests_per_s']:,.0f} | "
        f"{row['p50_ms']:.2f} | {row['p99_ms']:.2f} | {row['cpu_us'] or 0:.0f} | {_or_dash(row['stolen'])} | {row['failed']} |"
        for row in found["rows"]
    ]
    lines += ["", "| ratio | value | target | met |", "|---|---|---|---|"]
    lines += [
        f"| {what} | {one['value']:g} | {one['target']} | {'yes' if one['met'] else 'no'} |"
        for what, one in found["ratios"].items()
    ]
    lines += ["", *(f"Left out: {name}: {why}" for name, why in found["skipped"].items())]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
