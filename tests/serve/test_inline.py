"""Quick batches on the event loop's own thread: which ones, and that everything holds there that holds on the engine's."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from served import checksum_model, make_run, table_model
from test_batching import ask, blocked, managed, x

from mpdeploy.errors import UsageError
from mpdeploy.serve import instance as instances
from mpdeploy.serve import loading
from mpdeploy.serve import version as versions
from mpdeploy.serve.messages import CancelledRequestError, ModelFailedError, UnavailableServeError
from mpdeploy.serve.options import ModelOptions

LONG_MS = 60_000.0  # longer than anything here takes on a busy machine


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("sums") / "run", checksum_model(), engines=("onnxruntime", "openvino"))


def watched(manager) -> list[bool]:
    """For each run of the engine from now on, whether it was on the event loop's thread."""
    instance, here, found = manager.versions()[0]._instances[0], threading.get_ident(), []
    run = instance._run

    def noted(batch):
        found.append(threading.get_ident() == here)
        return run(batch)

    instance._run = noted
    return found


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_batch_known_to_be_quick_needs_no_thread(sums, engine):
    async def main():
        async with managed(sums, engine=engine, inline_ms=LONG_MS) as manager:
            where = watched(manager)
            answers = [(feed, await ask(manager, feed)) for feed in (x(seed) for seed in range(6))]
            return where, answers, manager.versions()[0].statistics

    where, answers, statistics = asyncio.run(main())
    assert where == [False, True, True, True, True, True], "the first one shows how long it takes"
    for feed, answer in answers:
        np.testing.assert_array_equal(answer.outputs["y"], feed["x"] * 2)
    assert statistics.batches == 6
    assert statistics.success == 6


def test_what_is_learnt_counts_for_batches_of_about_that_size_alone(sums):
    async def main():
        async with managed(sums, inline_ms=LONG_MS) as manager:
            where = watched(manager)
            for rows in (1, 1, 20, 20, 30, 2, 2):
                await ask(manager, x(rows, rows=rows))
            return where

    assert asyncio.run(main()) == [False, True, False, True, True, False, True]


@pytest.mark.parametrize("options", [{"inline_ms": 0}, {"inline_ms": 1e-6}, {"delay_ms": 0.01, "inline_ms": LONG_MS},
                                     {"instances": 2, "inline_ms": LONG_MS}])  # fmt: skip
def test_what_is_not_quick_or_wanted_elsewhere_stays_on_the_engine_s_thread(sums, options):
    async def main():
        async with managed(sums, **options) as manager:
            where = watched(manager)
            for seed in range(6):
                await ask(manager, x(seed))
            return where

    assert not any(asyncio.run(main()))


def test_a_model_that_became_slow_leaves_the_event_loop_and_comes_back(sums, monkeypatch):
    now_ns, takes_ms = time.monotonic_ns(), 1

    async def main():
        nonlocal takes_ms
        async with managed(sums, inline_ms=10.0) as manager:
            where, instance = watched(manager), manager.versions()[0]._instances[0]
            infer = instance._runner.infer

            def timed(feeds):
                nonlocal now_ns
                now_ns += takes_ms * 1_000_000
                return infer(feeds)

            instance._runner.infer = timed
            monkeypatch.setattr(instances, "time", SimpleNamespace(monotonic_ns=lambda: now_ns))
            for seed in range(20):
                await ask(manager, x(seed))
            quick, takes_ms = where[-1], 300
            for seed in range(3):
                await ask(manager, x(seed))
            takes_ms = 1
            for seed in range(20):
                await ask(manager, x(seed))
            return quick, where[20:23], where[-1]

    quick, slow, after = asyncio.run(main())
    assert quick
    assert slow == [True, False, False], "one slow batch is enough"
    assert after


def test_requests_that_came_together_share_a_batch_there_too(sums):
    async def main():
        async with managed(sums, inline_ms=LONG_MS) as manager:
            for rows in (1, 2, 4, 8, 16, 32):
                await ask(manager, x(rows, rows=rows))
            where, statistics = watched(manager), manager.versions()[0].statistics
            before = statistics.batches
            feeds = [x(seed, rows=1 + seed % 5) for seed in range(60)]
            answers = await asyncio.gather(*(ask(manager, feed) for feed in feeds))
            return feeds, answers, statistics.batches - before, where, max(statistics.batch_sizes)

    feeds, answers, batches, where, largest = asyncio.run(main())
    for feed, answer in zip(feeds, answers, strict=True):
        np.testing.assert_array_equal(answer.outputs["y"], feed["x"] * 2)
    assert all(where)
    assert batches < 10  # 180 samples in batches of up to 32
    assert largest <= 32


def test_the_engine_s_thread_leaves_quick_batches_that_queued_while_it_was_busy(sums):
    """Under load its queue is never empty: it would otherwise go on for ever."""

    async def main():
        async with managed(sums, inline_ms=LONG_MS) as manager:
            for rows in (32, 8):
                await ask(manager, x(rows, rows=rows))
            where = watched(manager)
            release, entered = blocked(manager)
            first = asyncio.create_task(ask(manager, x(0)))  # of an unknown size
            await entered()
            tasks = [asyncio.create_task(ask(manager, x(seed))) for seed in range(40)]
            await asyncio.sleep(0.05)  # the loop finds no engine for them
            release()
            await asyncio.gather(first, *tasks)
            return where

    assert asyncio.run(main()) == [False, True, True]


