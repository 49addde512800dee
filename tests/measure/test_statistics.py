"""Intervals, tests and decisions, against published values, brute force and exact enumeration."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdeploy.measure.statistics import (
    PairedCounts,
    clopper_pearson,
    decide_at_most,
    holm,
    mcnemar_p_value,
    paired_binary_bounds,
    quantile,
    quantile_bounds,
    tango_bounds,
    tango_statistic,
)

stats = pytest.importorskip("scipy.stats")

PUBLISHED = [
    # lost, gained, n, two-sided level, low, high, source
    (
        1,
        7,
        21,
        0.95,
        -0.517,
        -0.026,
        "Bentur 2009, in Fagerland et al., Statistical Analysis of Contingency Tables",
    ),
    (6, 16, 161, 0.95, -0.1240, -0.0054, "Cavo 2012, R package contingencytables, tests of chapter 8"),
    (25, 2, 102, 0.95, 0.139, 0.321, "Chang et al., PMC10763857, table 3"),
    (28, 25, 618, 0.90, -0.0148, 0.0247, "R package PropCIs, scoreci.mp(25, 28, 618, 0.90)"),
]


@pytest.mark.parametrize(("lost", "gained", "n", "level", "low", "high", "source"), PUBLISHED)
def test_tangos_interval_is_the_published_one(lost, gained, n, level, low, high, source):
    found = tango_bounds(lost, gained, n, confidence=0.5 + level / 2)
    digits = max(len(str(abs(bound))) - 2 for bound in (low, high))
    assert [round(float(bound), digits) for bound in found] == [low, high], source


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(0, 0, 40), (3, 0, 40), (0, 5, 40), (7, 2, 55), (40, 0, 40), (4, 4, 9)]
)
def test_tangos_interval_inverts_the_score_test_that_a_brute_force_likelihood_gives(lost, gained, n):
    def brute_force_statistic(drop):
        """The restricted maximum-likelihood variance by a fine grid instead of the closed form."""
        shares = np.linspace(max(0.0, -drop), (1.0 - drop) / 2, 400_001)
        p_gained, p_lost = shares, shares + drop
        keep = (p_lost >= 0) & (p_gained + p_lost <= 1)
        p_gained, p_lost = p_gained[keep], p_lost[keep]
        rest = n - lost - gained
        with np.errstate(divide="ignore", invalid="ignore"):
            likelihood = sum(
                np.where(count == 0, 0.0, count * np.log(share))
                for count, share in ((lost, p_lost), (gained, p_gained), (rest, 1 - p_lost - p_gained))
            )
        best = p_gained[np.nanargmax(likelihood)]
        return (lost - gained - n * drop) / math.sqrt(n * (2 * best + drop * (1 - drop)))

    z = 1.6448536269514722
    low, high = (float(bound) for bound in tango_bounds(lost, gained, n))
    if lost < n:
        assert brute_force_statistic(high) == pytest.approx(-z, abs=2e-2)
    else:
        assert high == pytest.approx(1.0)
    assert brute_force_statistic(low) == pytest.approx(z, abs=2e-2)


@given(st.integers(1, 3000), st.data())
@settings(max_examples=60, deadline=None)
def test_tangos_interval_holds_the_estimate_and_mirrors_when_the_models_swap(n, data):
    lost = data.draw(st.integers(0, n))
    gained = data.draw(st.integers(0, n - lost))
    low, high = (float(bound) for bound in tango_bounds(lost, gained, n))
    assert -1.0 <= low <= (lost - gained) / n <= high <= 1.0
    mirrored = tango_bounds(gained, lost, n)
    assert [float(mirrored[1]), float(mirrored[0])] == pytest.approx([-low, -high], abs=1e-12)


def test_tangos_statistic_is_mcnemars_without_correction_at_a_drop_of_zero():
    assert float(tango_statistic(17, 8, 300, 0.0)) == pytest.approx((17 - 8) / math.sqrt(17 + 8))


@pytest.mark.parametrize("n", [5, 50, 360, 10_000])
def test_zero_flips_bound_the_drop_by_about_three_over_n(n):
    low, high = paired_binary_bounds(PairedCounts(n, 0, 0))
    assert high == pytest.approx(1 - 0.05 ** (1 / n))
    assert high == -low
    if n > 100:
        assert high == pytest.approx(3 / n, rel=0.01)


def test_zero_flips_at_five_samples_do_not_pass_a_margin_of_one_point():
    assert decide_at_most(paired_binary_bounds(PairedCounts(5, 0, 0)), 0.01) == "inconclusive"


def _share_that_passes(n, margin, share_gained):
    """Exact probability that a candidate whose true drop is `margin` passes it."""
    share_lost = share_gained + margin
    lost = np.arange(min(n, int(n * share_lost + 9 * math.sqrt(n * share_lost) + 20)) + 1)
    gained = np.arange(min(n, int(n * share_gained + 9 * math.sqrt(n * share_gained) + 20)) + 1)
    total = 0.0
    for count in gained:
        here = lost[lost + count <= n]
        weight = stats.binom.pmf(count, n, share_gained) * stats.binom.pmf(
            here, n - count, share_lost / (1 - share_gained)
        )
        high = np.asarray(tango_bounds(here, np.full_like(here, count), n)[1])
        if count == 0:
            high = np.maximum(high, [clopper_pearson(int(each), n)[1] for each in here])
        total += float(weight[high < margin].sum())
    return total


@pytest.mark.parametrize("margin", [0.005, 0.01, 0.02, 0.05])
@pytest.mark.parametrize("n", [60, 360, 1000])
def test_a_drop_of_exactly_the_margin_passes_in_about_five_percent_by_enumeration(n, margin):
    worst = max(_share_that_passes(n, margin, share) for share in (0.0, 1e-3, 1e-2, 5e-2))
    assert worst <= 0.056


def test_without_the_exact_bound_one_sided_discordance_would_pass_too_often():
    """The positive control of `paired_binary_bounds`: Tango's bound alone lets more through where nothing is gained."""
    n, margin = 360, 0.05
    lost = np.arange(60)
    weight = stats.binom.pmf(lost, n, margin)
    alone = float(weight[np.asarray(tango_bounds(lost, np.zeros_like(lost), n)[1]) < margin].sum())
    assert alone > 0.05
    assert _share_that_passes(n, margin, 0.0) < 0.03


