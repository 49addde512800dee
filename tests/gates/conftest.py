"""Evidence that is made up, with one thing changed at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpdeploy.gates.evidence import Evidence, Place, arrays_of_drift
from mpdeploy.measure.drift import drift_of

ENVIRONMENT = {"cpu": "Test CPU", "cores": 2, "gpus": [], "packages": {"numpy": "2"}}


def make_place(
    at: str = "engine/openvino",
    *,
    n: int = 1000,
    precision: str = "fp16",
    num_lost: int = 0,
    num_gained: int = 0,
    noise: float = 1e-3,
    slower: float = 0.8,
    seed: int = 0,
    facts: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    **changes: Any,
) -> Place:
    """A place that passes the default gates, unless told otherwise; `drop` names arrays to leave out."""
    rng = np.random.default_rng(seed)
    golden = rng.normal(size=(n, 10))
    report = drift_of([({"logits": golden}, {"logits": golden + noise * rng.normal(size=golden.shape)})])
    baseline, scores = np.ones(n), np.ones(n)
    scores[:num_lost] = 0.0
    baseline[num_lost : num_lost + num_gained] = 0.0
    classes = golden.argmax(axis=1)
    changed = classes.copy()
    changed[: num_lost + num_gained] = (changed[: num_lost + num_gained] + 1) % 10
    spells = np.repeat(np.exp(0.02 * rng.normal(size=30)), 10)
    arrays = {
        "ids": np.arange(n) + 100,
        "scores": scores,
        "baseline_scores": baseline,
        "predictions": changed,
        "baseline_predictions": classes,
        "latency_a_ms": 2.0 * spells * np.exp(0.02 * rng.normal(size=300)),
        "latency_b_ms": 2.0 * slower * spells * np.exp(0.02 * rng.normal(size=300)),
        **arrays_of_drift(report),
    }
    place = Place(
        at=at,
        precision=precision,
        stage="40-build/openvino",
        facts={"kept_in_half": [], "size_bytes": 1000, "latency_block_size": 10} if facts is None else facts,
        arrays={name: array for name, array in arrays.items() if name not in drop},
        digests={"artifact": "a" * 64},
        notes={"metric": "top1"},
    )
    return Place(**{**place.__dict__, **changes})


def make_evidence(*places: Place) -> Evidence:
    """Evidence of these places."""
    return Evidence({place.at: place for place in places}, {"dataset": "d" * 64}, ENVIRONMENT)


@pytest.fixture
def place() -> Callable[..., Place]:
    return make_place


@pytest.fixture
def evidence() -> Callable[..., Evidence]:
    return make_evidence
