"""Batches: never above the profile, never a wrong answer, one poisoned request fails alone, and nobody waits for the hopeless."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from served import FLOAT, checksum_model, identity_model, make_run, mlp_model, model_of, table_model

from mpdeploy.artifact import TensorSpec
from mpdeploy.serve.batcher import Batcher, Item
from mpdeploy.serve.contract import Contract
from mpdeploy.serve.manager import ModelManager
from mpdeploy.serve.messages import (
    BadRequestError,
    CancelledRequestError,
    DeadlineError,
    InferRequest,
    ModelFailedError,
    OverloadedError,
    RequestedOutput,
    UnavailableServeError,
)
from mpdeploy.serve.options import ModelOptions, ServerOptions

HELD_S = 20


@asynccontextmanager
async def managed(run: Path, **options):
    manager = ModelManager(ServerOptions(run=run, name="m", model=ModelOptions(threads=1, **options)))
    await manager.start()
    try:
        yield manager
    finally:
        await manager.stop()


def ask(manager: ModelManager, inputs, **more):
    return manager.infer(InferRequest("m", None, inputs, **more))


def x(seed: int, rows: int = 1, width: int = 16):
    return {"x": np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)}


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("sums") / "run", checksum_model(), engines=("onnxruntime", "openvino"))


def blocked(manager: ModelManager) -> tuple[Callable[[], None], Callable[[], Awaitable[None]]]:
    """Hold the engine's thread before its next run; returns what lets it go on, and what waits until it is there, its batch in hand."""
    instance = manager.versions()[0]._instances[0]
    gate, there, run = threading.Event(), threading.Event(), instance._run

    def wait(*arguments):
        there.set()
        gate.wait(HELD_S)
        return run(*arguments)

    async def entered() -> None:
        assert await asyncio.to_thread(there.wait, HELD_S)

    instance._run = wait
    return gate.set, entered


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_every_request_gets_its_own_answer_from_a_shared_batch(sums, engine):
    async def main():
        async with managed(sums, engine=engine) as manager:
            release, entered = blocked(manager)
            feeds = [x(seed, rows=1 + seed % 5) for seed in range(60)]
            tasks = [asyncio.create_task(ask(manager, feed, id=str(i))) for i, feed in enumerate(feeds)]
            await entered()
            release()
            answers = await asyncio.gather(*tasks)
            return feeds, answers, manager.versions()[0].statistics

    feeds, answers, statistics = asyncio.run(main())
    for i, (feed, answer) in enumerate(zip(feeds, answers, strict=True)):
        assert answer.id == str(i)
        np.testing.assert_allclose(answer.outputs["total"], feed["x"].sum(axis=1), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(answer.outputs["y"], feed["x"] * 2)
    assert max(statistics.batch_sizes) <= 32
    assert statistics.rows == sum(len(feed["x"]) for feed in feeds)
    assert statistics.batches < 12  # 180 samples in batches of up to 32, and the first one alone


def test_a_lone_request_does_not_wait_for_others(sums):
    async def main():
        async with managed(sums, delay_ms=0) as manager:
            await ask(manager, x(1))
            times = []
            for seed in range(20):
                begin = time.perf_counter()
                await ask(manager, x(seed))
                times.append(time.perf_counter() - begin)
            return manager.versions()[0].statistics, min(times)

    statistics, fastest = asyncio.run(main())
    assert statistics.batches == 21
    assert fastest < 0.02


def test_a_delay_that_is_asked_for_fills_batches(sums):
    async def main():
        async with managed(sums, delay_ms=60_000, deadline_s=90) as manager:
            tasks = []
            for seed in range(8):
                tasks.append(asyncio.create_task(ask(manager, x(seed, rows=4))))
                await asyncio.sleep(0.005)
            await asyncio.wait_for(asyncio.gather(*tasks), 30)  # full: nothing to wait for
            return manager.versions()[0].statistics

    statistics = asyncio.run(main())
    assert statistics.batches == statistics.batch_sizes[32][0] == 1


def test_a_batch_that_is_not_full_waits_no_longer_than_it_may(sums):
    async def main():
        async with managed(sums, delay_ms=100) as manager:
            begin = time.monotonic()
            await asyncio.gather(*(ask(manager, x(seed)) for seed in range(8)))
            return manager.versions()[0].statistics, time.monotonic() - begin

    statistics, seconds = asyncio.run(main())
    assert statistics.batches == statistics.batch_sizes[8][0] == 1
    assert 0.1 <= seconds < 20


def test_a_poisoned_request_fails_alone(tmp_path):
    run = make_run(tmp_path / "run", table_model(rows=10))

    async def main():
        async with managed(run) as manager:
            release, entered = blocked(manager)
            ids = [np.array([[i, i + 1]], np.int64) for i in range(8)]
            ids[5] = np.array([[3, 99]], np.int64)  # not in the table: ONNX Runtime refuses the whole batch
            tasks = [asyncio.create_task(ask(manager, {"ids": each})) for each in ids]
            await entered()
            release()
            return ids, await asyncio.gather(*tasks, return_exceptions=True), manager.versions()[0]

    ids, answers, version = asyncio.run(main())
    table = np.arange(30, dtype=np.float32).reshape(10, 3)
    for i, answer in enumerate(answers):
        if i == 5:
            assert isinstance(answer, ModelFailedError)
            assert "99" in answer.message or "out of" in answer.message
        else:
            np.testing.assert_array_equal(answer.outputs["y"], table[ids[i]])
    assert version.statistics.failures["BACKEND"] == 1
    assert version.statistics.success == 7
    assert version.pending == 0


def test_a_full_queue_refuses_and_says_when_to_come_back(sums):
    async def main():
        async with managed(sums, max_queue=10) as manager:
            release, entered = blocked(manager)
            first = asyncio.create_task(ask(manager, x(0)))
            await entered()  # the queue is empty again
            tasks = [asyncio.create_task(ask(manager, x(seed))) for seed in range(15)]
            await asyncio.sleep(0)
            release()
            return await asyncio.gather(first, *tasks, return_exceptions=True), manager.versions()[0]

    answers, version = asyncio.run(main())
    refused = [answer for answer in answers if isinstance(answer, OverloadedError)]
    assert len(refused) == 5
    assert all(error.retry_after_s >= 1 for error in refused)
    assert version.statistics.failures["REJECTED"] == 5
    assert version.statistics.success == 11


def test_who_has_gone_or_waited_too_long_is_not_computed(sums):
    async def main():
        async with managed(sums) as manager:
            release, entered = blocked(manager)
            first = asyncio.create_task(ask(manager, x(0)))
            await entered()
            late = asyncio.create_task(ask(manager, x(1), deadline=time.monotonic() + 0.05))
            gone = asyncio.create_task(ask(manager, x(2), cancelled=lambda: True))
            cut = asyncio.create_task(ask(manager, x(3)))
            fine = asyncio.create_task(ask(manager, x(4)))
            await asyncio.sleep(0)
            cut.cancel()
            begin = time.monotonic()
            with pytest.raises(DeadlineError):  # it is told so while the engine is still busy
                await late
            told = time.monotonic() - begin
            release()
            done = await asyncio.gather(first, gone, cut, fine, return_exceptions=True)
            version = manager.versions()[0]
            while version.pending:
                await asyncio.sleep(0.01)
            return told, done, version.statistics

    told, (first, gone, cut, fine), statistics = asyncio.run(main())
    assert told < HELD_S / 2
    assert isinstance(gone, CancelledRequestError)
    assert isinstance(cut, asyncio.CancelledError)
    assert first.outputs
    assert fine.outputs
    assert statistics.rows == 2
    assert statistics.failures["DEADLINE"] == 1
    assert statistics.failures["CANCELED"] == 2


def test_a_request_that_the_engine_holds_too_long_is_told_so(sums):
    async def main():
        async with managed(sums) as manager:
            release, entered = blocked(manager)
            asked = asyncio.create_task(ask(manager, x(0), deadline=time.monotonic() + 60))
            await entered()
            (item,) = manager.versions()[0]._instances[0].running
            item.deadline = begin = time.monotonic()
            with pytest.raises(DeadlineError):
                await asked
            seconds = time.monotonic() - begin
            release()
            while manager.versions()[0].pending:
                await asyncio.sleep(0.01)
            answer = await ask(manager, x(1))  # the engine is as good as before
            return seconds, answer

    seconds, answer = asyncio.run(main())
    assert seconds < HELD_S / 2
    assert answer.outputs["y"].shape == (1, 16)


def test_a_deadline_that_has_passed_is_refused_at_once(sums):
    async def main():
        async with managed(sums) as manager:
            with pytest.raises(DeadlineError):
                await ask(manager, x(0), deadline=time.monotonic() - 1)

    asyncio.run(main())


def test_shapes_decide_who_shares_a_batch(tmp_path):
    model = model_of(
        [helper.make_node("Add", ["ids", "ids"], ["y"])],
        {"ids": (FLOAT, ["n", "length"])},
        {"y": (FLOAT, ["n", "length"])},
    )
    run = make_run(tmp_path / "run", model, lengths={"ids": (8, 4)})

    async def main():
        async with managed(run) as manager:
            release, entered = blocked(manager)
            feeds = [{"ids": np.full((1, 3 + i % 3), i, np.float32)} for i in range(30)]
            tasks = [asyncio.create_task(ask(manager, feed)) for feed in feeds]
            await entered()
            release()
            return feeds, await asyncio.gather(*tasks), manager.versions()[0].statistics

    feeds, answers, statistics = asyncio.run(main())
    for feed, answer in zip(feeds, answers, strict=True):
        np.testing.assert_array_equal(answer.outputs["y"], feed["ids"] * 2)
    assert statistics.batches <= 5  # three lengths, and the engine had taken some of the first


def test_a_model_that_mixes_samples_is_computed_one_request_at_a_time(tmp_path):
    model = model_of(
        [
            helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
            helper.make_node("Sub", ["x", "mean"], ["y"]),
        ],
        {"x": (FLOAT, ["n", 4])},
        {"y": (FLOAT, ["n", 4])},
        {"axes": np.array([0], np.int64)},
    )
    run = make_run(tmp_path / "run", model)

    async def main():
        async with managed(run) as manager:
            feeds = [x(seed, rows=2, width=4) for seed in range(10)]
            return feeds, await asyncio.gather(*(ask(manager, feed) for feed in feeds)), manager.metadata("m")

    feeds, answers, metadata = asyncio.run(main())
    for feed, answer in zip(feeds, answers, strict=True):
        np.testing.assert_allclose(answer.outputs["y"], feed["x"] - feed["x"].mean(axis=0), atol=1e-6)
    assert metadata.notes["batched"] is False
    assert any("one by one" in warning for warning in metadata.notes["warnings"])


def test_nan_is_data_and_counted(sums):
    async def main():
        async with managed(sums) as manager:
            feed = x(1, rows=2)
            feed["x"][1, 3] = np.nan
            answers = await asyncio.gather(ask(manager, feed), ask(manager, x(2)))
            return answers, manager.versions()[0].statistics

    answers, statistics = asyncio.run(main())
    np.testing.assert_array_equal(np.isnan(answers[0].outputs["total"]), [False, True])
    assert np.isfinite(answers[1].outputs["total"]).all()
    assert statistics.nonfinite_requests == 1


def test_no_samples_are_no_samples(sums):
    async def main():
        async with managed(sums) as manager:
            return await ask(manager, x(0, rows=0))

    answer = asyncio.run(main())
    assert {name: array.shape for name, array in answer.outputs.items()} == {"y": (0, 16), "total": (0,)}


def test_outputs_come_as_they_were_asked_for(sums):
    async def main():
        async with managed(sums) as manager:
            return await ask(manager, x(0), outputs=(RequestedOutput("total"), RequestedOutput("y")))

    assert list(asyncio.run(main()).outputs) == ["total", "y"]


@pytest.mark.parametrize("kind", ["FLOAT16", "DOUBLE", "INT8", "UINT8", "INT32", "INT64", "UINT64", "BOOL", "STRING"])
def test_an_engine_is_fed_every_datatype(tmp_path, kind):
    run = make_run(tmp_path / "run", identity_model(getattr(TensorProto, kind)))
    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    text = np.array([[b"a", "ä".encode(), b""]], np.object_)
    array = text if kind == "STRING" else np.array([[0, 1, 1]]).astype(dtype)

    async def main():
        async with managed(run) as manager:
            return await asyncio.gather(*(ask(manager, {"x": array}) for _ in range(3)))

    for answer in asyncio.run(main()):
        np.testing.assert_array_equal(answer.outputs["y"], array)
        assert answer.outputs["y"].dtype == array.dtype


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'x' is missing; found: none"),
        ({"z": np.zeros((1, 16), np.float32)}, "input 'x' is missing; found: 'z'"),
        ({"x": np.zeros((1, 16), np.float32), "z": np.zeros(1)}, "input 'z' is not of this model"),
        ({"x": np.zeros((1, 16))}, "datatype is FP64, the model takes FP32"),
        ({"x": np.zeros((1, 15), np.float32)}, r"shape is \[1, 15\], the model takes \[-1, 16\]"),
        ({"x": np.zeros((16,), np.float32)}, r"shape is \[16\]"),
        ({"x": np.zeros((33, 16), np.float32)}, "33 samples, 32 is the most"),
    ],
)
def test_what_the_model_does_not_take_is_refused_before_it_is_queued(sums, inputs, message):
    async def main():
        async with managed(sums) as manager:
            with pytest.raises(BadRequestError, match=message):
                await ask(manager, inputs)
            assert manager.versions()[0].statistics.failures["OTHER"] == 1

    asyncio.run(main())


