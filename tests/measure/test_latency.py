"""Timing: order of blocks, warm-up, what is claimed and what is not."""

from types import SimpleNamespace

import numpy as np
import pytest

from mpdeploy.errors import ConfigError, StageFailedError
from mpdeploy.measure.latency import LatencyReport, LatencySamples, Warmup, measure_one, measure_pair, warm_up

FEEDS = {"x": np.zeros((4, 3), dtype=np.float32)}


class FakeRunner:
    """Takes `of_call(n)` milliseconds for its n-th call and writes its name into a shared log."""

    includes = "the run"
    device = "fake"

    def __init__(self, name="a", of_call=lambda call: 1.0, log=None):
        self.name, self.of_call, self.calls, self.log = name, of_call, 0, [] if log is None else log

    def time_ms(self, feeds, iterations):
        self.log.append((self.name, iterations))
        times = [self.of_call(self.calls + index) for index in range(iterations)]
        self.calls += iterations
        return times


def test_blocks_are_interleaved_in_the_order_a_b_b_a():
    log = []
    a, b = FakeRunner("a", log=log), FakeRunner("b", log=log)
    report = measure_pair(a, b, FEEDS, num_samples=80)
    measured = [name for name, _ in log][-16:]
    assert "".join(measured) == "abba" * 4
    assert len(report.a.samples_ms) == len(report.b.samples_ms) == 80


def test_a_machine_that_slows_down_all_the_time_does_not_favour_either():
    """Both cost the same, and every call on the machine is slower than the one before."""
    clock = SimpleNamespace(calls=0)

    class Slowing(FakeRunner):
        def time_ms(self, feeds, iterations):
            clock.calls += iterations
            return [1.0 + 0.002 * (clock.calls + index) for index in range(iterations)]

    report = measure_pair(Slowing(), Slowing(), FEEDS, num_samples=400)
    assert report.ratio.ratio == pytest.approx(1.0, abs=0.005)
    low, high = report.ratio.bounds
    assert low <= 1.0 <= high


def test_warm_up_ends_when_the_latency_has_settled():
    settled = warm_up(FakeRunner(of_call=lambda call: 1.0 if call >= 60 else 10.0 - 0.15 * call), FEEDS)
    assert settled.is_stable
    assert 80 <= settled.iterations <= 100


def test_a_latency_that_never_settles_ends_the_warm_up_at_the_cap_and_is_told():
    runner = FakeRunner(of_call=lambda call: 1.0 + (call // 10) % 2)
    report = measure_pair(runner, FakeRunner(), FEEDS, num_samples=20)
    assert report.a.warmup.iterations == 500
    assert report.warning == "the latency of A had not settled when the warm-up ended"


def test_the_first_calls_are_not_in_the_samples():
    one = measure_one(FakeRunner(of_call=lambda call: 50.0 if call < 5 else 1.0), FEEDS, 30)
    assert one.samples_ms.max() == 1.0


def test_a_p99_is_claimed_from_299_samples_on():
    def side(count):
        return LatencySamples(np.linspace(1, 2, count), "the run", "fake", 1, Warmup(30, 0.0, True)).to_json()

    assert side(298)["p99_ms"] is None
    assert side(299)["p99_ms"] == pytest.approx(1.99, abs=0.01)
    assert side(299)["p99_interval_ms"][1] == 2.0


def test_nothing_is_clipped():
    one = measure_one(FakeRunner(of_call=lambda call: 1000.0 if call % 100 == 99 else 1.0), FEEDS, 300)
    assert (one.samples_ms == 1000.0).sum() == 3


def test_throughput_counts_the_samples_of_a_call():
    assert measure_one(FakeRunner(of_call=lambda call: 2.0), FEEDS, 50).throughput_per_s == pytest.approx(2000.0)


def test_the_json_is_the_one_that_bench_promises():
    value = measure_pair(FakeRunner(), FakeRunner(of_call=lambda call: 2.0), FEEDS, num_samples=300).to_json()
    for side in ("a", "b"):
        assert {"median_ms", "p99_ms", "num_samples", "includes"} <= value[side].keys()
    assert value["ratio"]["median"] == 2.0
    assert value["ratio"]["interval"] == [2.0, 2.0]
    assert value["a"]["includes"] == "the run"


def test_latencies_that_include_different_things_come_with_a_warning():
    other = FakeRunner()
    other.includes = "the run and the copies"
    assert "different things" in measure_pair(FakeRunner(), other, FEEDS, num_samples=20).warning


def test_the_same_samples_and_seed_give_the_same_ratio():
    rng = np.random.default_rng(0)
    sides = [LatencySamples(rng.lognormal(size=100), "", "", 1, Warmup(0, 0.0, True)) for _ in range(2)]
    assert LatencyReport(*sides, 10, 3).ratio.bounds == LatencyReport(*sides, 10, 3).ratio.bounds
    assert LatencyReport(*sides, 10, 3).ratio.bounds != LatencyReport(*sides, 10, 4).ratio.bounds


@pytest.mark.parametrize("time_ms", [0.0, -1.0, float("nan")])
def test_times_that_are_no_times_are_refused(time_ms):
    with pytest.raises(StageFailedError, match="time_ms was asked for 10 times"):
        measure_one(FakeRunner(of_call=lambda call: time_ms), FEEDS, 10)


def test_a_single_block_is_refused():
    with pytest.raises(ConfigError, match="single block"):
        measure_pair(FakeRunner(), FakeRunner(), FEEDS, num_samples=5)
    with pytest.raises(ConfigError):
        measure_one(FakeRunner(), FEEDS, 0)
