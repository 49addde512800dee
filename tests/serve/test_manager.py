"""What a manager does of itself: it follows what other processes were told to serve, reads again what changed, and replaces what ended."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from served import checksum_model, make_run

from mpdeploy.errors import UnavailableError
from mpdeploy.serve import manager as manager_module
from mpdeploy.serve.manager import ModelManager
from mpdeploy.serve.options import ModelOptions, ServerOptions
from mpdeploy.serve.shared import Shared


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
            await until(lambda: follower._generation == leader._generation)
            return served

    assert asyncio.run(main()) == ["3"]


def test_a_process_that_could_not_follow_tries_again(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(manager_module, "RETRY_S", (0.1,))

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