def test_instances_share_one_queue(tmp_path):
    run = make_run(tmp_path / "run", mlp_model((64, 256, 8)), batches=(1, 2, 4))

    async def main():
        async with managed(run, instances=3) as manager:
            feeds = [x(seed, width=64) for seed in range(80)]
            alone = [await ask(manager, feed) for feed in feeds[:5]]
            answers = await asyncio.gather(*(ask(manager, feed) for feed in feeds))
            return alone, answers, manager.metadata("m")

    alone, answers, metadata = asyncio.run(main())
    for one, many in zip(alone, answers[:5], strict=True):
        np.testing.assert_allclose(one.outputs["y"], many.outputs["y"], rtol=1e-5, atol=1e-6)
    assert metadata.notes["instances"] == 3
    assert metadata.notes["max_batch"] == 4


def test_large_requests_that_come_together_wake_every_instance(tmp_path):
    run = make_run(tmp_path / "run", checksum_model(), batches=(1, 2, 4))

    async def main():
        async with managed(run, instances=2) as manager:
            first, second = manager.versions()[0]._instances
            gate, at_once = threading.Barrier(2, timeout=10), []
            for instance in (first, second):
                engine_run = instance._run

                def wait(*arguments, engine_run=engine_run):
                    at_once.append(gate.wait())  # breaks unless both compute at the same time
                    return engine_run(*arguments)

                instance._run = wait
            await asyncio.gather(*(ask(manager, x(seed, rows=4)) for seed in range(2)))
            return at_once

    assert len(asyncio.run(main())) == 2


