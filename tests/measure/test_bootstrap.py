"""The bootstraps: against brute force, their coverage, their speed, and that they give the same bits again."""

import math
import time

import numpy as np
import pytest

from mpdeploy.errors import DataError
from mpdeploy.measure.bootstrap import bootstrap_mean, draw_indices, median_ratio
from mpdeploy.measure.statistics import clopper_pearson, normal_quantile


@pytest.mark.parametrize("n", [12, 60, 1500])
@pytest.mark.parametrize("shape", ["normal", "skewed", "mostly zero"])
def test_the_convolution_gives_what_brute_force_resampling_gives(n, shape):
    rng = np.random.default_rng(n)
    values = {
        "normal": rng.normal(size=n),
        "skewed": rng.exponential(size=n) ** 2,
        "mostly zero": np.where(rng.random(n) < 0.1, rng.normal(size=n), 0.0),
    }[shape]
    means = (
        np.sort(values[rng.integers(0, n, size=(40_000, n))].mean(axis=1))
        if n < 1000
        else np.sort(np.concatenate([values[rng.integers(0, n, size=(2000, n))].mean(axis=1) for _ in range(20)]))
    )
    found = bootstrap_mean(values)
    for share in (0.01, 0.05, 0.3, 0.7, 0.95, 0.99):
        exact = found.values[np.searchsorted(found.cumulative, share)]
        near = 5e-3 * values.std() / math.sqrt(n / 12)  # resamples of mostly equal values have few different means
        low, high = (np.searchsorted(means, exact + side) / len(means) for side in (-near, near))
        assert low - 0.01 <= share <= high + 0.01


def test_bca_bounds_match_scipys():
    from scipy import stats

    values = np.random.default_rng(0).exponential(size=2000)
    expected = stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, n_resamples=4000, batch=500, rng=np.random.default_rng(1)
    )
    found = bootstrap_mean(values).bounds
    width = found[1] - found[0]
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.04 * width)


@pytest.mark.parametrize(("n", "skewed"), [(30, False), (100, False), (400, True)])
def test_each_bound_misses_the_true_mean_in_about_five_percent(n, skewed):
    rng = np.random.default_rng(7)
    repeats, low, high = 400, 0, 0
    for _ in range(repeats):
        bounds = bootstrap_mean(rng.exponential(size=n) if skewed else rng.normal(1.0, 1.0, size=n)).bounds
        low += bounds[0] > 1.0
        high += bounds[1] < 1.0
    limit = 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)
    assert low / repeats <= limit
    assert high / repeats <= limit
    assert low + high >= 0.05 * repeats  # nor is the interval simply too wide


def test_clusters_widen_the_interval_as_much_as_they_should():
    """Ten equal samples a cluster say no more than one: the interval is that of the clusters' own values."""
    values = np.random.default_rng(2).normal(size=100)
    one = bootstrap_mean(values).bounds
    clustered = bootstrap_mean(np.repeat(values, 10), clusters=np.repeat(np.arange(100), 10)).bounds
    ignored = bootstrap_mean(np.repeat(values, 10)).bounds
    assert clustered == pytest.approx(one, abs=0.03 * (one[1] - one[0]))
    assert (ignored[1] - ignored[0]) < 0.4 * (one[1] - one[0])


def test_clusters_of_unequal_size_keep_the_coverage():
    rng = np.random.default_rng(4)
    misses = 0
    for seed in range(300):
        sizes = rng.integers(1, 12, size=60)
        effects = rng.normal(size=60)
        values = np.repeat(effects, sizes) + rng.normal(0, 0.3, size=sizes.sum())
        bounds = bootstrap_mean(values, clusters=np.repeat(np.arange(60), sizes), num_resamples=1000, seed=seed).bounds
        misses += bounds[0] > 0.0
    assert misses / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_fifty_thousand_samples_are_decided_in_well_under_five_seconds():
    values = np.random.default_rng(0).normal(0.001, 0.1, size=50_000)
    started = time.perf_counter()
    found = bootstrap_mean(values)
    assert time.perf_counter() - started < 2.0
    margin = normal_quantile(0.95) * 0.1 / math.sqrt(50_000)
    assert found.bounds == pytest.approx((found.mean - margin, found.mean + margin), rel=0.05)


@pytest.mark.slow
def test_ten_thousand_resamples_of_fifty_thousand_clusters_take_seconds():
    values = np.random.default_rng(0).normal(0.001, 0.1, size=50_000)
    started = time.perf_counter()
    clustered = bootstrap_mean(values, clusters=np.arange(50_000), num_resamples=10_000)
    assert time.perf_counter() - started < 15.0  # 3 s on two idle cores
    exact = bootstrap_mean(values)
    assert clustered.bounds == pytest.approx(exact.bounds, abs=0.03 * (exact.bounds[1] - exact.bounds[0]))


