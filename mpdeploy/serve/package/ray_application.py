"""Our server inside Ray Serve: each replica loads the packaged run as `mpdeploy serve` does and answers the same protocol.

Ray brings the proxies, the replicas and their scaling; which engine may run, how requests become batches and what is refused is decided
by the same code as everywhere else. So batches are those of our own batcher, which knows the engine's profile, and not `serve.batch`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpdeploy.errors import MissingExtraError, MpdeployError, UsageError
from mpdeploy.serve.options import ModelOptions, ServerOptions

if TYPE_CHECKING:
    from mpdeploy.serve.manager import ModelManager

DEPLOYMENT = "Model"
ARGUMENTS = ("run", "name", "engine", "allow_failed", "threads", "max_queue")


def server_options(arguments: Mapping[str, Any]) -> ServerOptions:
    """What the application's `args` mean to a server.

    Raises:
        UsageError: there is no such argument, or `run` is missing.
    """
    unknown = [key for key in arguments if key not in ARGUMENTS]
    if unknown or "run" not in arguments:
        raise UsageError(
            f"args: {unknown[0]!r} is no argument." if unknown else "args: 'run' is missing.",
            hint=f"known are {', '.join(ARGUMENTS)}",
        )
    given = {key: arguments[key] for key in ("engine", "allow_failed", "threads", "max_queue") if key in arguments}
    model = ModelOptions(**given)
    return ServerOptions(Path(arguments["run"]), name=arguments.get("name"), model=model, read_only=True)


def build(arguments: Mapping[str, Any]) -> Any:
    """The Serve application; Ray calls it with the `args` of the configuration.

    Raises:
        UsageError: see `server_options`.
        MissingExtraError: Ray is not installed.
    """
    options = server_options(arguments)
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtraError("Ray Serve is not installed.", hint="pip install 'ray[serve]'") from error

    @serve.deployment(name=DEPLOYMENT)
    @serve.ingress(RunApplication(options))
    class Model:
        """A replica: one loaded run."""

        app: RunApplication  # Ray's: the application above, as it came to this replica

        async def check_health(self) -> None:
            """Ray replaces a replica that raises here."""
            if not self.app.ready:
                raise RuntimeError("the model does not answer")

    return Model.bind()  # type: ignore[attr-defined]


class RunApplication:
    """A run as an ASGI application that loads it when the lifespan begins and drains when it ends; travels unloaded."""

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self._manager: ModelManager | None = None
        self._answer: Any = None

    @property
    def ready(self) -> bool:
        """Whether it answers."""
        return self._manager is not None and self._manager.server_ready()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _live(self, receive: Any, send: Any) -> None:
        from mpdeploy.serve.app import App
        from mpdeploy.serve.manager import ModelManager

        await receive()
        try:
            self._manager = ModelManager(self._options)
            await self._manager.start()
            self._answer = App(self._manager, self._options)
        except MpdeployError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._manager.stop()
        await send({"type": "lifespan.shutdown.complete"})