def test_an_engine_that_ended_is_told_at_once_and_is_not_ready(sums):
    async def main():
        async with managed(sums) as manager:
            manager.versions()[0]._instances[0]._run = lambda *arguments: (_ for _ in ()).throw(SystemExit("gone"))
            with pytest.raises(UnavailableServeError):
                await ask(manager, x(0))
            ready = manager.ready("m"), manager.server_ready()
            begin = time.monotonic()
            with pytest.raises(UnavailableServeError):
                await ask(manager, x(0))
            assert manager.versions()[0].pending == 0
            return ready, time.monotonic() - begin

    ready, seconds = asyncio.run(main())
    assert ready == (False, False)
    assert seconds < 10  # its deadline is 30


# -- the contract and the queue by themselves --------------------------------------------------------------------------

SPEC = TensorSpec("x", "float32", ("n", 4))


@pytest.mark.parametrize(
    ("batches", "fixed", "rows", "size"),
    [((1, 8, 32), False, 5, 5), ((1, 8, 32), True, 5, 8), ((1, 8, 32), True, 9, 32), ((4, 8, 16), False, 2, 4), ((4, 8, 16), False, 5, 5)],
)  # fmt: skip
def test_padding_is_to_profile_sizes_and_only_where_the_engine_wants_it(batches, fixed, rows, size):
    contract = Contract.of([SPEC], [SPEC], batches=batches, fixed_sizes=fixed)
    assert contract.size_to_run(rows) == size


