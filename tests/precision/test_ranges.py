"""Streamed statistics, held against numpy in one go."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpdeploy.data_files import load_feeds
from mpdeploy.emulated_runs import measure_ranges
from mpdeploy.precision.model_io import input_specs
from mpdeploy.precision.ranges import TAIL_SAMPLES, Ranges, collect_ranges
from mpdeploy.precision.rewrite import prepare
from tests.precision.visible import BF16, FP16, ranges_of, stats_of

RNG = np.random.default_rng(0)
MIXED = np.concatenate([RNG.standard_normal(5000) * 10.0 ** RNG.integers(-9, 6, 5000), np.zeros(50)]).astype(np.float32)


def test_statistics_are_those_of_numpy() -> None:
    stats = stats_of(MIXED)
    nonzero = np.abs(MIXED[MIXED != 0])
    assert stats.amax == np.abs(MIXED).max()
    assert stats.amin == nonzero.min()
    assert (stats.count, stats.num_zero, stats.num_nan, stats.num_inf) == (5050, 50, 0, 0)
    assert stats.rms == pytest.approx(float(np.sqrt(np.mean(MIXED.astype(np.float64) ** 2))), rel=1e-6)


def test_the_histogram_counts_every_exponent() -> None:
    stats = stats_of(MIXED)
    expected = np.bincount(np.frexp(MIXED[MIXED != 0])[1] - 1 + 127, minlength=256)
    np.testing.assert_array_equal(stats.exponents[1:], expected[1:])
    assert stats.exponents[0] == 50
    assert stats.exponents.sum() == stats.count


def test_streaming_equals_one_go() -> None:
    whole, parts = stats_of(MIXED), stats_of(*np.array_split(MIXED, 13))
    for name in ("amax", "amin", "count", "num_zero", "num_nan", "num_inf"):
        assert getattr(whole, name) == getattr(parts, name), name
    np.testing.assert_array_equal(whole.exponents, parts.exponents)
    assert whole.sum_squares == pytest.approx(parts.sum_squares, rel=1e-6)


def test_nan_and_infinity_are_counted_and_do_not_hide_the_finite_maximum() -> None:
    stats = stats_of([1.0, 2.0], [np.nan, 70000.0], [np.inf, -np.inf, 3.0])
    assert (stats.num_nan, stats.num_inf, stats.nan_feed) == (1, 2, 1)
    assert stats.amax == 70000.0
    assert math.isfinite(stats.sum_squares)


def test_no_values_and_only_zeros_are_no_range() -> None:
    assert stats_of(np.zeros(0)).count == 0
    zeros = stats_of(np.zeros(7))
    assert (zeros.amax, zeros.num_zero, zeros.rms, zeros.rounding_loss(FP16)) == (0.0, 7, 0.0, 0.0)
    assert zeros.to_json()["amin"] == 0.0


def test_a_sum_of_squares_of_large_values_does_not_overflow() -> None:
    assert stats_of(np.full(100, 1e25)).sum_squares == pytest.approx(1e52, rel=1e-5)
    assert stats_of(np.full(100, 1e-25)).rms == pytest.approx(1e-25, rel=1e-5)
    assert stats_of(np.full(100_000, 1e25)).sum_squares == pytest.approx(1e55, rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5, 1e-6, 1e-7, 5e-8, 2e-8, 1e-8, 1e-9])
def test_the_rounding_loss_is_that_of_brute_force(scale: float) -> None:
    """From the histogram alone, within 15 % of what rounding every value shows; normal rounding left out."""
    values = (np.random.default_rng(1).standard_normal(200_000) * scale).astype(np.float32)
    error = FP16.rounded(values).astype(np.float64) - values
    small = np.abs(values) < FP16.min_normal
    brute = math.sqrt((error[small] ** 2).sum() / (values.astype(np.float64) ** 2).sum())
    loss = stats_of(values).rounding_loss(FP16)
    assert loss == pytest.approx(brute, rel=0.15, abs=2e-7)


def test_bf16_has_the_range_of_float32_and_loses_nothing() -> None:
    assert stats_of(np.full(10, 1e-30)).rounding_loss(BF16) == 0.0


def test_a_wild_maximum_has_a_larger_tail_than_a_steady_one() -> None:
    rng = np.random.default_rng(2)
    steady = stats_of(*(np.full(4, 10 + 0.01 * rng.standard_normal()) for _ in range(16)))
    wild = stats_of(*(rng.standard_t(2, 50) for _ in range(16)))
    assert steady.tail_factor == 1.25, "the least"
    assert 1.25 < wild.tail_factor <= 4.0
    assert stats_of([1.0], [2.0], [3.0]).tail_factor == 2.0, "too few feeds to tell"


def test_the_tail_is_about_where_more_feeds_reach() -> None:
    """Of normal data: 16 feeds never show the maximum of 10,000; the estimate from them lies above it more often than not."""
    seen, covered, ratios = 0, 0, []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        few = stats_of(*rng.standard_normal((16, 64)))
        truth = np.abs(rng.standard_normal((TAIL_SAMPLES, 64))).max()
        seen += truth <= few.amax
        covered += truth <= few.amax * few.tail_factor
        ratios.append(few.amax * few.tail_factor / truth)
    assert seen == 0
    assert covered >= 13
    assert min(ratios) > 0.8
    assert max(ratios) < 1.6


def test_a_range_from_training_counts_where_it_is_larger() -> None:
    stats = stats_of([1.0, 2.0])
    stats.merge_amax(1.5, "training")
    assert (stats.amax, stats.source) == (2.0, "calibration")
    stats.merge_amax(math.nan, "training")
    stats.merge_amax(9.0, "training")
    assert (stats.amax, stats.source) == (9.0, "training")


class _Opened:
    """A model that answers any tensor name with constant arrays, and remembers what it was asked for."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.chunks: list[list[str]] = []

    @contextlib.contextmanager
    def __call__(self, names: Sequence[str]) -> Iterator[Any]:
        self.chunks.append(list(names))
        yield lambda feed: {name: np.full(self.sizes[name], feed["v"], np.float32) for name in names}


