"""The model of the drift: energies add up, pairs interact, and a measurement sharpens it for whatever shares roundings with it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mpdeploy.precision.search.surrogate import Measured, Surrogate

NUM_ITEMS, DIMENSIONS = 60, 12


def _vectors(rng: np.random.Generator) -> NDArray[np.float64]:
    """Errors of roundings, as vectors: their energies add up to 2 gates, and their cosines are about 0.3."""
    lengths = np.sqrt(rng.lognormal(0.0, 1.0, NUM_ITEMS))
    directions = rng.standard_normal((NUM_ITEMS, DIMENSIONS))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    vectors = directions * lengths[:, None]
    return np.asarray(vectors * np.sqrt(2.0 / (lengths**2).sum()))


def _energy(vectors: NDArray[np.float64], thrown: NDArray[np.bool_]) -> float:
    return float(np.square(vectors[thrown].sum(axis=0)).sum())


def _measured(vectors: NDArray[np.float64], thrown: NDArray[np.bool_], more: float = 0.0) -> Measured:
    energy = _energy(vectors, thrown)
    return Measured(thrown, np.array([energy]), np.array([energy + more]))


def _predicted(surrogate: Surrogate, thrown: NDArray[np.bool_]) -> tuple[float, float]:
    mean, deviation = surrogate.outputs[0].predict(thrown.astype(float)[None, :] @ surrogate.outputs[0].features)
    return float(mean[0]), float(deviation[0])


def _flipped(rng: np.random.Generator, thrown: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    other = thrown.copy()
    other[rng.permutation(NUM_ITEMS)[:count]] ^= True
    return other


def test_nothing_measured_predicts_the_sum_of_the_energies() -> None:
    rng = np.random.default_rng(0)
    energies = rng.lognormal(0.0, 1.0, (NUM_ITEMS, 2))
    surrogate = Surrogate(energies, np.zeros_like(energies))
    thrown = rng.random(NUM_ITEMS) < 0.5
    assert _predicted(surrogate, thrown)[0] == pytest.approx(energies[thrown, 0].sum())
    margins = surrogate.margins(thrown.astype(float)[None, :] @ surrogate.features)
    assert margins.shape == (1, 2)
    assert (margins < 0).all(), "both outputs are far above the gate"


def test_a_measurement_is_believed_where_it_was_made_and_less_so_far_from_it() -> None:
    rng = np.random.default_rng(1)
    vectors = _vectors(rng)
    energies = np.square(vectors).sum(axis=1)[:, None]
    surrogate = Surrogate(energies, np.full_like(energies, 0.25))
    thrown = rng.random(NUM_ITEMS) < 0.5
    before = _predicted(surrogate, thrown)[1]
    surrogate.learn([_measured(vectors, thrown)])
    at_it, near, far = (_predicted(surrogate, _flipped(rng, thrown, count)) for count in (0, 2, 30))
    assert at_it[0] == pytest.approx(_energy(vectors, thrown), rel=0.02)
    assert at_it[1] < near[1] < far[1]
    assert at_it[1] < before / 3


def test_interactions_are_learnt_from_neighbours() -> None:
    """Near a point where many neighbours were measured, the surrogate says who passes; the sum of the energies does not."""
    errors, of_sums, claimed = [], [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        vectors = _vectors(rng)
        energies = np.square(vectors).sum(axis=1)[:, None]
        surrogate = Surrogate(energies, np.full_like(energies, 1e-4))
        centre = rng.random(NUM_ITEMS) < 0.5
        seen = [_flipped(rng, centre, 6) for _ in range(40)]
        surrogate.learn([_measured(vectors, each) for each in seen])
        offset = _energy(vectors, centre) - energies[centre].sum()
        for _ in range(40):
            unseen = _flipped(rng, centre, 6)
            truth = _energy(vectors, unseen)
            mean, deviation = _predicted(surrogate, unseen)
            errors.append(mean - truth)
            of_sums.append(energies[unseen].sum() + offset - truth)
            claimed.append((mean - truth) / deviation)
    assert np.std(errors) < 0.7 * np.std(of_sums), "even a sum that is put right at the centre is further off"
    assert 0.5 < np.std(claimed) < 1.5, "and it knows how far off it may be"


def test_features_predict_what_walking_adds_up() -> None:
    """Sums over the roundings that happen may be kept up to date flip by flip."""
    rng = np.random.default_rng(3)
    energies = rng.lognormal(0.0, 1.0, (NUM_ITEMS, 2)) / NUM_ITEMS
    surrogate = Surrogate(energies, np.full_like(energies, 0.3))
    seen = [rng.random(NUM_ITEMS) < share for share in (0.2, 0.5, 1.0)]
    sums = [energies[each].sum(axis=0) * 1.1 for each in seen]
    surrogate.learn([Measured(each, total, total) for each, total in zip(seen, sums, strict=True)])
    thrown = rng.random(NUM_ITEMS) < 0.5
    sums = surrogate.features[thrown].sum(axis=0)
    other = thrown.copy()
    other[7] ^= True
    walked = sums + (1 if other[7] else -1) * surrogate.features[7]
    np.testing.assert_allclose(
        surrogate.margins(walked[None, :]), surrogate.margins(surrogate.features[other].sum(axis=0)[None, :]), rtol=1e-6
    )


def test_what_held_out_samples_add_moves_the_gate_and_prefers_nothing() -> None:
    """They add a tenth of a gate wherever it was measured: that is expected everywhere, and no rounding is blamed for it."""
    rng = np.random.default_rng(4)
    vectors = _vectors(rng)
    energies = np.square(vectors).sum(axis=1)[:, None]
    seen = [rng.random(NUM_ITEMS) < 0.5 for _ in range(12)]
    margins = {}
    for more in (0.0, 0.1):
        surrogate = Surrogate(energies, np.full_like(energies, 0.1))
        surrogate.learn([_measured(vectors, each, more) for each in seen])
        predictions = [_predicted(surrogate, each)[0] for each in seen[:3]]
        sums = np.stack(seen[:3]).astype(float) @ surrogate.features
        margins[more] = surrogate.margins(sums)[:, 0], predictions
    assert margins[0.0][1] == pytest.approx(margins[0.1][1]), "what is learnt of the roundings is the same"
    assert (margins[0.1][0] < margins[0.0][0]).all()