def test_the_same_samples_give_the_same_bits_whatever_their_order_of_adding():
    values = np.random.default_rng(9).normal(size=3000)
    again = values[np.random.default_rng(1).permutation(3000)]
    assert bootstrap_mean(values).bounds == pytest.approx(bootstrap_mean(again).bounds, rel=1e-12)
    clusters = np.arange(3000) // 3
    assert bootstrap_mean(values, clusters=clusters).bounds == bootstrap_mean(values, clusters=clusters).bounds


def test_drawn_indices_are_those_of_pcg64s_fixed_stream_and_uniform():
    assert draw_indices((0, 0), (1, 6), 1000).tolist() == draw_indices((0, 0), (2, 3), 1000).reshape(1, 6).tolist()
    counts = np.bincount(draw_indices((1, 2), (100, 5000), 50).ravel(), minlength=50)
    assert abs(counts / 10_000 - 1).max() < 0.06


def test_the_p_value_and_the_bound_agree():
    found = bootstrap_mean(np.random.default_rng(0).exponential(size=300))
    assert found.p_value_above(found.bounds[0]) == pytest.approx(0.05, abs=0.001)
    assert found.p_value_above(found.mean + 1.0) > 0.999


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="finite"):
        bootstrap_mean(np.array([1.0, np.nan]))
    with pytest.raises(DataError, match="cluster"):
        bootstrap_mean(np.ones(3), clusters=np.ones(2))


def _latencies(rng, repeats, *, slower=1.0, blocks=30, size=10):
    """Blocks of latencies on a machine that drifts and has busy spells; shape [repeats, 2, blocks * size]."""
    spells = np.exp(
        0.03 * rng.normal(size=(repeats, 1, blocks, 1)) + 0.02 * np.sin(np.arange(blocks) / 5)[None, None, :, None]
    )
    own = np.exp(0.01 * rng.normal(size=(repeats, 2, blocks, 1)) + 0.05 * rng.normal(size=(repeats, 2, blocks, size)))
    spikes = np.where(rng.random((repeats, 2, blocks, size)) < 0.02, 3.0, 1.0)
    times = spells * own * spikes
    times[:, 1] *= slower
    return times.reshape(repeats, 2, -1)


@pytest.mark.slow
def test_the_interval_of_a_against_a_holds_one_in_at_least_930_of_1000_runs():
    rng = np.random.default_rng(11)
    held = 0
    for seed, (a, b) in enumerate(_latencies(rng, 1000)):
        low, high = median_ratio(a, b, block_size=10, num_resamples=800, seed=seed).bounds
        held += low <= 1.0 <= high
    assert held >= 930
    assert held <= 990  # an interval that is always right says nothing


@pytest.mark.slow
def test_a_candidate_five_percent_slower_is_found_in_at_least_900_of_1000_runs():
    rng = np.random.default_rng(12)
    found = 0
    for seed, (a, b) in enumerate(_latencies(rng, 1000, slower=1.05)):
        found += median_ratio(a, b, block_size=10, num_resamples=800, seed=seed).bounds[0] > 1.0
    assert found >= 900


def test_fewer_runs_of_the_same_two_simulations():
    rng = np.random.default_rng(13)
    equal = [median_ratio(a, b, block_size=10, num_resamples=800).bounds for a, b in _latencies(rng, 120)]
    slower = [median_ratio(a, b, block_size=10, num_resamples=800).bounds for a, b in _latencies(rng, 120, slower=1.05)]
    held = sum(low <= 1.0 <= high for low, high in equal)
    assert clopper_pearson(held, 120, 0.999)[1] >= 0.95
    assert sum(low > 1.0 for low, _ in slower) >= 100


def test_blocks_are_resampled_together_so_that_a_busy_spell_hits_both():
    """Two runners whose times differ by 1 % on a machine whose speed triples: unpaired blocks could not tell."""
    speed = np.repeat(np.exp(np.random.default_rng(0).normal(0, 0.5, size=40)), 10)
    low, high = median_ratio(speed, 1.01 * speed, block_size=10).bounds
    assert (low, high) == pytest.approx((1.01, 1.01))


def test_one_block_says_nothing_and_broken_latencies_are_refused():
    found = median_ratio(np.ones(10), np.full(10, 2.0), block_size=10)
    assert found.ratio == 2.0
    assert found.bounds == (0.0, math.inf)
    for a, b in (
        (np.ones(10), np.ones(20)),
        (np.ones(11), np.ones(11)),
        (np.zeros(10), np.ones(10)),
        (np.array([]), np.array([])),
    ):
        with pytest.raises(DataError):
            median_ratio(a, b, block_size=10)
    with pytest.raises(DataError, match="finite"):
        median_ratio(np.full(20, np.nan), np.ones(20), block_size=10)
