"""Models by name and the version of each that serves: requests find their way, new versions take over, old ones drain."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpdeploy.errors import MpdeployError
from mpdeploy.serve.following import Follower, RunWatch
from mpdeploy.serve.instance import Watcher
from mpdeploy.serve.loading import load_version
from mpdeploy.serve.messages import (
    BadRequestError,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ServeError,
    UnavailableServeError,
    UnknownModelError,
)
from mpdeploy.serve.metrics import model_key, models_in, of_model
from mpdeploy.serve.options import ServerOptions
from mpdeploy.serve.repository import Repository, default_name, digest
from mpdeploy.serve.selection import Candidate, Selection, UnknownEngineError
from mpdeploy.serve.shared import Counts, Shared
from mpdeploy.serve.statistics import triton_statistics
from mpdeploy.serve.version import Version
from mpdeploy.serve.watching import watchers_of

log = logging.getLogger("mpdeploy.serve")

TICK_S = 0.05
PUBLISH_EVERY = 10
"""Ticks between two looks at what the processes share."""
FOLLOW_S = 60.0
"""How long a load waits until every process behind the port serves the model too."""


class ModelManager:
    """Every model of this process. Used on one event loop.

    Args:
        options: of the server.
        shared: what the processes behind the port share.
        gauges: more figures of this process, by name.
    """

    def __init__(
        self,
        options: ServerOptions,
        *,
        shared: Shared | None = None,
        gauges: Callable[[], Counts] | None = None,
    ) -> None:
        self.options = options
        self.shared = shared or Shared(None)
        self.stopping = False
        self._repository = Repository(options.repository)
        self._gauges = gauges or dict
        self._versions: dict[str, Version] = {}
        self._failed: dict[str, str] = {}
        self._draining: list[tuple[str, Version]] = []
        self._retired: Counts = {}
        self._follower = Follower(self.shared, self._load_wanted, self._retire_but)
        self._run_watch = RunWatch(self.shared, self.reload)
        self._started = False
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- starting and stopping -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load what should be served: the run of the options, or what the other processes serve by now.

        Raises:
            MpdeployError: it cannot be loaded.
        """
        wanted = self.shared.wanted()
        if not wanted.generation:
            name = self.options.name or default_name(self.options.run)
            model: dict[str, Any] = {"run": str(self.options.run), "version": 1, "engine": self.options.model.engine}
            wanted = self.shared.begin({name: model})
        for name, model in wanted.models.items():
            self._repository.known.setdefault(name, model["run"])
            self._put(name, await self._load(name, model))
        self._follower.generation = wanted.generation
        self._started = True
        self.shared.write_counts(self.counts())
        self._keep(self._tick())

    async def stop(self) -> bool:
        """Drain every model and close it; whether all of it ended in time."""
        self.stopping = True
        ended = [await version.close(self.options.stop_s) for version in self._versions.values()]
        for task in list(self._tasks):
            task.cancel()
        self.shared.write_counts(self.counts())
        return all(ended)

    # -- what transports call ------------------------------------------------------------------------------------------

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer a request.

        Raises:
            ServeError: of the kind that says what happened.
        """
        version = self.version(request.model_name, request.model_version)
        return version.response(request, await version.infer(request))

    def serves(self, name: str, version: str | None) -> bool:
        """Whether there is such a model, of this version where one is named."""
        found = self._versions.get(name)
        return found is not None and (not version or version == found.number)

    def version(self, name: str, version: str | None = None) -> Version:
        """The version that serves.

        Raises:
            UnknownModelError: there is none of this name or number.
        """
        found = self._versions.get(name)
        if found is None or (version and version != found.number):
            raise self._unknown(name, version)
        return found

    def metadata(self, name: str, version: str | None = None) -> ModelMetadata:
        """What a client may know of a model.

        Raises:
            UnknownModelError: there is none of this name or number.
        """
        return self.version(name, version).metadata

    def ready(self, name: str, version: str | None = None) -> bool:
        """Whether a model answers requests now; False where there is none."""
        found = self._versions.get(name)
        return found is not None and (not version or version == found.number) and found.ready and not self.stopping

    def server_ready(self) -> bool:
        """Whether the server should be sent requests."""
        return self._started and not self.stopping and all(version.ready for version in self._versions.values())

    def index(self) -> list[dict[str, Any]]:
        """Every model that is loaded, failed to load, or lies in the repository."""
        listed = {
            name: {
                "name": name,
                "version": version.number,
                "state": "READY" if version.ready else "UNAVAILABLE",
                "reason": version.dead or self._failed.get(name, ""),
            }
            for name, version in self._versions.items()
        }
        for name in (*self._repository.names(), *self._failed):
            listed.setdefault(
                name,
                {"name": name, "version": "", "state": "UNAVAILABLE", "reason": self._failed.get(name, "not loaded")},
            )
        return list(listed.values())

    def statistics(self, name: str | None = None, version: str | None = None) -> dict[str, Any]:
        """Triton's statistics, summed over the processes behind the port.

        Raises:
            UnknownModelError: there is none of this name or number.
        """
        if name:
            self.version(name, version)
        counts = self.all_counts()
        return {
            "model_stats": [
                triton_statistics(each, number, of_model(counts, each, number))
                for each, number in models_in(counts)
                if each in self._versions and self._versions[each].number == number and name in (None, "", each)
            ]
        }

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load a model, or its next version beside the one that serves, and swap once it is warm; wait for the other processes to follow.

        Args:
            name: of the model.
            parameters: `run`: a run directory inside the repository; without it the model's run is read again.
                `engine`: this engine and no other.

        Raises:
            BadRequestError: parameters that mean nothing here.
            UnknownModelError: no such run directory.
            ServeError: it cannot be loaded, and what served before serves on; or another process has not followed in time.
        """
        self._may_change()
        await self._load_next(name, parameters)
        until = time.monotonic() + FOLLOW_S
        while behind := self._behind(name):
            if time.monotonic() > until:
                raise UnavailableServeError(
                    f"{name} is loaded here; other processes that have not followed within {FOLLOW_S:g} s, "
                    f"and try again: {behind}. The server's log says why"
                )
            await asyncio.sleep(TICK_S)

    def _behind(self, name: str) -> int:
        """Other processes that do not yet serve the version that is wanted."""
        model = self.shared.wanted().models.get(name)
        if model is None:
            return 0
        key = model_key(name, str(model["version"]), "gauge/pending")
        return sum(living and key not in counts for counts, living in self.shared.others())

    async def _load_next(self, name: str, parameters: Mapping[str, Any]) -> None:
        with self.shared.changing():
            models = dict(self.shared.wanted().models)
            model = self._next(name, parameters, models.get(name))
            if model is None:
                return  # its run has not changed
            try:
                version = await self._load(name, model)
            except MpdeployError as error:
                if isinstance(error, UnknownEngineError) and "engine" in parameters:
                    raise BadRequestError(f"its run has no engine {model['engine'][:80]!r}; {error.hint}") from error
                self._failed[name] = error.message
                log.error("%s cannot be loaded from %s: %s", name, model["run"], error.message)
                raise UnavailableServeError(f"{name} cannot be loaded: {error.message}") from error
            self._put(name, version)
            models[name] = model
            self._publish(models)

    async def unload(self, name: str) -> None:
        """Stop serving a model, once its requests have been answered.

        Raises:
            UnknownModelError: there is none of this name.
        """
        self._may_change()
        with self.shared.changing():
            if name not in self._versions:
                raise self._unknown(name, None)
            models = dict(self.shared.wanted().models)
            models.pop(name, None)
            self._publish(models)
            self._retire(name)

    async def reload(self) -> bool:
        """Read every model's run again and swap where it changed; a run that cannot be loaded changes nothing, and the answer is False."""
        done = True
        for name in list(self._versions):
            try:
                await self._load_next(name, {})
            except ServeError as error:  # what served before serves on
                log.error("%s is not read again: %s", name, error.message)
                done = False
        return done

    # -- figures -------------------------------------------------------------------------------------------------------

    def counts(self) -> Counts:
        """All counters and gauges of this process."""
        counts: Counts = dict(self._retired)
        for name, version in (*self._versions.items(), *self._draining):
            counts |= version.counts(name)
        counts["gauge/processes"] = 1
        return counts | self._gauges()

    def all_counts(self) -> Counts:
        """Those of all processes behind the port."""
        return self.shared.sum_counts(self.counts())

    def versions(self) -> list[Version]:
        """Every version that serves."""
        return list(self._versions.values())

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _load(self, name: str, model: Mapping[str, Any]) -> Version:
        path = Path(model["run"])
        found = digest(path)
        options = replace(self.options.model, engine=model.get("engine"))
        version = await load_version(
            name, int(model["version"]), path, options, share=self.options.workers, watchers=self._watchers
        )
        version.digest = found
        return version

    def _watchers(self, selection: Selection, candidate: Candidate) -> tuple[Watcher, ...]:
        return watchers_of(selection, candidate, self.options.model)

    def _put(self, name: str, version: Version) -> None:
        """Swap: from here on requests go to `version`; the one before drains."""
        version.serve()
        before = self._versions.get(name)
        self._versions[name] = version
        self._failed.pop(name, None)
        notes = version.metadata.notes
        log.info("%s %s serves: engine %s, verdict %s", name, version.number, notes["engine"], notes["verdict"])
        if before is not None:
            self._drain(name, before)

    def _retire(self, name: str) -> None:
        self._drain(name, self._versions.pop(name))

    def _retire_but(self, wanted: Collection[str]) -> None:
        for name in set(self._versions) - set(wanted):
            self._retire(name)

    def _drain(self, name: str, version: Version) -> None:
        async def drain() -> None:
            await version.close(self.options.stop_s)
            self._draining.remove((name, version))
            self._retired |= {key: value for key, value in version.counts(name).items() if "gauge/" not in key}
            log.info("%s %s has drained", name, version.number)

        self._draining.append((name, version))
        self._keep(drain())

    def _next(
        self, name: str, parameters: Mapping[str, Any], current: Mapping[str, Any] | None
    ) -> dict[str, Any] | None:
        """What to load, or None where nothing changed and its engine lives, in every process."""
        model = self._repository.asked(name, parameters, current)
        again = current is not None and (model["run"], model["engine"]) == (current["run"], current.get("engine"))
        serving, counts = self._versions.get(name), self.all_counts()
        if again and serving is not None:
            dead = of_model(counts, name, serving.number).get("gauge/dead")
            if not dead and serving.digest == digest(Path(model["run"])):
                return None
        seen = [int(number) for each, number in models_in(counts) if each == name]
        model["version"] = max([int((current or {}).get("version", 0)), *seen], default=0) + 1
        return model

    def _may_change(self) -> None:
        if self.options.read_only:
            raise BadRequestError("this server is read-only: it loads and unloads nothing")
        if self.stopping:
            raise UnavailableServeError("the server is stopping")

    def _unknown(self, name: str, version: str | None) -> Exception:
        if self.stopping or not self._started:
            return UnavailableServeError("the server is starting or stopping")
        if name in self._versions:
            found = self._versions[name].number
            return UnknownModelError(f"model '{name}' has no version {str(version)[:40]!r}; {found} is served")
        return UnknownModelError(f"there is no model {name[:80]!r}; loaded: {', '.join(self._versions) or 'none'}")

    def _keep(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _publish(self, models: Mapping[str, dict[str, Any]]) -> None:
        up_to_date = self._follower.generation == self.shared.wanted().generation
        generation = self.shared.publish(models).generation
        if up_to_date:  # else there is what the other processes have changed before
            self._follower.generation = generation

    async def _tick(self) -> None:
        count = 0
        while True:
            await asyncio.sleep(TICK_S)
            count += 1
            try:
                for version in (*self._versions.values(), *(version for _, version in self._draining)):
                    version.tick()
                if count % PUBLISH_EVERY == 0:
                    if not self.shared.alone:
                        self.shared.write_counts(self.counts())
                        self._follower.look(self._keep)
                    if self.options.watch:
                        self._run_watch.look(self._keep)
            except Exception:
                log.exception("a fault of the server's own housekeeping")

    async def _load_wanted(self, name: str, model: Mapping[str, Any]) -> bool:
        """Serve this version, unless another is wanted once it is loaded; False where it cannot be loaded."""
        serving = self._versions.get(name)
        if serving is not None and int(serving.number) == int(model["version"]):
            return True
        try:
            version = await self._load(name, model)
        except MpdeployError as error:
            self._failed[name] = error.message
            log.error("%s %s cannot be loaded here: %s", name, model["version"], error.message)
            return False
        if self.shared.wanted().models.get(name) == model:
            self._put(name, version)
            self.shared.write_counts(self.counts())
        else:
            version.serve()
            await version.close(self.options.stop_s)
        return True