def test_seeded_runs_at_exactly_the_margin_pass_in_at_most_five_percent():
    """2,000 runs of 1,000 samples, discordance 6 %, true drop 2 points; the simulation's own interval counts."""
    rng = np.random.default_rng(20240607)
    n, margin, repeats = 1000, 0.02, 2000
    counts = rng.multinomial(n, [0.04, 0.02, 0.94], size=repeats)
    high = np.asarray(tango_bounds(counts[:, 0], counts[:, 1], n)[1])
    passed = int((high < margin).sum())
    assert clopper_pearson(passed, repeats, 0.975)[0] <= 0.05
    assert passed > 40  # and the gate is not just always refusing


def test_seeded_runs_of_an_equally_good_model_pass():
    rng = np.random.default_rng(1)
    counts = rng.multinomial(5000, [0.01, 0.01, 0.98], size=1000)
    assert (np.asarray(tango_bounds(counts[:, 0], counts[:, 1], 5000)[1]) < 0.01).mean() > 0.98


@pytest.mark.parametrize(
    ("bounds", "limit", "decision"),
    [
        ((-0.01, 0.004), 0.005, "pass"),
        ((-0.01, 0.005), 0.005, "inconclusive"),
        ((0.001, 0.02), 0.005, "inconclusive"),
        ((0.006, 0.02), 0.005, "fail"),
        ((math.nan, math.nan), 0.005, "fail"),
        ((-0.1, math.nan), 0.005, "fail"),
        ((-0.1, 0.0), math.nan, "fail"),
        ((-math.inf, math.inf), 0.005, "inconclusive"),
    ],
)
def test_the_decision_is_three_valued_and_nan_is_never_a_pass(bounds, limit, decision):
    assert decide_at_most(bounds, limit) == decision


@pytest.mark.parametrize(("count", "n"), [(0, 5), (0, 360), (3, 360), (360, 360), (17, 100)])
def test_clopper_pearson_inverts_the_binomial_distribution(count, n):
    low, high = clopper_pearson(count, n)
    if count < n:
        assert stats.binom.cdf(count, n, high) == pytest.approx(0.05)
    if count > 0:
        assert stats.binom.sf(count - 1, n, low) == pytest.approx(0.05)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (9, 3), (12, 12), (0, 24)])
def test_mcnemar_is_the_exact_binomial_test_below_25_discordant_pairs(lost, gained):
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar_p_value(PairedCounts(500, lost, gained)) == pytest.approx(expected)


def test_mcnemar_is_the_corrected_chi_squared_test_from_25_discordant_pairs():
    # 86 150 of Agresti, Categorical Data Analysis, table 11.1: (|150 - 86| - 1)^2 / 236 = 16.82
    assert mcnemar_p_value(PairedCounts(1600, 150, 86)) == pytest.approx(stats.chi2.sf(63**2 / 236, 1))
    assert mcnemar_p_value(PairedCounts(100, 13, 13)) == 1.0


def test_holm_matches_the_worked_example_and_never_falls():
    # by hand: 4 x 0.01, 3 x 0.02, then never less: 2 x 0.03 and 1 x 0.04
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.02}) == pytest.approx(
        {"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06}
    )


def test_holm_keeps_the_chance_of_any_false_claim_at_five_percent():
    rng = np.random.default_rng(3)
    claims = sum(min(holm(dict(enumerate(row))).values()) < 0.05 for row in rng.uniform(size=(2000, 6)))
    assert clopper_pearson(claims, 2000, 0.975)[0] <= 0.05


def test_a_p99_bound_needs_299_samples():
    assert quantile_bounds(np.arange(298.0), 0.99)[1] is None
    assert quantile_bounds(np.arange(299.0), 0.99)[1] == 298.0


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_quantile_bounds_hold_the_true_quantile_in_95_percent_on_each_side(share):
    rng = np.random.default_rng(5)
    true = stats.lognorm.ppf(share, 0.5)
    low, high = zip(*(quantile_bounds(rng.lognormal(sigma=0.5, size=400), share) for _ in range(1000)), strict=True)
    assert (np.array(low) > true).sum() <= 70
    assert (np.array(high) < true).sum() <= 70
    assert (np.array(low) > true).sum() + (np.array(high) < true).sum() >= 30  # not simply the whole range


def test_quantiles_are_samples_except_for_an_even_median():
    assert quantile(np.array([4.0, 1.0, 2.0, 3.0]), 0.5) == 2.5
    assert quantile(np.arange(1.0, 101.0), 0.99) == 99.0
