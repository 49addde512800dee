"""Corpus metrics: the same resamples on both sides, and bounds that keep what they promise."""

import math

import numpy as np
import pytest

from mpdeploy.errors import DataError
from mpdeploy.measure.corpus import (
    CorpusDraws,
    Worth,
    all_but_one_group,
    corpus_bounds,
    corpus_draws,
    corpus_worth,
)

NUM_CLASSES = 4


def macro_f1(outputs, labels):
    predicted, c = outputs["y"], NUM_CLASSES
    counts = np.bincount(labels * c + predicted, minlength=c * c).reshape(c, c)
    total = counts.sum(0) + counts.sum(1)
    return float(np.where(total > 0, 2 * np.diag(counts) / np.maximum(total, 1), 0.0).mean())


def mean_error(outputs, labels):
    return -float(np.abs(outputs["y"] - labels).mean())


def _sides(rng, n, shares, lost, gained):
    """Labels, and classes that two models predict: the second one loses and gains some of what the first one had."""
    labels = rng.choice(NUM_CLASSES, n, p=shares)
    wrong, also_wrong = ((labels + 1 + rng.integers(0, NUM_CLASSES - 1, n)) % NUM_CLASSES for _ in range(2))
    baseline = np.where(rng.random(n) < 0.9, labels, wrong)
    luck, right = rng.random(n), baseline == labels
    worse = np.where(right & (luck < np.asarray(lost)[labels]), also_wrong, baseline)
    return labels, baseline, np.where(~right & (luck < gained), labels, worse)


