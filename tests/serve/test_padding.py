"""Texts of different lengths in one batch: filled up to a few lengths and cut back, or not where that would change answers."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from onnx import TensorProto, helper
from served import FLOAT, make_run, model_of
from test_batching import ask, blocked, managed

from mpdeploy.artifact import TensorSpec
from mpdeploy.errors import ModelError, MpdeployError, UsageError
from mpdeploy.serve.contract import Contract
from mpdeploy.serve.messages import BadRequestError, InferRequest
from mpdeploy.serve.options import ModelOptions
from mpdeploy.serve.padding import Padding

TABLE = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
IDS = TensorProto.INT64


def text_model(*, masked: bool = True):
    """ids and mask [n, sequence] -> tokens [n, sequence, 4], their rows of a table, and mean [n, 4] over those that are there."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["found"], axis=0),
        helper.make_node("Cast", ["mask"], ["there"], to=FLOAT),
        helper.make_node("Unsqueeze", ["there", "last"], ["weight"]),
        helper.make_node("Mul", ["found", "weight"], ["tokens"]),
        helper.make_node("ReduceSum", ["tokens", "axis"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["there" if masked else "ones", "axis"], ["count"], keepdims=1),
        helper.make_node("Div", ["total", "count"], ["mean"]),
    ]
    if not masked:  # every place counts, whether a token is there or not
        nodes[-2:-2] = [helper.make_node("Mul", ["there", "zero"], ["zeros"]), helper.make_node("Add", ["zeros", "one"], ["ones"])]  # fmt: skip
    constants = {"table": TABLE, "last": np.array([2], np.int64), "axis": np.array([1], np.int64)}
    constants |= {} if masked else {"zero": np.float32(0).reshape(()), "one": np.float32(1).reshape(())}
    shape = ["n", "sequence"]
    return model_of(
        nodes,
        {"ids": (IDS, shape), "mask": (IDS, shape)},
        {"tokens": (FLOAT, [*shape, 4]), "mean": (FLOAT, ["n", 4])},
        constants,
    )


def samples(length: int = 12, rows: int = 8):
    rng = np.random.default_rng(1)
    return {"ids": rng.integers(1, 50, (rows, length)), "mask": np.ones((rows, length), np.int64)}


