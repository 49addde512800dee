"""`mpdeploy serve RUN`: in this process, or in several behind one port."""

from __future__ import annotations

import contextlib

from mpdeploy.serve.connection import connection_class
from mpdeploy.serve.options import ServerOptions
from mpdeploy.serve.server import Ready, bound_socket, run_process, uvloop_module
from mpdeploy.serve.workers import run_workers


def serve(options: ServerOptions, on_ready: Ready | None = None) -> int:
    """Serve a run, in one process or several, until a signal says otherwise; the exit code.

    Raises:
        MpdeployError: the run cannot be served, or the port cannot be had.
    """
    uvloop_module()  # before the port is taken: what is missing is told first
    connection_class()
    with contextlib.closing(bound_socket(options.host, options.port)) as bound:
        if options.num_processes == 1 and not options.devices:
            return run_process(options, bound, on_ready=on_ready)
        return run_workers(options, bound, on_ready=on_ready)
