"""`mpdeploy serve RUN`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mpdeploy.cli.common import EngineName, Json, RunPath, console, emit, plain, verdict_markup
from mpdeploy.errors import UsageError

MIB = 2**20
_Option = typer.Option


def serve(
    run: RunPath,
    engine: EngineName = None,
    host: Annotated[str, _Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, _Option("--port", help="0 takes any that is free.")] = 8000,
    grpc_port: Annotated[int | None, _Option("--grpc-port", help="Also serve gRPC there (extra `grpc`).")] = None,
    name: Annotated[str | None, _Option("--name", help="The model's name; by default the pipeline's.")] = None,
    allow_failed: Annotated[
        bool,
        _Option(
            "--allow-failed", help="Serve an engine whose verdict is fail or unvalidated; metadata and logs say so."
        ),
    ] = False,
    server: Annotated[
        Literal["own", "triton"], _Option("--server", help="triton: start a tritonserver found on this machine.")
    ] = "own",
    workers: Annotated[int, _Option("--workers", help="Processes behind the port, on a CPU.")] = 1,
    devices: Annotated[str, _Option("--devices", metavar="0,1", help="One process for each of these GPUs.")] = "",
    instances: Annotated[int, _Option("--instances", help="Engines on each device.")] = 1,
    threads: Annotated[
        int | None, _Option("--threads", help="An engine's threads; by default its share of the cores.")
    ] = None,
    max_queue: Annotated[int, _Option("--max-queue", help="Requests that may wait; more get 503.")] = 1024,
    delay_ms: Annotated[float, _Option("--delay-ms", help="How long a batch that is not full waits for more.")] = 0.0,
    inline_ms: Annotated[
        float | None,
        _Option(
            "--inline-ms",
            help="Batches this quick need no thread of their own; 0: all do. By default 0.5, on one core 5.",
        ),
    ] = None,
    pad: Annotated[
        list[str] | None,
        _Option(
            "--pad",
            metavar="AXIS=N,N,...",
            help="Fill this axis up to the next of these lengths, so that texts share batches.",
        ),
    ] = None,
    deadline_s: Annotated[float, _Option("--deadline-s", help="Of requests that set none.")] = 30.0,
    repository: Annotated[
        Path | None, _Option("--repository", metavar="DIR", help="Folder of runs that a client may load.")
    ] = None,
    read_only: Annotated[bool, _Option("--read-only", help="Refuse load and unload.")] = False,
    watch: Annotated[bool, _Option("--watch", help="Load the run again when it changes.")] = False,
    shadow_rate: Annotated[
        float, _Option("--shadow-rate", help="Share of requests that the FP32 model computes too.")
    ] = 0.0,
    shadow_limit: Annotated[float, _Option("--shadow-limit", help="Drift (rel L2) that raises the alert.")] = 1e-2,
    record: Annotated[
        Path | None, _Option("--record", metavar="DIR", help="Write sampled requests there, for `convert --data DIR`.")
    ] = None,
    record_rate: Annotated[float, _Option("--record-rate", help="Share of requests that are written.")] = 0.01,
    record_max: Annotated[
        int, _Option("--record-max", help="Samples that are written in all, by each process of --workers.")
    ] = 4096,
    max_body_mb: Annotated[float, _Option("--max-body-mb", help="Largest request.")] = 64,
    max_inflight_mb: Annotated[
        float,
        _Option("--max-inflight-mb", help="All requests and answers held at a time, with what clients do not fetch."),
    ] = 512,
    max_connections: Annotated[int, _Option("--max-connections", help="Open at a time.")] = 2048,
    header_timeout_s: Annotated[
        float, _Option("--header-timeout-s", help="For a request's head to arrive; slower peers are cut off.")
    ] = 10.0,
    body_timeout_s: Annotated[
        float, _Option("--body-timeout-s", help="For its body, and longer where it comes faster than 64 KiB/s.")
    ] = 30.0,
    drain_s: Annotated[float, _Option("--drain-s", help="Answer on, not ready, for so long before stopping.")] = 0.0,
    stop_s: Annotated[float, _Option("--stop-s", help="How long requests in flight may take then.")] = 30.0,
    tls_cert: Annotated[Path | None, _Option("--tls-cert", metavar="PEM", help="Certificate.")] = None,
    tls_key: Annotated[Path | None, _Option("--tls-key", metavar="PEM", help="Its key.")] = None,
    token_file: Annotated[
        Path | None, _Option("--token-file", metavar="FILE", help="Bearer token; or set MPDEPLOY_SERVE_TOKEN.")
    ] = None,
    access_log: Annotated[
        str | None, _Option("--access-log", metavar="FILE|-", help="One JSON line a request; - for stderr.")
    ] = None,
    log_format: Annotated[
        Literal["auto", "json", "text"], _Option("--log-format", help="auto: text on a terminal, else JSON.")
    ] = "auto",
    otlp: Annotated[
        str | None, _Option("--otlp-endpoint", metavar="URL", help="OpenTelemetry traces over OTLP/HTTP.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve an engine that passed its gates: Open Inference Protocol (V2) over HTTP and, if asked, gRPC."""
    from mpdeploy.serve.options import ModelOptions, ServerOptions

    model = ModelOptions(
        engine=engine,
        allow_failed=allow_failed,
        instances=instances,
        threads=threads,
        max_queue=max_queue,
        delay_ms=delay_ms,
        inline_ms=inline_ms,
        pad=tuple(_lengths(text) for text in pad or ()),
        deadline_s=deadline_s,
        shadow_rate=shadow_rate,
        shadow_limit=shadow_limit,
        record=record,
        record_rate=record_rate,
        record_max=record_max,
    )
    options = ServerOptions(
        run=run,
        name=name,
        host=host,
        port=port,
        grpc_port=grpc_port,
        model=model,
        repository=repository,
        read_only=read_only,
        watch=watch,
        workers=workers,
        devices=tuple(part.strip() for part in devices.split(",") if part.strip()),
        max_body_bytes=int(max_body_mb * MIB),
        max_inflight_bytes=int(max_inflight_mb * MIB),
        max_connections=max_connections,
        header_timeout_s=header_timeout_s,
        body_timeout_s=body_timeout_s,
        drain_s=drain_s,
        stop_s=stop_s,
        tls_cert=tls_cert,
        tls_key=tls_key,
        token=_token(token_file),
        access_log=access_log,
        log_format=("text" if sys.stderr.isatty() else "json") if log_format == "auto" else log_format,
        otlp_endpoint=otlp,
    )
    tell = _log if options.log_format == "json" and server == "own" else _tell
    raise typer.Exit(_serve(options, server, emit if as_json else tell))


