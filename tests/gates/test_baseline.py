"""Baselines: written by promote alone, compared pair by pair, refused where they are of something else."""

import json

import numpy as np
import pytest

from mpdeploy.config import Gate
from mpdeploy.errors import GateFailedError, NotComparableError, UsageError
from mpdeploy.files import write_json
from mpdeploy.gates.baseline import compare, promote
from mpdeploy.gates.evidence import Evidence
from mpdeploy.gates.verdict import overall
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


# -- slices, corpus metrics, and the promoted run's own gates ----------------------------------------------------------


def _with(place, **arrays):
    return type(place)(**{**place.__dict__, "arrays": {**place.arrays, **arrays}})


def _sliced(place, *, lost=()):
    """2,000 samples, 60 of them at night; `lost` are positions that this run has wrong."""
    night = np.arange(2000) < 60
    scores = np.where(np.isin(np.arange(2000), lost), 0.0, 1.0)
    return _with(place(n=2000), **{"slice/night": night, "slice/day": ~night, "scores": scores})


def test_a_drop_in_one_slice_that_the_whole_set_hides_is_caught(tmp_path, place, evidence):
    """12 of 2,000 samples are lost: 0.6 points, within the margin of 2. All of them are among the 60 at night: 20 points."""
    path = _promote(tmp_path, evidence(_sliced(place)))
    verdicts = compare(evidence(_sliced(place, lost=range(12))), path)
    found = {(each.id, each.slice): each.verdict for each in verdicts}
    assert found[("baseline-accuracy", "")] == "pass"
    assert found[("baseline-slice", "day")] == "pass"
    assert found[("baseline-slice", "night")] == "fail"
    (night,) = [each for each in verdicts if each.slice == "night"]
    assert night.measured == pytest.approx(0.2)
    assert not night.advisory
    assert "slice `night`" in night.message


def test_a_slice_too_small_to_tell_does_not_leave_the_run_undecided(tmp_path, place, evidence):
    path = _promote(tmp_path, evidence(_sliced(place)))
    verdicts = compare(evidence(_sliced(place, lost=[3])), path)
    (night,) = [each for each in verdicts if each.slice == "night"]
    assert (night.verdict, night.advisory) == ("inconclusive", True)
    assert overall(verdicts) == "pass"


def test_a_slice_that_is_gone_is_never_a_pass(tmp_path, place, evidence):
    path = _promote(tmp_path, evidence(_sliced(place)))
    verdicts = compare(evidence(place(n=2000)), path)
    assert {each.verdict for each in verdicts if each.id == "baseline-slice"} == {"fail"}


def _corpus(place, drop=0.0, name="macro_f1", num_resamples=400):
    rng = np.random.default_rng(3)
    base = 0.9 + 0.01 * rng.normal(size=num_resamples)
    draws = base - drop - 0.002 * np.random.default_rng(int(1000 * drop)).normal(size=num_resamples)
    found = _with(
        place(), corpus_draws=draws, corpus_left_out=0.9 - drop + 1e-4 * rng.normal(size=100),
        baseline_corpus_draws=base, baseline_corpus_left_out=np.full(100, 0.9),
    )  # fmt: skip
    facts = {
        "corpus_value": 0.9 - drop, "baseline_corpus_value": 0.9, "corpus_num_units": 1000, "corpus_num_samples": 1000,
        "corpus_worth_largest": 0.002, "corpus_worth_typical": 0.001, "corpus_is_smooth": False,
    }  # fmt: skip
    return type(found)(
        **{**found.__dict__, "facts": {**found.facts, **facts}, "notes": {**found.notes, "corpus_metric": name}}
    )


@pytest.mark.parametrize(("drop", "verdict"), [(0.002, "pass"), (0.018, "inconclusive"), (0.05, "fail")])
def test_a_corpus_metric_is_compared_with_the_baseline_s_resamples(tmp_path, place, evidence, drop, verdict):
    path = _promote(tmp_path, evidence(_corpus(place, 0.01)))
    (found,) = [each for each in compare(evidence(_corpus(place, 0.01 + drop)), path) if each.metric == "corpus_drop"]
    assert (found.id, found.verdict) == ("baseline-corpus", verdict), found.message
    assert found.measured == pytest.approx(drop)


def test_a_corpus_metric_that_was_lost_fails_and_another_one_is_refused(tmp_path, place, evidence):
    path = _promote(tmp_path, evidence(_corpus(place)))
    assert _verdicts(compare(evidence(place()), path))["baseline-corpus"] == "fail"
    with pytest.raises(NotComparableError, match=r"is 'macro_f1' of 1,000 .* with 400 resamples; this run's is 'bleu'"):
        compare(evidence(_corpus(place, name="bleu")), path)
    with pytest.raises(NotComparableError, match="of 1,000 with 300"):
        compare(evidence(_corpus(place, num_resamples=300)), path)


def test_a_corpus_metric_that_the_baseline_lacks_is_not_asked_for(promoted, place, evidence):
    assert "baseline-corpus" not in _verdicts(compare(evidence(_corpus(place)), promoted))


def test_a_later_run_cannot_loosen_the_gates_that_its_baseline_was_promoted_with(tmp_path, place, evidence):
    """The promoted run allowed half a point, and two points at night; these limits stand in the file."""
    gates = [
        Gate(id="accuracy", metric="score_drop", limit=0.005),
        Gate(id="night", metric="score_drop", limit=0.02, slice="night"),
        Gate(id="elsewhere", metric="score_drop", limit=0.0, at="emulated/*"),
        Gate(id="drift", metric="rel_l2", limit=1e-2),
    ]
    run = RunDir.create(tmp_path / "promoted")
    run.set_header(pipeline="digits", gates=[gate.to_json() for gate in gates])
    evidence(_sliced(place)).save(run.path / "evidence")
    write_json(run.path / "gate.json", {"verdict": "pass"})
    promote(run, tmp_path / "baseline.json", "first release")
    verdicts = compare(evidence(_sliced(place, lost=range(100, 120))), tmp_path / "baseline.json")
    found = {each.id: (each.verdict, each.limit) for each in verdicts if each.metric == "score_drop"}
    assert found == {
        "baseline-accuracy": ("fail", 0.005),
        "baseline-night": ("inconclusive", 0.02),
        "baseline-slice": ("pass", 0.05),  # the day, which no gate names
    }