def test_other_connections_are_heard_between_two_batches(sums, monkeypatch):
    """200 requests wait; what is called meanwhile must not wait for all of them."""
    monkeypatch.setattr(versions, "COMPUTE_SHARE", 0)  # how many are computed in between must not depend on the machine

    async def main():
        async with managed(sums, inline_ms=LONG_MS) as manager:
            for rows in (1, 32):
                await ask(manager, x(rows, rows=rows))
            tasks = [asyncio.create_task(ask(manager, x(seed, rows=32))) for seed in range(200)]
            left = []
            while manager.versions()[0].pending or not left:
                await asyncio.sleep(0)
                left.append(manager.versions()[0].pending)
            await asyncio.gather(*tasks)
            return left

    assert len({count for count in asyncio.run(main()) if 0 < count < 200}) > 50


@pytest.mark.parametrize(("talk_ms", "turns"), [(10, [1, *[10] * 9, 9]), (60, [1, 25, 25, 25, 24]), (0.5, [1] * 100)])
def test_connections_that_keep_the_loop_busy_do_not_keep_it_from_computing(sums, monkeypatch, talk_ms, turns):
    """Under overload each turn of the loop refuses hundreds of requests; one batch a turn would leave most of the core to that."""
    now_ns = time.monotonic_ns()

    async def main():
        nonlocal now_ns
        async with managed(sums, inline_ms=LONG_MS) as manager:
            for rows in (1, 32):
                await ask(manager, x(rows, rows=rows))
            while not manager.versions()[
                0
            ].batcher._idle:  # its thread would find what is queued below, and leave it to the loop once more
                await asyncio.sleep(0.001)
            instance = manager.versions()[0]._instances[0]
            infer = instance._runner.infer

            def takes_2_ms(feeds):
                nonlocal now_ns
                now_ns += 2_000_000
                return infer(feeds)

            instance._runner.infer = takes_2_ms
            clock = SimpleNamespace(monotonic_ns=lambda: now_ns, monotonic=time.monotonic)
            monkeypatch.setattr(versions, "time", clock)
            where = watched(manager)
            tasks = [asyncio.create_task(ask(manager, x(seed, rows=32))) for seed in range(100)]
            found, before = [], 0
            while not all(task.done() for task in tasks):
                await asyncio.sleep(0)
                found.append(len(where) - before)
                before = len(where)
                now_ns += int(talk_ms * 1e6)
            return found

    assert [batches for batches in asyncio.run(main()) if batches] == turns, "twice as long, and at most 50 ms"


def test_a_poisoned_request_fails_alone(tmp_path):
    run = make_run(tmp_path / "run", table_model(rows=10))

    async def main():
        async with managed(run, inline_ms=LONG_MS) as manager:
            ids = [np.array([[i, i + 1]], np.int64) for i in range(8)]
            await asyncio.gather(*(ask(manager, {"ids": each}) for each in ids))
            where = watched(manager)
            ids[5] = np.array([[3, 99]], np.int64)
            answers = await asyncio.gather(*(ask(manager, {"ids": each}) for each in ids), return_exceptions=True)
            return ids, answers, where, manager.versions()[0]

    ids, answers, where, version = asyncio.run(main())
    assert where == [True] * 9, "the batch, and each of its eight alone"
    table = np.arange(30, dtype=np.float32).reshape(10, 3)
    for i, answer in enumerate(answers):
        if i == 5:
            assert isinstance(answer, ModelFailedError)
        else:
            np.testing.assert_array_equal(answer.outputs["y"], table[ids[i]])
    assert version.pending == 0


def test_who_has_gone_is_not_computed(sums):
    async def main():
        async with managed(sums, inline_ms=LONG_MS) as manager:
            await ask(manager, x(0))
            where = watched(manager)
            with pytest.raises(CancelledRequestError):
                await ask(manager, x(1), cancelled=lambda: True)
            nothing = list(where)
            answer = await ask(manager, x(2))
            return nothing, where, answer, manager.versions()[0].pending

    nothing, where, answer, pending = asyncio.run(main())
    assert nothing == []
    assert where == [True], "the engine is free again"
    assert answer.outputs["y"].shape == (1, 16)
    assert pending == 0


def test_an_engine_whose_work_breaks_off_is_told_at_once_and_is_not_ready(sums):
    async def main():
        async with managed(sums, inline_ms=LONG_MS) as manager:
            await ask(manager, x(0))

            def breaks(batch):
                raise RuntimeError("gone")

            manager.versions()[0]._instances[0]._run = breaks
            with pytest.raises(UnavailableServeError):
                await ask(manager, x(1))
            ready = manager.ready("m")
            with pytest.raises(UnavailableServeError):
                await ask(manager, x(2))
            closed = await manager.versions()[0].close(20)
            return ready, manager.versions()[0].pending, closed

    ready, pending, closed = asyncio.run(main())
    assert not ready
    assert pending == 0
    assert closed


def test_no_request_is_lost_when_a_version_closes(sums):
    async def main():
        async with managed(sums, inline_ms=LONG_MS) as manager:
            for rows in (1, 32):
                await ask(manager, x(rows, rows=rows))
            tasks = [asyncio.create_task(ask(manager, x(seed, rows=32))) for seed in range(50)]
            await asyncio.sleep(0)
            ended = await manager.stop()
            return ended, await asyncio.gather(*tasks)

    ended, answers = asyncio.run(main())
    assert ended
    assert len(answers) == 50


@pytest.mark.parametrize(("cores", "found"), [(1, loading.INLINE_ONE_CORE_MS), (2, loading.INLINE_MS)])
def test_where_one_core_does_both_a_thread_gains_nothing(sums, monkeypatch, cores, found):
    monkeypatch.setattr(loading, "usable_cores", lambda: cores)

    async def main():
        async with managed(sums) as manager:
            return manager.versions()[0]._inline_ns

    assert asyncio.run(main()) == int(found * 1e6)


def test_less_than_nothing_is_refused():
    with pytest.raises(UsageError, match="--inline-ms -1"):
        ModelOptions(inline_ms=-1)