def _draws(rng, labels, predicted, num_resamples):
    """The metric on resamples of the samples, as `corpus_draws` makes them, but all at once: they are counts of a table."""
    c = NUM_CLASSES
    cells, counts = np.unique((labels * c + predicted[0]) * c + predicted[1], return_counts=True)
    resampled = rng.multinomial(len(labels), counts / len(labels), size=num_resamples).astype(float)
    of_label, one = np.eye(c)[cells // (c * c)], np.eye(c)
    for side in ((cells // c) % c, cells % c):
        hits = resampled @ (of_label * (cells // (c * c) == side)[:, None])
        total = resampled @ of_label + resampled @ one[side]
        yield np.where(total > 0, 2 * hits / np.maximum(total, 1), 0.0).mean(axis=1)


def _bounds(rng, labels, *predicted, num_resamples=1000):
    sides = []
    for classes, draws in zip(predicted, _draws(rng, labels, predicted, num_resamples), strict=True):
        outputs = {"y": classes}
        left_out = [macro_f1({"y": classes[rows]}, labels[rows]) for rows in all_but_one_group(len(labels))]
        sides.append(CorpusDraws(macro_f1(outputs, labels), draws, np.array(left_out), len(labels)))
    return corpus_bounds(*sides, corpus_worth(macro_f1, {"y": predicted[0]}, labels)).bounds


EQUAL = (0.25, 0.25, 0.25, 0.25)
RARE = (0.5, 0.3, 0.17, 0.03)


def _passing_and_failing(n, shares, lost, gained, num_runs):
    """How many runs pass, and how many fail, against the drop that is true (of four million samples)."""
    labels, *predicted = _sides(np.random.default_rng(99), 4_000_000, shares, lost, gained)
    before, after = (macro_f1({"y": classes}, labels) for classes in predicted)
    low, high = np.array(
        [
            _bounds(rng, *_sides(rng, n, shares, lost, gained))
            for rng in (np.random.default_rng(seed) for seed in range(num_runs))
        ]
    ).T
    return int((high < before - after).sum()), int((low > before - after).sum())


def _most(num_runs):
    """The most of `num_runs` that may pass: 5 %, and the simulation's own 95 % bound above it."""
    return 0.05 * num_runs + 1.645 * math.sqrt(num_runs * 0.05 * 0.95)


def test_macro_f1_degraded_by_exactly_the_margin_hardly_ever_passes():
    passing, failing = _passing_and_failing(300, EQUAL, [0.02] * 4, 0.0, 300)
    assert passing <= _most(300)
    assert failing <= _most(300)
    assert passing + failing >= 3, "bounds that hold because they are endless would be no use"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "shares", "lost", "gained"),
    [
        (300, EQUAL, [0.02] * 4, 0.0),
        (300, EQUAL, [0.1] * 4, 0.0),
        (300, EQUAL, [0.1] * 4, 0.5),
        (1000, RARE, [0.05] * 4, 0.1),
        (300, RARE, [0.05, 0.05, 0.05, 0.2], 0.1),  # half of the drop is in a class of nine samples
        (1000, RARE, [0.0, 0.0, 0.0, 0.1], 0.0),  # all of it is: three changed samples of 1,000
    ],
)
def test_it_passes_in_at_most_five_per_cent_of_2000_runs_wherever_the_loss_lies(n, shares, lost, gained):
    passing, failing = _passing_and_failing(n, shares, lost, gained, 2000)
    assert passing <= _most(2000)
    assert failing <= _most(2000)


def test_equal_models_pass_where_there_are_samples_enough():
    """Power: 3,000 samples of which 1 % differ, half of them for the better, pass a margin of two points."""
    rng = np.random.default_rng(5)
    passing = sum(_bounds(rng, *_sides(rng, 3000, EQUAL, [0.0055] * 4, 0.05))[1] < 0.02 for _ in range(30))
    assert passing >= 28


def test_the_resamples_of_a_table_are_those_of_the_samples():
    """What the simulation draws has the spread of what `corpus_draws` draws."""
    labels, first, second = _sides(np.random.default_rng(4), 300, RARE, [0.1] * 4, 0.1)
    quick = np.subtract(*_draws(np.random.default_rng(0), labels, (first, second), 4000))
    sides = [corpus_draws(macro_f1, {"y": each}, labels, num_resamples=1000) for each in (first, second)]
    drops = sides[0].draws - sides[1].draws
    assert drops.mean() == pytest.approx(quick.mean(), abs=4 * quick.std() / 1000**0.5)
    assert drops.std() == pytest.approx(quick.std(), rel=0.1)


def test_equal_answers_give_equal_resamples_and_do_not_prove_a_small_margin():
    labels, answers, _ = _sides(np.random.default_rng(0), 40, EQUAL, [0.0] * 4, 0.0)
    sides = [corpus_draws(macro_f1, {"y": answers}, labels, num_resamples=200) for _ in range(2)]
    assert (sides[0].draws == sides[1].draws).all()
    assert (sides[0].left_out == sides[1].left_out).all()
    assert sides[0].draws.std() > 0
    found = corpus_bounds(*sides, corpus_worth(macro_f1, {"y": answers}, labels))
    low, high = found.bounds
    assert (found.drop, found.num_changed) == (0.0, 0)
    assert high == -low
    assert 2.9 / 40 < high < 0.2, "about three samples of forty, each worth a little more than one fortieth"


# -- what one sample is worth ------------------------------------------------------------------------------------------


def test_a_sample_of_a_rare_class_is_worth_most():
    labels = np.repeat(np.arange(4), [100, 100, 100, 4])
    worth = corpus_worth(macro_f1, {"y": labels.copy()}, labels)
    one_lost = labels.copy()
    one_lost[-1] = 0
    assert worth.largest >= 1.0 - macro_f1({"y": one_lost}, labels) - 1e-12
    assert worth.largest > 5 * worth.typical
    assert not worth.is_smooth


def test_an_error_is_smooth_and_a_count_is_not():
    rng = np.random.default_rng(0)
    outputs, labels = {"y": rng.normal(size=500)}, rng.normal(size=500)
    assert corpus_worth(mean_error, outputs, labels).is_smooth
    shares = {"y": rng.random((500, 4))}
    assert not corpus_worth(
        lambda outputs, labels: float((outputs["y"].argmax(1) == labels).mean()), shares, rng.integers(0, 4, 500)
    ).is_smooth


def test_a_smooth_metric_that_moves_everywhere_is_decided_by_its_resamples_alone():
    rng = np.random.default_rng(1)
    labels = rng.normal(size=400)
    outputs = labels + 0.1 * rng.normal(size=400)
    sides = [corpus_draws(mean_error, {"y": each}, labels, num_resamples=400) for each in (outputs, outputs * 1.0001)]
    found = corpus_bounds(*sides, corpus_worth(mean_error, {"y": outputs}, labels))
    assert found.bounds[1] - found.drop < 3 * found.deviation
    assert found.num_changed is None


def test_a_metric_that_nothing_changes_proves_nothing():
    outputs = {"y": np.zeros(50)}
    sides = [corpus_draws(lambda outputs, labels: 0.5, outputs, None, num_resamples=200) for _ in range(2)]
    found = corpus_bounds(*sides, corpus_worth(lambda outputs, labels: 0.5, outputs, None))
    assert found.bounds == (-math.inf, math.inf)


def test_probing_leaves_the_answers_as_they_are():
    outputs, labels = {"y": np.arange(6) % 4}, np.arange(6) % 4
    corpus_worth(macro_f1, outputs, labels)
    assert outputs["y"].tolist() == [0, 1, 2, 3, 0, 1]


# -- clusters, and what is no number -----------------------------------------------------------------------------------


def test_whole_clusters_are_drawn_and_left_out():
    clusters = np.arange(400) // 40
    seen = []

    def count(outputs, labels):
        seen.append(np.bincount(outputs["y"], minlength=10))
        return float(len(outputs["y"]))

    draws = corpus_draws(count, {"y": clusters}, None, clusters=clusters, num_resamples=200)
    assert draws.num_units == 10
    assert set(draws.draws) == {400.0}
    assert draws.left_out.tolist() == [360.0] * 10
    assert all((rows % 40 == 0).all() for rows in seen)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_is_no_number_is_refused(bad):
    worth, left_out = Worth(0.01, 0.01, is_smooth=False), np.zeros(100)
    good = CorpusDraws(0.9, np.zeros(300), left_out, 100)
    with pytest.raises(DataError, match="not a number"):
        corpus_bounds(good, CorpusDraws(bad, np.zeros(300), left_out, 100), worth)
    draws = np.where(np.arange(300) == 7, bad, 0.0)
    with pytest.raises(DataError, match="on 1 of 300 resamples"):
        corpus_bounds(good, CorpusDraws(0.9, draws, left_out, 100), worth)


def test_one_number_a_sample_is_refused_with_a_hint():
    with pytest.raises(DataError, match="one number over all samples") as caught:
        corpus_draws(lambda outputs, labels: outputs["y"], {"y": np.zeros(5)}, None)
    assert "validation.metric" in str(caught.value)


def test_no_samples_are_refused():
    with pytest.raises(DataError, match="no sample"):
        corpus_draws(macro_f1, {"y": np.zeros(0)}, np.zeros(0))
