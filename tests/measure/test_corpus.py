"""Corpus metrics: the same resamples on both sides, and bounds that keep what they promise."""

import math

import numpy as np
import pytest

from mpdeploy.errors import DataError
from mpdeploy.measure.corpus import corpus_bounds, corpus_draws


def f1(outputs, labels):
    predicted = outputs["y"] > 0
    hits = float((predicted & (labels == 1)).sum())
    return 2 * hits / max(1.0, float(predicted.sum() + (labels == 1).sum()))


def _sides(rng, n, extra_wrong):
    """Two detectors of a class that one in four samples has; the second misses `extra_wrong` more of them."""
    labels = (rng.random(n) < 0.25).astype(int)
    right = rng.random(n) < 0.95
    golden = np.where(right, 2.0 * labels - 1.0, 1.0 - 2.0 * labels)
    found = np.where((labels == 1) & right & (rng.random(n) < extra_wrong), -1.0, golden)
    return {"y": golden}, {"y": found}, labels


def _bounds(golden, found, labels, **options):
    draws = [corpus_draws(f1, outputs, labels, num_resamples=300, **options) for outputs in (golden, found)]
    return corpus_bounds(draws[0].value, draws[1].value, draws[0].draws, draws[1].draws, num_units=draws[0].num_units)


def test_equal_answers_give_equal_resamples():
    golden, _, labels = _sides(np.random.default_rng(0), 200, 0.0)
    first, second = (corpus_draws(f1, golden, labels, num_resamples=200) for _ in range(2))
    assert (first.draws == second.draws).all()
    assert first.draws.std() > 0
    assert first.value == f1(golden, labels)


def test_equal_answers_on_few_samples_do_not_prove_a_small_margin():
    golden, _, labels = _sides(np.random.default_rng(0), 20, 0.0)
    low, high = _bounds(golden, golden, labels).bounds
    assert high > 0.1
    assert low == -high


@pytest.mark.slow
@pytest.mark.parametrize("miss", [0.02, 0.05, 0.2])
def test_a_detector_degraded_by_exactly_the_margin_passes_in_at_most_five_per_cent(miss):
    """The margin is the true drop, from a million samples; 95 % of 200 runs is 190, less three standard deviations is 181."""
    golden, found, labels = _sides(np.random.default_rng(9), 1_000_000, miss)
    margin = f1(golden, labels) - f1(found, labels)
    above = sum(_bounds(*_sides(np.random.default_rng(seed), 300, miss)).bounds[1] >= margin for seed in range(200))
    assert above >= 181


def test_whole_clusters_are_drawn():
    golden, _, labels = _sides(np.random.default_rng(1), 400, 0.1)
    clusters = np.arange(400) // 40
    draws = corpus_draws(
        lambda outputs, labels: float(len(outputs["y"])), golden, labels, clusters=clusters, num_resamples=200
    )
    assert draws.num_units == 10
    assert set(draws.draws) == {400.0}
    seen = []
    corpus_draws(
        lambda outputs, _: seen.append(outputs["y"]) or 0.0, {"y": clusters}, None, clusters=clusters, num_resamples=200
    )
    assert all((np.bincount(rows) % 40 == 0).all() for rows in seen)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_is_no_number_is_refused(bad):
    draws = np.zeros(300)
    with pytest.raises(DataError, match="not a number"):
        corpus_bounds(0.9, bad, draws, draws, num_units=100)
    draws[7] = bad
    with pytest.raises(DataError, match="on 1 of 300 resamples"):
        corpus_bounds(0.9, 0.9, np.zeros(300), draws, num_units=100)


def test_one_number_a_sample_is_refused_with_a_hint():
    with pytest.raises(DataError, match="one number over all samples") as caught:
        corpus_draws(lambda outputs, labels: outputs["y"], {"y": np.zeros(5)}, None)
    assert "validation.metric" in str(caught.value)


def test_no_samples_are_refused():
    with pytest.raises(DataError, match="no sample"):
        corpus_draws(f1, {"y": np.zeros(0)}, np.zeros(0))
