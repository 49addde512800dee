"""Non-inferiority of per-sample scores."""

import math

import numpy as np
import pytest

from mpdeploy.errors import DataError
from mpdeploy.measure.paired import MIN_CHANGED, compare_paired


def test_scores_of_zero_and_one_are_compared_by_tangos_interval():
    baseline, candidate = np.ones(360), np.r_[np.zeros(4), np.ones(356)]
    found = compare_paired(baseline, candidate, margin=0.05)
    assert (found.method, found.num_lost, found.num_gained) == ("tango", 4, 0)
    assert found.drop == pytest.approx(4 / 360)
    assert found.decision == "pass"
    assert compare_paired(candidate, baseline, margin=0.05).drop == pytest.approx(-4 / 360)


def test_other_scores_are_bootstrapped():
    rng = np.random.default_rng(0)
    baseline = rng.random(2000)
    found = compare_paired(baseline, baseline - 0.01 + rng.normal(0, 0.02, 2000), margin=0.02)
    assert (found.method, found.decision) == ("bca", "pass")
    assert compare_paired(baseline, baseline - 0.03, margin=0.02).decision == "fail"


def test_one_nan_in_ten_thousand_scores_fails():
    candidate = np.ones(10_000)
    candidate[4321] = np.nan
    found = compare_paired(np.ones(10_000), candidate, margin=0.5)
    assert found.decision == "fail"
    assert math.isnan(found.drop)


def test_no_samples_fail():
    assert compare_paired(np.ones(0), np.ones(0), margin=0.5).decision == "fail"


@pytest.mark.parametrize("scores", [np.ones(5), np.linspace(0.1, 1, 5), np.full(5, -0.3)])
def test_five_samples_that_did_not_change_do_not_pass_a_margin_of_one_point(scores):
    assert compare_paired(scores, scores, margin=0.01).decision == "inconclusive"


def test_scores_that_are_all_zero_prove_nothing():
    """Neither does a metric that is 0 everywhere (as a regression's error on constants)."""
    assert compare_paired(np.full(30, -0.0) * 0.5, np.zeros(30), margin=0.01).decision == "inconclusive"
    mixed = np.r_[np.full(5, 0.5), np.ones(5)]
    assert compare_paired(mixed, mixed, margin=0.1).decision == "inconclusive"


def test_a_thousand_samples_of_token_accuracy_that_did_not_change_pass():
    scores = np.random.default_rng(0).integers(0, 9, size=1000) / 8
    assert compare_paired(scores, scores, margin=0.01).decision == "pass"


def test_the_caution_ends_where_enough_samples_changed():
    rng = np.random.default_rng(0)
    baseline = rng.random(400)
    few, many = baseline.copy(), baseline.copy()
    few[: MIN_CHANGED - 1] -= 1e-4
    many[: MIN_CHANGED + 1] -= 1e-4
    assert compare_paired(baseline, few, margin=0.01).decision == "inconclusive"
    assert compare_paired(baseline, many, margin=0.01).decision == "pass"


def test_clusters_make_the_same_numbers_say_less():
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(40), 50)
    baseline = np.full(2000, 0.8)
    effects = rng.normal(0.0, 0.05, size=40)
    candidate = baseline - np.repeat(effects - effects.mean() + 0.01, 50)
    free, grouped = (compare_paired(baseline, candidate, margin=0.015, clusters=each) for each in (None, clusters))
    assert grouped.method == "bca-clusters"
    assert grouped.bounds[1] - grouped.bounds[0] > 4 * (free.bounds[1] - free.bounds[0])
    assert grouped.decision == "inconclusive"
    assert free.decision != "inconclusive"  # the wrong claim that clusters are there to prevent


def test_an_inconclusive_comparison_says_how_many_samples_would_decide():
    found = compare_paired(np.ones(360), np.r_[np.zeros(3), np.ones(357)], margin=0.015)
    assert found.decision == "inconclusive"
    assert 361 < found.samples_to_decide < 10_000


def test_a_continuous_candidate_at_exactly_the_margin_passes_in_at_most_five_percent():
    rng = np.random.default_rng(5)
    repeats, n, margin = 500, 400, 0.01
    passed = 0
    for _ in range(repeats):
        baseline = rng.beta(8, 2, size=n)
        passed += (
            compare_paired(baseline, baseline - rng.normal(margin, 0.08, size=n), margin=margin).decision == "pass"
        )
    assert passed / repeats <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)
    assert passed > 5


def test_arrays_of_other_lengths_are_refused():
    with pytest.raises(DataError, match="one length"):
        compare_paired(np.ones(3), np.ones(4), margin=0.1)


def test_clusters_of_one_sample_each_are_no_clusters():
    """Also in time: nothing is then resampled."""
    rng = np.random.default_rng(0)
    baseline = rng.random(2000)
    candidate = baseline - rng.normal(0.001, 0.05, 2000)
    alone = compare_paired(baseline, candidate, margin=0.01, clusters=np.arange(2000))
    assert alone == compare_paired(baseline, candidate, margin=0.01)
    assert alone.method == "bca"
