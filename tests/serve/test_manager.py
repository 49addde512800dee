"""What a manager does of itself: it follows what other processes were told to serve, reads again what changed, and replaces what ended."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from served import checksum_model, make_run, mlp_model, serving

from mpdeploy.errors import UnavailableError
from mpdeploy.serve import following
from mpdeploy.serve import manager as manager_module
from mpdeploy.serve.manager import ModelManager
from mpdeploy.serve.messages import BadRequestError, InferRequest, UnavailableServeError
from mpdeploy.serve.options import ModelOptions, ServerOptions
from mpdeploy.serve.shared import Shared
from mpdeploy.serve.watching import Recorder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A repository of two runs."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("one", "two"):
        make_run(root / name, checksum_model(), name="m")
    return root


@asynccontextmanager
async def managed(run: Path, *, shared: Path | None = None, model: ModelOptions | None = None, **options):
    """A manager; several that share a folder stand for the processes behind a port."""
    model = model or ModelOptions(threads=1)
    manager = ModelManager(ServerOptions(run=run, name="m", model=model, **options), shared=Shared(shared))
    await manager.start()
    try:
        yield manager
    finally:
        await manager.stop()


async def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def numbers(manager: ModelManager) -> list[str]:
    return [version.number for version in manager.versions()]


def ask(manager: ModelManager, rows: int = 1):
    return manager.infer(InferRequest("m", None, {"x": np.ones((rows, 16), np.float32)}))


def test_a_slow_load_of_an_old_version_never_replaces_a_newer_one(runs, tmp_path, monkeypatch):
    async def main():
        async with managed(runs / "one", shared=tmp_path, repository=runs) as leader, \
                   managed(runs / "one", shared=tmp_path, repository=runs) as follower:  # fmt: skip
            begun, go, served = asyncio.Event(), asyncio.Event(), []
            load, put = follower._load, follower._put

            async def slow(name, model):
                version = await load(name, model)
                if model["version"] == 2:
                    begun.set()
                    await go.wait()
                return version

            monkeypatch.setattr(follower, "_load", slow)
            monkeypatch.setattr(
                follower, "_put", lambda name, version: (served.append(version.number), put(name, version))
            )
            await leader.load("m", {"run": "two"})
            await begun.wait()
            await leader.load("m", {"run": "one"})
            go.set()
            await until(lambda: numbers(follower) == ["3"])
            await until(lambda: follower._follower.generation == leader._follower.generation)
            return served

    assert asyncio.run(main()) == ["3"]


def test_a_process_that_could_not_follow_tries_again(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(following, "RETRY_S", (0.1,))

    async def main():
        async with managed(runs / "one", shared=tmp_path, repository=runs) as leader, \
                   managed(runs / "one", shared=tmp_path, repository=runs) as follower:  # fmt: skip
            load, failures = follower._load, []

            async def fails_twice(name, model):
                if len(failures) < 2:
                    failures.append(model["version"])
                    raise UnavailableError("no memory is left")
                return await load(name, model)

            monkeypatch.setattr(follower, "_load", fails_twice)
            await leader.load("m", {"run": "two"})
            await until(lambda: numbers(follower) == ["2"])
            assert failures == [2, 2]
            assert follower.index()[0]["reason"] == ""

    asyncio.run(main())


def test_a_process_that_loads_one_model_still_follows_the_changes_of_others(runs, tmp_path):
    async def main():
        async with managed(runs / "one", shared=tmp_path, repository=runs) as first, \
                   managed(runs / "one", shared=tmp_path, repository=runs) as second:  # fmt: skip
            await first.load("m", {"run": "two"})
            await second.load("two", {})  # before it has looked what the first one did
            await until(lambda: (numbers(first), numbers(second)) == (["2", "1"], ["2", "1"]))
            await first.unload("two")
            await until(lambda: numbers(second) == ["2"])

    asyncio.run(main())


def test_an_engine_that_ends_fails_what_is_queued_at_once_and_a_load_replaces_it(runs):
    async def main():
        async with managed(runs / "one", model=ModelOptions(threads=1, inline_ms=0)) as manager:
            version, go = manager.versions()[0], threading.Event()

            def ends(_batch):
                go.wait(60)
                raise SystemExit("gone")

            instance = version._instances[0]
            instance._run = ends
            held = asyncio.create_task(ask(manager))
            await until(lambda: instance.running)
            queued = [asyncio.create_task(ask(manager)) for _ in range(3)]
            await until(lambda: version.batcher.queued == 3)
            go.set()
            errors = await asyncio.gather(held, *queued, return_exceptions=True)
            assert [(type(error), str(error)) for error in errors] == [(UnavailableServeError, "the engine ended")] * 4
            assert version.pending == 0
            with pytest.raises(UnavailableServeError, match="log says why"):
                await ask(manager)
            assert not manager.server_ready()
            await manager.load("m", {})  # of a run that has not changed
            assert numbers(manager) == ["2"]
            assert manager.server_ready()
            assert (await ask(manager)).outputs["total"] == 16
            await manager.load("m", {})
            assert numbers(manager) == ["2"]  # that one lives

    asyncio.run(main())


def test_a_load_replaces_a_version_whose_engine_ended_in_another_process(runs, tmp_path):
    async def main():
        async with managed(runs / "one", shared=tmp_path) as manager:
            (tmp_path / f"counts-{os.getppid()}.json").write_text(json.dumps({"gauge/model/m/1/dead": 1.0}))
            await manager.reload()
            return numbers(manager)

    assert asyncio.run(main()) == ["2"]


@pytest.mark.parametrize("inline_ms", [0, 10_000])
def test_a_fault_while_a_request_is_sampled_ends_no_engine(runs, tmp_path, monkeypatch, caplog, inline_ms):
    def fails(*_arguments, **_more):
        raise MemoryError("no room for a copy")

    monkeypatch.setattr(Recorder, "offer", fails)
    options = ModelOptions(threads=1, inline_ms=inline_ms, record=tmp_path, record_rate=1.0)

    async def main():
        async with managed(runs / "one", model=options) as manager:
            for _ in range(5):
                assert (await ask(manager)).outputs["total"] == 16
            await until(lambda: manager.versions()[0].watchers[0].failed == 5)
            assert manager.server_ready()
            assert manager.counts()["model/m/1/recorded/failed"] == 5

    asyncio.run(main())
    assert caplog.text.count("a fault while a request was sampled") == 1


def test_a_run_that_is_copied_in_place_is_loaded_once_it_is_complete(runs, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(following, "RETRY_S", (0.1,))
    run, new = tmp_path / "run", make_run(tmp_path / "new", mlp_model((16, 4)), name="m")
    shutil.copytree(runs / "one", run)

    async def main():
        async with managed(run, watch=True) as manager:
            for name in ("run.json", "gate.json"):  # first what says that it changed
                shutil.copy(new / name, run / name)
            await until(lambda: "m is not read again" in caplog.text)
            assert numbers(manager) == ["1"]
            shutil.copytree(new, run, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run.json", "gate.json"))
            await until(lambda: numbers(manager) == ["2"])
            assert set((await ask(manager)).outputs) == {"y"}

    asyncio.run(main())


def test_a_load_is_answered_once_the_other_processes_serve_it_too(runs, tmp_path, monkeypatch):
    other = tmp_path / f"counts-{os.getppid()}.json"  # of a process that lives
    other.write_text(json.dumps({"gauge/model/m/1/pending": 0}))

    async def main():
        async with managed(runs / "one", shared=tmp_path, repository=runs) as manager:
            loading = asyncio.create_task(manager.load("m", {"run": "two"}))
            await until(lambda: numbers(manager) == ["2"])
            await asyncio.wait({loading}, timeout=1)
            assert not loading.done()
            other.write_text(json.dumps({"gauge/model/m/2/pending": 0}))
            await loading
            monkeypatch.setattr(manager_module, "FOLLOW_S", 0.1)
            with pytest.raises(UnavailableServeError, match="and try again: 1"):
                await manager.load("m", {"run": "one"})
            assert numbers(manager) == ["3"]

    asyncio.run(main())


@pytest.mark.slow
def test_after_a_load_every_process_answers(runs, tmp_path):
    with serving(runs / "one", "--workers", 2, "--repository", runs, folder=tmp_path) as served:
        for _ in range(3):
            assert served.call("POST", "/v2/repository/models/two/load", {})[0] == 200
            assert {served.call("GET", "/v2/models/two/ready")[0] for _ in range(30)} == {200}
            assert served.call("POST", "/v2/repository/models/two/unload", {})[0] == 200
            deadline = time.monotonic() + 60
            while {served.call("GET", "/v2/models/two/ready")[0] for _ in range(30)} != {404}:
                assert time.monotonic() < deadline


def test_an_engine_that_the_run_does_not_have_is_a_bad_request_and_changes_nothing(runs):
    async def main():
        async with managed(runs / "one", repository=runs) as manager:
            before = manager.index()
            for name in ("m", "two"):
                with pytest.raises(BadRequestError, match=r"no engine 'openvinoo'.*onnxruntime"):
                    await manager.load(name, {"engine": "openvinoo"})
            assert manager.index() == before
            assert before[0]["state"] == "READY"

    asyncio.run(main())