def test_axes_of_one_name_must_agree():
    ids, mask = TensorSpec("ids", "int64", ("n", "length")), TensorSpec("mask", "int64", ("n", "length"))
    contract = Contract.of([ids, mask], [TensorSpec("y", "float32", ("n",))], batches=(1, 8, 32))
    good = {"ids": np.zeros((2, 5), np.int64), "mask": np.zeros((2, 5), np.int64)}
    assert contract.admit(InferRequest("m", None, good))[1:3] == (2, ((5,), (5,)))
    for other in ((2, 6), (3, 5)):
        with pytest.raises(BadRequestError, match="input 'mask': axis"):
            contract.admit(InferRequest("m", None, {**good, "mask": np.zeros(other, np.int64)}))


def test_an_engine_s_range_of_lengths_is_held():
    spec = TensorSpec("ids", "int64", ("n", "length"))
    contract = Contract.of([spec], [spec], batches=(1, 8, 32), ranges={"ids": [(1, 32), (4, 64)]})
    contract.admit(InferRequest("m", None, {"ids": np.zeros((1, 64), np.int64)}))
    with pytest.raises(BadRequestError, match="axis 1 has length 65, the engine takes 4 to 64"):
        contract.admit(InferRequest("m", None, {"ids": np.zeros((1, 65), np.int64)}))


def test_the_queue_whose_first_request_is_oldest_goes_first():
    async def main():
        loop = asyncio.get_running_loop()
        spec = TensorSpec("x", "float32", ("n", "k"))
        batcher = Batcher(Contract.of([spec], [spec], batches=(1, 2, 2)), max_queue=99, on_dropped=lambda dropped: None)
        items = []
        for key in (5, 7, 5, 7, 7):
            items.append(Item((), 1, ((key,),), loop.create_future(), time.monotonic() + 9, None))
            items[-1].queued_ns = len(items)
            batcher.submit(items[-1])
        lock = threading.Lock()
        lock.acquire()
        taken = [[items.index(item) for item in batcher.take(lock)] for _ in range(3)]
        batcher.close()
        assert batcher.take(lock) is None
        return taken

    assert asyncio.run(main()) == [[0, 2], [1, 3], [4]]
