"""Baselines: written by promote alone, compared pair by pair, refused where they are of something else."""

import json

import numpy as np
import pytest

from mpdeploy.config import Gate
from mpdeploy.errors import GateFailedError, NotComparableError, UsageError
from mpdeploy.files import write_json
from mpdeploy.gates.baseline import compare, promote
from mpdeploy.gates.evidence import Evidence
from mpdeploy.run_dir import RunDir


@pytest.fixture
def promoted(tmp_path, place, evidence):
    """A baseline file of a healthy run; its path."""
    return _promote(tmp_path, evidence(place("onnx"), place()))


def _promote(tmp_path, measured, verdict="pass", name="run"):
    run = RunDir.create(tmp_path / name)
    run.set_header(pipeline="digits")
    measured.save(run.path / "evidence")
    write_json(run.path / "gate.json", {"verdict": verdict})
    promote(run, tmp_path / "baseline.json", "first release")
    return tmp_path / "baseline.json"


def _verdicts(verdicts):
    return {verdict.id: verdict.verdict for verdict in verdicts}


def test_a_run_like_its_baseline_passes(promoted, place, evidence):
    assert _verdicts(compare(evidence(place(seed=0)), promoted)) == {
        "baseline-accuracy": "pass",
        "baseline-latency": "pass",
        "baseline-size": "pass",
    }


def test_a_regression_against_the_baseline_fails_although_it_may_pass_against_fp32(promoted, place, evidence):
    worse = evidence(place(num_lost=60, slower=1.2, facts={"size_bytes": 2000, "latency_block_size": 10}))
    verdicts = compare(worse, promoted)
    assert set(_verdicts(verdicts).values()) == {"fail"}
    latency = next(verdict for verdict in verdicts if verdict.metric == "latency_ratio")
    assert latency.advisory  # it was not measured in turns with its baseline
    assert latency.measured == pytest.approx(1.5, abs=0.02)


def test_scores_are_compared_sample_by_sample(tmp_path, place, evidence):
    """Both runs lose 2 %, but of different samples: only pairs can tell that 40 changed."""
    path = _promote(tmp_path, evidence(place(num_lost=20)))
    arrays = dict(place().arrays)
    arrays["scores"] = np.r_[np.ones(980), np.zeros(20)]
    verdict = compare(evidence(place(arrays=arrays)), path, [Gate(id="accuracy", metric="score_drop", limit=0.02)])[0]
    assert verdict.id == "baseline-accuracy"
    assert verdict.measured == 0.0
    assert "(20 worse and 20 better of 1,000, tango)" in verdict.message


def test_scores_that_are_not_binary_survive_the_file(tmp_path, place, evidence):
    scores = np.random.default_rng(0).random(1000)
    path = _promote(tmp_path, evidence(place(arrays={**place().arrays, "scores": scores})))
    verdict = compare(evidence(place(arrays={**place().arrays, "scores": scores - 0.01})), path)[0]
    assert verdict.measured == pytest.approx(0.01, abs=1e-12)


def test_fifty_thousand_samples_make_a_small_file(tmp_path, place, evidence):
    path = _promote(tmp_path, evidence(place(n=50_000, num_lost=100)))
    assert path.stat().st_size < 100_000


def test_other_hardware_is_refused_by_name(promoted, place, evidence):
    here = evidence(place())
    other = Evidence(here.places, here.digests, {**here.environment, "gpus": [{"name": "NVIDIA L4"}]})
    with pytest.raises(NotComparableError, match=r"no baseline of 'NVIDIA L4', only of Test CPU, 2 cores"):
        compare(other, promoted)


def test_another_harness_is_refused(promoted, place, evidence):
    held = json.loads(promoted.read_text())
    write_json(promoted, {**held, "harness": 0})
    with pytest.raises(NotComparableError, match="measured by harness 0"):
        compare(evidence(place()), promoted)


def test_other_samples_or_labels_are_refused(promoted, place, evidence):
    here = evidence(place())
    with pytest.raises(NotComparableError, match="other samples or labels"):
        compare(Evidence(here.places, {"dataset": "e" * 64}, here.environment), promoted)
    moved = place(arrays={**place().arrays, "ids": np.arange(1000) + 101})
    with pytest.raises(NotComparableError, match="other samples or labels"):
        compare(evidence(moved), promoted)


def test_another_metric_is_refused(promoted, place, evidence):
    with pytest.raises(NotComparableError, match="scored by 'top1', this run by 'top5'"):
        compare(evidence(place(notes={"metric": "top5"})), promoted)


def test_no_file_no_entry_and_a_broken_file_are_refused_each_in_its_own_words(promoted, place, evidence, tmp_path):
    with pytest.raises(NotComparableError, match="There is no baseline file"):
        compare(evidence(place()), tmp_path / "none.json")
    with pytest.raises(NotComparableError, match="this run measured none of them"):
        compare(evidence(place("engine/tensorrt")), promoted)
    promoted.write_text(promoted.read_text()[:200])
    with pytest.raises(NotComparableError, match="cannot be read"):
        compare(evidence(place()), promoted)
    assert NotComparableError.exit_code == 12


def test_a_run_that_lost_its_scores_fails_and_does_not_drop_the_gate(promoted, place, evidence):
    bare = evidence(
        place(drop=("scores", "baseline_scores", "latency_a_ms", "latency_b_ms"), facts={"kept_in_half": []})
    )
    assert set(_verdicts(compare(bare, promoted)).values()) == {"fail"}


def test_a_baseline_without_labels_still_compares_latency_and_size(tmp_path, place, evidence):
    bare = evidence(place(drop=("scores", "baseline_scores")))
    path = _promote(tmp_path, bare)
    assert _verdicts(compare(bare, path)) == {"baseline-latency": "pass", "baseline-size": "pass"}


def test_promoting_keeps_what_the_file_holds_of_other_hardware(promoted, tmp_path, place, evidence):
    here = evidence(place())
    gpu = Evidence(here.places, here.digests, {**here.environment, "gpus": [{"name": "NVIDIA L4"}]})
    _promote(tmp_path, gpu, name="other")
    held = json.loads(promoted.read_text())
    assert sorted(held["entries"]) == ["NVIDIA L4", "Test CPU, 2 cores"]
    assert held["entries"]["NVIDIA L4"]["engine/openvino"]["reason"] == "first release"
    assert "onnx" not in held["entries"]["NVIDIA L4"]  # engines only


def test_a_failed_run_or_one_without_a_reason_is_not_promoted(tmp_path, place, evidence):
    with pytest.raises(GateFailedError, match="verdict 'fail'"):
        _promote(tmp_path, evidence(place()), verdict="fail")
    with pytest.raises(UsageError, match="needs a reason"):
        promote(RunDir(tmp_path / "run"), tmp_path / "baseline.json", "  ")
    with pytest.raises(NotComparableError, match="measured no engine"):
        _promote(tmp_path, evidence(place("onnx")), name="third")
    assert not (tmp_path / "baseline.json").exists()