def test_tensors_are_asked_for_in_chunks_of_bounded_bytes_and_each_once() -> None:
    sizes = {f"t{i}": int(size) for i, size in enumerate(np.random.default_rng(3).integers(1, 400, 50))}
    opened = _Opened(sizes)
    ranges = collect_ranges(
        opened, list(sizes), lambda: iter([{"v": 1.0}, {"v": 2.0}]), values_of=sizes, chunk_bytes=2000
    )
    assert all(sum(4 * sizes[name] for name in chunk) <= 2000 for chunk in opened.chunks)
    assert [name for chunk in opened.chunks for name in chunk] == list(sizes)
    assert len(opened.chunks) > 10
    assert ranges.num_feeds == 2
    assert all(stats.amax == 2.0 and stats.count == 2 * sizes[name] for name, stats in ranges.tensors.items())


def test_tensors_of_unknown_size_come_in_chunks_of_a_fixed_number() -> None:
    opened = _Opened({f"t{i}": 3 for i in range(10)})
    collect_ranges(opened, list(opened.sizes), lambda: iter([{"v": 1.0}]), max_chunk=4)
    assert [len(chunk) for chunk in opened.chunks] == [4, 4, 2]


def test_a_tensor_larger_than_a_chunk_comes_alone() -> None:
    sizes = {"a": 10, "huge": 10_000, "b": 10}
    opened = _Opened(sizes)
    collect_ranges(opened, list(sizes), lambda: iter([{"v": 1.0}]), values_of=sizes, chunk_bytes=400)
    assert opened.chunks == [["a"], ["huge"], ["b"]]


def test_nan_tensors_name_the_first_feed_that_did_it() -> None:
    ranges = Ranges({"clean": stats_of([1.0]), "bad": stats_of([1.0], [np.nan], [np.nan])})
    assert ranges.nan_tensors == {"bad": 1}


def test_ranges_of_a_model_are_those_of_its_tensors(tmp_path: Path) -> None:
    from tests.precision.visible import CHAIN, W, graph, named

    model = named(graph(CHAIN, w=W))
    x = np.random.default_rng(4).standard_normal((20, 8)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    feeds = load_feeds(str(tmp_path / "d.npz"), input_specs(model), where="model")
    prepared = prepare(model, FP16)
    ranges = measure_ranges(prepared, feeds, tmp_path, FP16)
    assert set(ranges.tensors) == {"x", "h", "e", "y"}
    assert ranges.tensors["h"].amax == pytest.approx(np.abs(x @ W).max(), rel=1e-5)
    assert ranges.tensors["h"].count == 160
    assert len(feeds) >= 4
    assert len(ranges.tensors["h"].feed_amax) == len(feeds)
    by_hand = ranges_of(named(graph(CHAIN, w=W)), *feeds)
    assert by_hand.tensors["e"].amax == pytest.approx(ranges.tensors["e"].amax, rel=1e-5)


def test_reading_ranges_does_not_change_the_model(tmp_path: Path) -> None:
    from tests.precision.visible import CHAIN, W, graph, snapshot

    model = graph(CHAIN, w=W)
    np.savez(tmp_path / "d.npz", x=np.ones((4, 8), np.float32))
    prepared = prepare(model, FP16)
    before = snapshot(prepared.model)
    measure_ranges(prepared, load_feeds(str(tmp_path / "d.npz"), input_specs(model), where="m"), tmp_path, FP16)
    assert snapshot(prepared.model) == before
