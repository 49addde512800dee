"""Paired seeds and pruning as parts of 10-train: off unless asked for, resumable, and shown to the gates."""

from __future__ import annotations

import numpy as np
import pytest
from test_train_stage import StopsAt, a_pipeline, go, key

from mpdeploy.config import PARITY_GATES, Gate, apply_overrides
from mpdeploy.gates.evidence import Evidence
from mpdeploy.gates.gate import decide
from mpdeploy.pipeline import Context, Silent
from mpdeploy.run_dir import RunDir, StageRecord
from mpdeploy.stages.parity import seeds_place


def seeds_evidence(path, pipeline, outcome) -> Evidence:
    """The evidence that 50-validate writes of a finished 10-train."""
    with RunDir.create(path) as run:
        run.put(StageRecord("10-train", "done", {}, outcome.artifacts, outcome.report))
    found = seeds_place(Context(RunDir.open(path), pipeline, Silent(), "50-validate"))
    return Evidence({place.at: place for place in found}, {}, {})


class Counting(Silent):
    """Counts trainings' steps."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def stage_progress(self, name: str, done: int, total: int, text: str) -> None:
        self.texts.append(text)


def test_tier_0_trains_one_pair_and_shows_no_seeds(tmp_path):
    pipeline = a_pipeline(cpu_precision="bf16")
    outcome = go(tmp_path, pipeline)
    assert outcome.report["parity"] == {"tier": 0}
    assert seeds_evidence(tmp_path, pipeline, outcome).places == {}


def test_tier_1_trains_two_pairs_more_and_gives_the_gates_every_sample(tmp_path):
    pipeline = a_pipeline(cpu_precision="bf16", parity={"tier": 1})
    outcome = go(tmp_path, pipeline)
    report = outcome.report["parity"]
    assert (report["num_seeds"], report["looks"]) == (3, [3])
    evidence = seeds_evidence(tmp_path, pipeline, outcome)
    arrays = evidence.places["parity/seeds"].arrays
    assert arrays["parity/reference_nll"].shape == arrays["parity/candidate_predictions"].shape == (3, 32)
    assert list(arrays["ids"]) == list(range(2000, 2032)), "the calibration split, never the gate's"
    verdicts = decide(pipeline.gates, evidence)
    nll = next(item for item in verdicts if item.id == "parity-nll")
    assert nll.verdict == report["verdict_at"]["3"]
    assert report["nll"]["reference_spread"] == pytest.approx(
        np.std(arrays["parity/reference_nll"].mean(axis=1), ddof=1)
    )
    assert report["churn"]["seeds"] >= 0


def test_tier_2_looks_on_while_it_is_open_and_stops_when_it_is_decided(tmp_path):
    def looked(limit: float, name: str) -> dict:
        pipeline = a_pipeline(cpu_precision="bf16", parity={"tier": 2, "more_seeds": (4, 5)}, epochs=1)
        gates = (Gate(id="n", metric="parity_nll", limit=limit, at="parity/*"),)
        return go(tmp_path / name, pipeline.model_copy(update={"gates": gates})).report["parity"]

    assert list(looked(1e-9, "strict")["verdict_at"]) == ["3", "4", "5"]
    assert looked(1e-9, "strict")["num_seeds"] == 5
    assert looked(1e3, "lax")["verdict_at"] == {"3": "pass"}


def test_a_raised_tier_trains_the_new_seeds_alone(tmp_path):
    first = Counting()
    go(tmp_path, a_pipeline(cpu_precision="bf16"), first)
    second = Counting()
    go(tmp_path, a_pipeline(cpu_precision="bf16", parity={"tier": 1}), second)
    assert any(text.startswith("AMP bf16") for text in first.texts)
    trained = [text for text in second.texts if text != "comparing gradients"]
    assert trained
    assert all(text.startswith("paired seed") for text in trained)


def test_an_interrupted_seed_goes_on_to_the_same_evidence(tmp_path):
    pipeline = a_pipeline(cpu_precision="bf16", parity={"tier": 1})
    whole = go(tmp_path / "whole", pipeline).artifacts["parity"]
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", pipeline, StopsAt("paired seed 3 of 3: seed 2 in bf16"))
    assert go(tmp_path / "run", pipeline).artifacts["parity"].sha256 == whole.sha256


def test_training_in_fp32_compares_nothing_and_passes(tmp_path):
    pipeline = a_pipeline(parity={"tier": 1})
    outcome = go(tmp_path, pipeline)
    assert outcome.report["parity"]["same"]
    verdicts = decide(PARITY_GATES, seeds_evidence(tmp_path, pipeline, outcome))
    assert {item.verdict for item in verdicts} == {"pass"}


def test_without_a_reference_the_first_pair_is_trained_for_parity(tmp_path):
    outcome = go(tmp_path, a_pipeline(cpu_precision="bf16", reference=False, parity={"tier": 1}))
    assert "reference" not in outcome.artifacts
    assert outcome.report["parity"]["num_seeds"] == 3


def test_the_tier_brings_its_gates_and_takes_them_away(tmp_path):
    def ids(pipeline):
        return [gate.id for gate in pipeline.gates if gate.metric.startswith("parity_")]

    plain = a_pipeline()
    assert ids(plain) == []
    asked = apply_overrides(plain, ["train.parity.tier=1"])
    assert ids(asked) == ["parity-nll", "parity-score", "parity-churn"]
    stricter = apply_overrides(asked, ["gates.parity-nll.limit=0.01"])
    assert [gate.limit for gate in stricter.gates if gate.id == "parity-nll"] == [0.01]
    assert ids(apply_overrides(asked, ["train.parity.tier=0"])) == []
    own = (Gate(id="mine", metric="parity_nll_nats", limit=0.1),)
    assert ids(apply_overrides(plain.model_copy(update={"gates": own}), ["train.parity.tier=1"])) == ["mine"]


def test_the_key_knows_the_tier_and_the_training_s_own_key_does_not(tmp_path):
    assert key(tmp_path, a_pipeline(parity={"tier": 1})) != key(tmp_path, a_pipeline())
    assert key(tmp_path, a_pipeline(pruning={"method": "2:4"})) != key(tmp_path, a_pipeline())


# -- pruning -----------------------------------------------------------------------------------------------------------


def test_the_pruned_model_ships_and_is_measured_against_the_dense_one(tmp_path):
    from safetensors.torch import load_file

    pipeline = a_pipeline(cpu_precision="bf16", pruning={"method": "2:4", "epochs": 2})
    outcome = go(tmp_path, pipeline)
    report = outcome.report["pruning"]
    weights = load_file(outcome.artifacts["model"].path)
    assert set(weights) == {"layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"}
    assert float((weights["layers.0.weight"] == 0).float().mean()) == 0.5
    assert report["sparse_2_4"] is True
    assert report["layers"] == {"layers.0": 0.5, "layers.2": 0.5}
    assert report["pruned"]["gzip_bytes"] < report["dense"]["gzip_bytes"]
    assert report["pruned"]["dense_bytes"] == report["dense"]["dense_bytes"]
    assert 0 <= report["pruned"]["score"] <= 1
    reference = load_file(outcome.artifacts["reference"].path)
    assert all((value != 0).any() for value in reference.values()), "the reference is not pruned"


def test_a_killed_pruning_goes_on_to_the_same_model(tmp_path):
    pipeline = a_pipeline(cpu_precision="bf16", pruning={"method": "unstructured", "epochs": 2})
    whole = go(tmp_path / "whole", pipeline).artifacts["model"]
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", pipeline, StopsAt("pruning (unstructured), epoch 2"))
    assert go(tmp_path / "run", pipeline).artifacts["model"].sha256 == whole.sha256


def test_pruning_after_a_finished_training_trains_the_fine_tuning_alone(tmp_path):
    go(tmp_path, a_pipeline(cpu_precision="bf16"))
    told = Counting()
    go(tmp_path, a_pipeline(cpu_precision="bf16", pruning={"method": "unstructured", "epochs": 1}), told)
    assert all(text.startswith(("pruning", "comparing")) for text in told.texts)
