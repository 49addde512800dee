"""Loading a version: the first engine of a run that can be served here, with its instances warm and ready."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpdeploy.artifact import Engine, Runner
from mpdeploy.engines import backend
from mpdeploy.errors import BuildError, MpdeployError
from mpdeploy.serve.instance import Done, Instance, Watcher
from mpdeploy.serve.messages import ModelMetadata
from mpdeploy.serve.options import ModelOptions
from mpdeploy.serve.selection import Candidate, Selection, select
from mpdeploy.serve.version import Loaded, Version
from mpdeploy.serve.warmup import Prepared, Samples, prepare

log = logging.getLogger("mpdeploy.serve")
CPU_BACKENDS = ("onnxruntime", "openvino")
INLINE_MS = 0.5
INLINE_ONE_CORE_MS = 5.0
"""`ModelOptions.inline_ms` where it is not given. On one core an engine's own thread computes nothing beside the event loop's."""
PLATFORMS = {
    "onnxruntime": "onnxruntime_onnx",
    "openvino": "openvino",
    "tensorrt": "tensorrt_plan",
    "tensorrt-rtx": "tensorrt_rtx_plan",
}


async def load_version(
    name: str,
    number: int,
    run: Path,
    options: ModelOptions,
    *,
    share: int = 1,
    watchers: Callable[[Selection, Candidate], tuple[Watcher, ...]] | None = None,
) -> Version:
    """Load and warm the first engine of a run that can be served here. It serves once `Version.serve` is called.

    Args:
        name: of the model.
        number: of the version.
        run: the run directory.
        options: how.
        share: processes that share this machine's cores.
        watchers: makes what sees the engine's work.

    Raises:
        MpdeployError: see `selection.select`; nothing is left running.
    """
    loop = asyncio.get_running_loop()
    selection = await loop.run_in_executor(
        None, lambda: select(run, engine=options.engine, allow_failed=options.allow_failed)
    )
    for candidate in selection.candidates:
        made: tuple[Watcher, ...] = ()
        try:
            if watchers is not None:
                made = await loop.run_in_executor(None, watchers, selection, candidate)
            relay = _Relay()
            loaded = await _load(name, number, candidate, selection, options, share, relay, made)
        except MpdeployError as error:
            selection.refuse(candidate.name, error)
            log.warning("%s of %s is not served: %s", candidate.name, run, error.message)
            continue
        version = Version(name, number, loaded, _metadata(name, str(number), loaded, selection), options, made)
        relay.version = version
        for warning in (*candidate.warnings, *loaded.prepared.warnings):
            log.warning("%s %s (%s): %s", name, version.number, candidate.name, warning)
        return version
    raise selection.nothing_left()


class _Relay:
    """Stands between instances, which are there first, and the version that is made of them."""

    version: Version | None = None

    def deliver(self, done: Done) -> None:
        assert self.version is not None
        self.version.deliver(done)

    def died(self, error: BaseException) -> None:
        if self.version is not None:
            self.version.died(error)


async def _load(
    name: str,
    number: int,
    candidate: Candidate,
    selection: Selection,
    options: ModelOptions,
    share: int,
    relay: _Relay,
    watchers: tuple[Watcher, ...],
) -> Loaded:
    loop = asyncio.get_running_loop()
    engine = await loop.run_in_executor(None, candidate.opened)
    engine = with_threads(engine, options.threads or max(1, usable_cores() // (options.instances * share)))
    model = selection.model
    names = {spec.name: spec for spec in (*model.inputs, *model.outputs)} if model is not None else {}
    samples = await loop.run_in_executor(None, Samples, selection.golden)

    def prepare_one(runner: Runner) -> Prepared:
        return prepare(engine, runner, names, samples, limit_s=options.warmup_s, pad=options.pad)

    instances: list[Instance] = []
    try:
        prepared = []
        for index in range(options.instances):
            instance = Instance(
                f"{name}-{number}-{index}",
                backend(engine.backend).load(engine),
                deliver=relay.deliver,
                on_dead=relay.died,
                watchers=watchers,
            )
            instances.append(instance)
            prepared.append(await _started(instance, prepare_one, loop))
    except BaseException as error:
        for instance in instances:
            instance.abandon()
        if isinstance(error, MpdeployError) or not isinstance(error, Exception):
            raise
        raise BuildError(f"it cannot be loaded: {type(error).__name__}: {error}") from error
    return Loaded(candidate, tuple(instances), prepared[0], inline_ms(engine, options))


async def _started(
    instance: Instance, prepare_one: Callable[[Runner], Prepared], loop: asyncio.AbstractEventLoop
) -> Prepared:
    future: asyncio.Future[Prepared] = loop.create_future()

    def tell(prepared: Prepared | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            assert prepared is not None
            future.set_result(prepared)

    def ready(prepared: Prepared | None, error: BaseException | None) -> None:
        loop.call_soon_threadsafe(tell, prepared, error)

    instance.start(prepare_one, ready)
    return await future


def inline_ms(engine: Engine, options: ModelOptions) -> float:
    """How long a batch may take on the event loop's thread: 0 for GPUs, which belong to one thread, and where several engines were asked for."""
    if engine.backend not in CPU_BACKENDS or options.instances > 1:
        return 0.0
    if options.inline_ms is not None:
        return options.inline_ms
    return INLINE_MS if usable_cores() > 1 else INLINE_ONE_CORE_MS


def usable_cores() -> int:
    """Cores that this process may use, and not merely those the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def with_threads(engine: Engine, threads: int) -> Engine:
    """The engine, to be loaded with so many threads where its build set none. On a GPU nothing changes."""
    options = dict(engine.sidecar.get("options") or {})
    if engine.backend not in CPU_BACKENDS or options.get("threads") is not None:
        return engine
    return replace(engine, sidecar={**engine.sidecar, "options": {**options, "threads": threads}})


def _metadata(name: str, number: str, loaded: Loaded, selection: Selection) -> ModelMetadata:
    candidate, contract = loaded.candidate, loaded.prepared.contract
    engine = candidate.engine
    sidecar: Mapping[str, Any] = engine.sidecar
    warnings = [*candidate.warnings, *loaded.prepared.warnings]
    return ModelMetadata(
        name=name,
        versions=(number,),
        platform=PLATFORMS.get(engine.backend, engine.backend),
        inputs=tuple(item.spec for item in contract.inputs),
        outputs=contract.outputs,
        notes={
            "run": selection.run.path.name,
            "pipeline": selection.run.manifest.get("pipeline"),
            "engine": candidate.name,
            "precision": engine.precision,
            "device": sidecar.get("device"),
            "library": f"{sidecar.get('library')} {sidecar.get('library_version')}",
            "sha256": engine.sha256,
            "verdict": candidate.judgement.verdict,
            "warnings": warnings,
            "not_served": {name: error.message for name, error in selection.refused.items()},
            "batched": contract.batched,
            "max_batch": contract.max_batch if contract.batched else 1,
            "pad_to": list(contract.pad_to),
            "pad_axes": {name: list(sizes) for name, sizes in contract.padding.sizes.items()}
            if contract.padding
            else {},
            "instances": len(loaded.instances),
            "warmup_s": round(loaded.prepared.seconds, 3),
        },
    )