def _serve(options: Any, server: str, on_ready: Any) -> int:
    if server == "triton":
        from mpdeploy.serve.triton_server import serve_with_triton

        return serve_with_triton(options, on_ready=on_ready)
    from mpdeploy.serve.start import serve as run_server

    return run_server(options, on_ready)


def _lengths(text: str) -> tuple[str, tuple[int, ...]]:
    """`sequence=16,32` -> ("sequence", (16, 32)).

    Raises:
        UsageError: it is not of that form.
    """
    axis, _, sizes = text.partition("=")
    parts = [part.strip() for part in sizes.split(",")]
    if not axis.strip() or not all(part.isdigit() for part in parts):
        raise UsageError(f"--pad {text!r} is not of the form AXIS=N,N,...", hint="--pad sequence=16,32,64")
    return axis.strip(), tuple(map(int, parts))


def _token(path: Path | None) -> str | None:
    """From the file, else from the environment: never from an argument, which every user of the machine can read."""
    from mpdeploy.errors import UsageError

    if path is None:
        return os.environ.get("MPDEPLOY_SERVE_TOKEN") or None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The token file {path} cannot be read: {error}.") from error


def _tell(document: dict[str, Any]) -> None:
    out = console()
    where = f"{document['url']}/v2/models/{document['model']}"
    out.print(
        f"{plain(where)}: engine {document['engine']} ({document['precision']}), verdict ",
        verdict_markup(document["verdict"]),
        sep="",
    )
    for warning in document["warnings"]:
        out.print(f"[yellow]warning[/]  {plain(warning)}")
    if document["grpc"]:
        out.print(f"gRPC on {document['grpc']}")
    out.print(f"[dim]{plain(document['url'])}/ shows it in a browser; Ctrl-C stops it[/]")


def _log(document: dict[str, Any]) -> None:
    """Where it listens, as a line of the log, which says the rest already: what reads it must find nothing but JSON there."""
    import logging

    grpc = f", gRPC on {document['grpc']}" if document["grpc"] else ""
    logging.getLogger("mpdeploy.serve").info("listening: %s/v2/models/%s%s", document["url"], document["model"], grpc)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("serve")(serve)