def text(seed: int, length: int, rows: int = 1):
    return {
        "ids": np.random.default_rng(seed).integers(1, 50, (rows, length)),
        "mask": np.ones((rows, length), np.int64),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "run"
    return make_run(folder, text_model(), samples=samples(), engines=("onnxruntime", "openvino"))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_texts_of_different_lengths_share_a_batch_and_get_their_own_answers(run, engine):
    async def main():
        async with managed(run, engine=engine, pad=(("sequence", (8, 16)),)) as manager:
            release, entered = blocked(manager)
            feeds = [text(seed, 1 + seed % 16, rows=1 + seed % 2) for seed in range(32)]
            tasks = [asyncio.create_task(ask(manager, feed)) for feed in feeds]
            await entered()
            release()
            version = manager.versions()[0]
            return feeds, await asyncio.gather(*tasks), version.statistics, version.metadata.notes

    feeds, answers, statistics, notes = asyncio.run(main())
    for feed, answer in zip(feeds, answers, strict=True):
        expected = TABLE[feed["ids"]]
        np.testing.assert_allclose(answer.outputs["tokens"], expected, rtol=1e-5)
        np.testing.assert_allclose(answer.outputs["mean"], expected.mean(axis=1), rtol=1e-4, atol=1e-5)
    assert statistics.batches <= 5, "two lengths instead of sixteen, and the engine had taken some of the first"
    assert notes["pad_axes"] == {"sequence": [8, 16]}


def test_what_is_longer_than_the_last_length_is_computed_as_it_is(run):
    async def main():
        async with managed(run, engine="onnxruntime", pad=(("sequence", (4, 8)),)) as manager:
            feed = text(0, 20)
            return feed, await ask(manager, feed)

    feed, answer = asyncio.run(main())
    assert answer.outputs["tokens"].shape == (1, 20, 4)
    np.testing.assert_allclose(answer.outputs["tokens"], TABLE[feed["ids"]], rtol=1e-5)


def test_a_model_that_takes_zeros_for_tokens_is_not_filled_up_and_says_so(tmp_path):
    run = make_run(tmp_path / "run", text_model(masked=False), samples=samples())

    async def main():
        async with managed(run, pad=(("sequence", (8, 16)),)) as manager:
            feed = text(3, 5)
            return feed, await ask(manager, feed), manager.versions()[0].metadata.notes

    feed, answer, notes = asyncio.run(main())
    np.testing.assert_allclose(answer.outputs["mean"], TABLE[feed["ids"]].mean(axis=1), rtol=1e-4, atol=1e-5)
    assert notes["pad_axes"] == {}
    assert any("not filled up" in warning and "'mean' then drifts by 0." in warning for warning in notes["warnings"])


@pytest.mark.parametrize(
    ("axis", "message"), [("sequense", "closest names: sequence"), ("n", "no input has an axis of this name")]
)
def test_an_axis_that_is_not_there_is_refused(run, axis, message):
    async def main():
        async with managed(run, engine="onnxruntime", pad=((axis, (8,)),)):
            raise AssertionError("it was loaded")

    with pytest.raises(MpdeployError) as caught:
        asyncio.run(main())
    assert message in f"{caught.value.message} {caught.value.hint}"


# -- the parts ---------------------------------------------------------------------------------------------------------

INPUTS = (TensorSpec("ids", "int64", ("n", "sequence")), TensorSpec("mask", "int64", ("n", "sequence")))
OUTPUTS = (TensorSpec("y", "float32", ("n", "sequence", 4)), TensorSpec("z", "float32", ("n", 4)))


def contract(ranges=None, sizes=(8, 16)) -> Contract:
    return Contract.of(INPUTS, OUTPUTS, batches=(1, 8, 32), ranges=ranges).with_padding((("sequence", sizes),))


@pytest.mark.parametrize(("length", "filled"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 17)])
def test_lengths_go_up_to_the_next(length, filled):
    arrays, rows, key, lengths = contract().admit(InferRequest("m", None, text(0, length, rows=3)))
    assert rows == 3
    assert key == ((filled,), (filled,))
    assert lengths == ((("sequence", length),) if filled != length else ())
    assert all(array.shape == (3, filled) for array in arrays)
    assert not arrays[1][:, length:].any()
    np.testing.assert_array_equal(arrays[0][:, :length], text(0, length, rows=3)["ids"])


def test_answers_are_cut_back_on_that_axis_alone():
    padding = Padding.of((("sequence", (8,)),), INPUTS, OUTPUTS)
    found = padding.cut({"y": np.zeros((2, 8, 4)), "z": np.zeros((2, 4))}, (("sequence", 3),))
    assert {name: array.shape for name, array in found.items()} == {"y": (2, 3, 4), "z": (2, 4)}


def test_inputs_that_disagree_on_a_length_are_refused_before_they_are_made_equal():
    feeds = {"ids": np.zeros((1, 3), np.int64), "mask": np.zeros((1, 4), np.int64)}
    with pytest.raises(BadRequestError, match="'sequence'"):
        contract().admit(InferRequest("m", None, feeds))


def test_an_engine_s_shortest_length_is_reached_by_filling_up():
    """A TensorRT profile from 8 to 16: a text of 3 tokens is no longer refused, one of 17 is."""
    ranges = {name: [(1, 32), (8, 16)] for name in ("ids", "mask")}
    held = contract(ranges)
    assert held.admit(InferRequest("m", None, text(0, 3)))[2] == ((8,), (8,))
    with pytest.raises(BadRequestError, match="takes 0 to 16"):
        held.admit(InferRequest("m", None, text(0, 17)))
    with pytest.raises(ModelError, match="takes 8 to 16 on axis 1, not 32"):
        contract(ranges, sizes=(8, 32))


def test_text_has_no_zero():
    with pytest.raises(ModelError, match="holds text"):
        Padding.of((("words", (8,)),), [TensorSpec("t", "object", ("n", "words"))], [])


@pytest.mark.parametrize("sizes", [(), (0, 4), (8, 8), (8, 4)])
def test_lengths_that_do_not_rise_are_refused(sizes):
    with pytest.raises(UsageError, match="must rise"):
        ModelOptions(pad=(("sequence", sizes),))


def test_an_axis_that_is_named_twice_is_refused():
    with pytest.raises(UsageError, match="twice"):
        ModelOptions(pad=(("sequence", (8,)), ("sequence", (16,))))
