"""Announced sample sizes hold what they announce."""

import math

import numpy as np
import pytest

from mpdeploy.measure.power import (
    power_of_paired_binary,
    samples_for_margin,
    samples_to_decide_binary,
    samples_to_decide_mean,
)
from mpdeploy.measure.statistics import PairedCounts, clopper_pearson, tango_bounds


def _passes(rng, n, margin, discordance, drop, repeats=2000):
    shares = [(discordance + drop) / 2, (discordance - drop) / 2, 1 - discordance]
    counts = rng.multinomial(n, shares, size=repeats)
    high = np.asarray(tango_bounds(counts[:, 0], counts[:, 1], n)[1])
    exact = np.array([clopper_pearson(lost, n)[1] if not gained else 0.0 for lost, gained, _ in counts])
    return float((np.maximum(high, exact) < margin).mean())


@pytest.mark.parametrize(
    ("margin", "discordance", "drop"),
    [(0.01, 0.02, 0.0), (0.02, 0.05, 0.005), (0.005, 0.005, 0.0), (0.007646, 0.005, 0.0)],
)
def test_power_at_the_announced_number_of_samples_is_within_five_points(margin, discordance, drop):
    n = samples_to_decide_binary(_counts(discordance, drop), margin)
    announced = power_of_paired_binary(n, margin, discordance=discordance, drop=drop)
    simulated = _passes(np.random.default_rng(0), n, margin, discordance, drop)
    assert announced == pytest.approx(0.8, abs=0.05)
    assert simulated == pytest.approx(announced, abs=0.03)


def _counts(discordance, drop, n=200_000):
    return PairedCounts(n, round(n * (discordance + drop) / 2), round(n * (discordance - drop) / 2))


def test_mlperfs_two_levels_need_about_232_and_23144_samples_to_have_even_odds_by_the_normal_approximation():
    z = 1.6448536
    assert (z / (0.01 * 0.7646)) ** 2 * 0.005 == pytest.approx(232, abs=1)
    assert (z / (0.001 * 0.7646)) ** 2 * 0.005 == pytest.approx(23_144, abs=10)
    # with one or two discordant pairs the exact odds are worse at the smaller number, and as announced at the larger
    assert power_of_paired_binary(23_144, 0.0007646, discordance=0.005) == pytest.approx(0.5, abs=0.02)
    assert power_of_paired_binary(232, 0.007646, discordance=0.005) < 0.3


def test_enumeration_and_normal_approximation_agree_where_they_meet():
    exact = power_of_paired_binary(20_000, 0.003, discordance=0.05)
    normal = power_of_paired_binary(2_000_000, 0.0003, discordance=0.05)
    assert exact == pytest.approx(normal, abs=0.01)


def test_without_a_single_flip_three_over_the_margin_decide():
    n = samples_to_decide_binary(PairedCounts(50, 0, 0), 0.01)
    assert n == math.ceil(math.log(0.05) / math.log(0.99))
    assert clopper_pearson(0, n)[1] <= 0.01 < clopper_pearson(0, n - 1)[1]
    assert samples_for_margin(0.01, discordance=0.0) == n


def test_a_drop_on_the_margin_is_never_decided():
    assert samples_to_decide_binary(PairedCounts(1000, 20, 10), 0.01) is None
    assert samples_to_decide_binary(PairedCounts(1000, 20, 10), 0.0) is None
    assert samples_to_decide_mean(0.01, 0.2, 0.01) is None


def test_a_drop_above_the_margin_says_how_many_samples_would_show_the_failure():
    n = samples_to_decide_binary(PairedCounts(1000, 30, 10), 0.01)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, [0.03, 0.01, 0.96], size=2000)
    low = np.asarray(tango_bounds(counts[:, 0], counts[:, 1], n)[0])
    assert float((low > 0.01).mean()) == pytest.approx(0.8, abs=0.05)


def test_the_number_for_scores_of_any_kind_has_the_announced_power():
    n = samples_to_decide_mean(0.0, 0.3, 0.02)
    means = np.random.default_rng(0).normal(0.0, 0.3 / math.sqrt(n), size=4000)
    assert float((means + 1.645 * 0.3 / math.sqrt(n) < 0.02).mean()) == pytest.approx(0.8, abs=0.03)
