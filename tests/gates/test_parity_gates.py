"""Gates on paired seeds: decided from evidence alone, three-valued, and never passed by what was not measured."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from mpdeploy.config import PARITY_GATES, Gate
from mpdeploy.gates.evidence import Evidence, Place
from mpdeploy.gates.gate import decide, gate_json

NLL, SCORE, CHURN = PARITY_GATES


def place(*, ratio=1.0, spread=0.005, seeds=3, looks=(3,), n=180, flips=0.0, facts=(), without=(), seed=0) -> Place:
    """Losses, 0/1 scores and predictions of `seeds` paired trainings; the candidate's loss is `ratio` times the reference's."""
    rng = np.random.default_rng(seed)
    reference = rng.exponential(0.3, (1, n)) * rng.lognormal(0, 0.02, (seeds, n))
    candidate = reference * ratio * rng.lognormal(0, 0.02, (seeds, n)) * (1 + rng.normal(0, spread, (seeds, 1)))
    labels = rng.integers(0, 10, n)
    answers = np.where(rng.random((seeds, n)) < 0.03, (labels + 1) % 10, labels)
    other = np.where(rng.random((seeds, n)) < flips, (answers + 1) % 10, answers)
    arrays = {
        "ids": np.arange(n), "parity/reference_nll": reference, "parity/candidate_nll": candidate,
        "parity/reference_predictions": answers, "parity/candidate_predictions": other,
        "parity/reference_scores": (answers == labels) * 1.0, "parity/candidate_scores": (other == labels) * 1.0,
    }  # fmt: skip
    kept = {name: array for name, array in arrays.items() if not any(word in name for word in without)}
    return Place("parity/seeds", "fp32", "10-train", baseline="fp32-reference", arrays=kept,
                 facts={"parity_looks": list(looks), **dict(facts)})  # fmt: skip


def verdict(gate: Gate, at: Place):
    return decide([gate], Evidence({at.at: at}, {}, {}))[0]


@pytest.mark.parametrize(
    ("ratio", "spread", "expected"),
    [(1.0, 0.005, "pass"), (1.2, 0.005, "fail"), (0.8, 0.005, "fail"), (1.0, 0.2, "inconclusive")],
    ids=["equal", "worse", "better is not equal", "no significant difference is no pass"],
)
def test_held_out_loss_is_equal_different_or_open(ratio, spread, expected):
    assert verdict(NLL, place(ratio=ratio, spread=spread)).verdict == expected


def test_the_message_says_what_it_rests_on():
    found = verdict(NLL, place())
    assert "% [" in found.message
    assert "against a margin of 5 % either way: pass (3 paired seeds x 180 samples; FP32 0." in found.message
    assert "its seeds spread by" in found.message
    assert found.interval is not None
    assert -0.05 < found.interval[0] < found.interval[1] < 0.05


def test_the_margin_may_be_declared_in_nats():
    nats = Gate(id="nats", metric="parity_nll_nats", limit=0.015)
    assert verdict(nats, place()).verdict == "pass"
    assert verdict(nats, place(ratio=1.2)).verdict == "fail"


def test_later_looks_are_wider_and_the_first_that_decides_is_the_answer():
    one, three = (verdict(NLL, place(looks=looks)) for looks in ((3,), (3, 5, 10)))
    assert three.interval[1] - three.interval[0] > one.interval[1] - one.interval[0]
    assert "each bound at 98.3 %" in three.message
    more = verdict(NLL, place(looks=(3, 5, 10), seeds=5, spread=0.02))
    assert more.num_samples == 180
    assert "5 paired seeds" in more.message


def test_churn_is_shown_against_that_of_seeds_and_no_flip_is_a_bound():
    assert verdict(CHURN, place(flips=0.4)).verdict == "fail"
    found = verdict(CHURN, place(n=400))
    assert found.verdict == "pass"
    assert "AMP changes 0 %, another seed" in found.message
    assert "no flip in 400 samples bounds the flip rate at 0.75 %" in found.message
    assert verdict(CHURN, place(n=60)).verdict == "inconclusive", "3/60 is 5 %: too few samples for 2 %"


def test_a_score_that_falls_fails():
    assert verdict(SCORE, place(flips=0.3)).verdict == "fail"
    assert verdict(SCORE, place(n=1000)).verdict == "pass"


@pytest.mark.parametrize("without", ["candidate_nll", "reference_nll", "nll"])
def test_numbers_that_were_lost_are_never_a_pass(without):
    assert verdict(NLL, place(without=(without,))).verdict == "fail"


def test_a_loss_that_is_not_a_number_fails():
    broken = place()
    broken.arrays["parity/candidate_nll"][1, 7] = np.nan
    assert verdict(NLL, broken).verdict == "fail"


def test_training_in_fp32_is_its_own_reference():
    same = Place("parity/seeds", "fp32", "10-train", facts={"parity_looks": [3], "parity_same": True})
    assert [verdict(gate, same).verdict for gate in PARITY_GATES] == ["pass"] * 3
    assert "training ran in fp32" in verdict(NLL, same).message


def test_the_same_verdict_comes_from_saved_evidence_without_torch(tmp_path):
    at = place()
    Evidence({at.at: at}, {}, {}).save(tmp_path)
    evidence = Evidence.load(tmp_path)
    expected = gate_json(decide(PARITY_GATES, evidence), evidence, "p", PARITY_GATES)
    code = (
        "import sys, json; sys.modules['torch'] = None\n"
        "from pathlib import Path; from mpdeploy.config import PARITY_GATES\n"
        "from mpdeploy.gates.evidence import Evidence; from mpdeploy.gates.gate import decide, gate_json\n"
        f"e = Evidence.load(Path({str(tmp_path)!r}))\n"
        "print(json.dumps(gate_json(decide(PARITY_GATES, e), e, 'p', PARITY_GATES)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == expected
