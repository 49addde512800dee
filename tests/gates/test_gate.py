"""Deciding: what passes, what fails, what cannot tell, and that nothing missing ever passes."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mpdeploy.config import DEFAULT_GATES, Gate
from mpdeploy.errors import ConfigError
from mpdeploy.gates.gate import METRICS, decide, mlperf_99, mlperf_999, not_applied, overall
from mpdeploy.measure.drift import SAMPLE_FIELDS


def _one(gate, evidence):
    verdicts = decide([gate], evidence)
    assert len(verdicts) == 1, verdicts
    return verdicts[0]


DRIFT = Gate(id="drift", metric="rel_l2", limit=1e-2)
FINITE = Gate(id="finite", metric="num_nonfinite", limit=0)
ACCURACY = Gate(id="accuracy", metric="score_drop", limit=0.02)
FLIPS = Gate(id="flips", metric="flips", limit=0.02)
DRIFT_ARRAYS = tuple(f"drift/logits/{item}" for item in SAMPLE_FIELDS)
LATENCY = Gate(id="latency", metric="latency_ratio", limit=1.0)


def test_a_healthy_run_passes_the_default_gates(place, evidence):
    parity = place(
        "parity", precision="bf16", baseline="fp32-reference", facts={"excess_zero_gradients": 0.0}, drop=DRIFT_ARRAYS
    )
    verdicts = decide(DEFAULT_GATES, evidence(parity, place("onnx", precision="fp32", noise=1e-6), place()))
    assert {verdict.verdict for verdict in verdicts} == {"pass"}, [verdict.message for verdict in verdicts]
    assert overall(verdicts) == "pass"


@pytest.mark.parametrize(
    ("gate", "changes", "expected"),
    [
        (DRIFT, {"noise": 1e-3}, "pass"),
        (DRIFT, {"noise": 5e-2}, "fail"),
        (Gate(id="g", metric="max_abs", limit=0.01), {"noise": 1e-3}, "pass"),
        (Gate(id="g", metric="max_abs", limit=0.001), {"noise": 1e-3}, "fail"),
        (Gate(id="g", metric="cosine", limit=0.999), {"noise": 1e-3}, "pass"),
        (Gate(id="g", metric="cosine", limit=0.999), {"noise": 0.2}, "fail"),
        (Gate(id="g", metric="worst_sample_rel_l2", limit=0.01), {"noise": 1e-3}, "pass"),
        (Gate(id="g", metric="worst_sample_rel_l2", limit=0.01), {"noise": 1e-2}, "fail"),
        (ACCURACY, {"num_lost": 3, "num_gained": 3}, "pass"),
        (ACCURACY, {"num_lost": 18, "num_gained": 3}, "inconclusive"),
        (ACCURACY, {"num_lost": 60}, "fail"),
        (FLIPS, {}, "pass"),
        (FLIPS, {"num_lost": 15}, "inconclusive"),
        (FLIPS, {"num_lost": 50}, "fail"),
        (LATENCY, {"slower": 0.9}, "pass"),
        (LATENCY, {"slower": 1.05}, "fail"),
        (LATENCY, {"slower": 1.0}, "pass"),  # within the absolute floor
        (LATENCY, {"slower": 1.01}, "inconclusive"),
        (Gate(id="g", metric="kept_in_half", limit=0), {"facts": {"kept_in_half": []}}, "pass"),
        (Gate(id="g", metric="kept_in_half", limit=0), {"facts": {"kept_in_half": ["softmax"]}}, "fail"),
        (Gate(id="g", metric="half_in_fp32", limit=1), {"facts": {"half_in_fp32": ["a", "b"]}}, "fail"),
        (Gate(id="g", metric="num_kept", limit=3), {"facts": {"num_kept": 3}}, "pass"),
        (Gate(id="g", metric="num_kept", limit=3), {"facts": {"num_kept": 4}}, "fail"),
        (Gate(id="g", metric="size_bytes", limit=100), {"facts": {"size_bytes": 101}}, "fail"),
        (Gate(id="g", metric="size_ratio", limit=0.6), {"facts": {"size_bytes": 5, "baseline_size_bytes": 10}}, "pass"),
        (Gate(id="g", metric="size_ratio", limit=0.4), {"facts": {"size_bytes": 5, "baseline_size_bytes": 10}}, "fail"),
        (Gate(id="g", metric="excess_zero_gradients", limit=0.01), {"facts": {"excess_zero_gradients": 0.46}}, "fail"),
        (mlperf_99(), {"num_lost": 1, "num_gained": 1}, "pass"),
        (mlperf_99(), {"num_lost": 30}, "fail"),
        (mlperf_999(), {"num_lost": 1, "num_gained": 1}, "inconclusive"),
    ],
)
def test_each_metric_tells_good_from_bad(place, evidence, gate, changes, expected):
    verdict = _one(gate, evidence(place(**changes)))
    assert verdict.verdict == expected, verdict.message


def test_every_metric_has_a_row_that_explains_itself():
    for name, row in METRICS.items():
        assert row.description, name


def test_one_nan_in_ten_thousand_samples_is_caught_by_drift_and_accuracy_alike(place, evidence):
    here = place(n=10_000)
    arrays = {name: array.copy() for name, array in here.arrays.items()}
    arrays["drift/logits/num_nonfinite"][4321] = 1
    arrays["scores"][4321] = np.nan
    here = place(n=10_000, arrays=arrays)
    assert _one(FINITE, evidence(here)).message == (
        "num_nonfinite on `engine/openvino`: 1 against a limit of 0: fail "
        "(in 1 of 10,000 samples, first in sample 4421)"
    )
    assert _one(DRIFT, evidence(here)).measured == math.inf
    verdict = _one(ACCURACY, evidence(here))
    assert verdict.verdict == "fail"
    assert "1 of 10,000 scores here are not numbers" in verdict.message


@pytest.mark.parametrize("metric", ["rel_l2", "max_abs", "cosine", "num_nonfinite", "worst_sample_rel_l2"])
@pytest.mark.parametrize("field", ["sq_error", "max_abs", "num_nonfinite"])
def test_a_nan_in_the_drift_itself_fails_whichever_output_comes_first(place, evidence, metric, field):
    for name in ("a_before_logits", "z_after_logits"):
        arrays = dict(place().arrays)
        for item in ("sq_error", "sq_golden", "sq_candidate", "dot", "max_abs", "num_nonfinite"):
            arrays[f"drift/{name}/{item}"] = (
                np.where(np.arange(1000) == 7, np.nan, 1.0) if item == field else np.zeros(1000)
            )
        verdict = _one(
            Gate(id="g", metric=metric, limit=-1.0 if metric == "cosine" else 1e9), evidence(place(arrays=arrays))
        )
        assert verdict.verdict == "fail"
        assert math.isnan(verdict.measured)
        assert name in verdict.message


@pytest.mark.parametrize(
    ("gate", "drop", "says"),
    [
        (DRIFT, ("drift/logits/sq_error",), "lacks a field"),
        (ACCURACY, ("scores",), "scores are missing"),
        (ACCURACY, ("baseline_scores",), "baseline_scores are missing"),
        (FLIPS, ("baseline_predictions",), "not the same number"),
        (LATENCY, ("latency_a_ms",), "latency_a_ms is missing"),
    ],
)
def test_half_a_measurement_fails(place, evidence, gate, drop, says):
    verdict = _one(gate, evidence(place(drop=drop)))
    assert verdict.verdict == "fail"
    assert says in verdict.message
    assert math.isnan(verdict.measured)


def test_a_measurement_of_no_samples_fails(place, evidence):
    empty = place(arrays={name: array[:0] for name, array in place().arrays.items()})
    for gate in (DRIFT, FINITE, ACCURACY, FLIPS, LATENCY):
        assert decide([gate], evidence(empty))[0].verdict == "fail", gate


@pytest.mark.parametrize("value", [float("nan"), None, "lots", True])
def test_a_fact_that_is_no_number_fails(place, evidence, value):
    verdict = _one(Gate(id="g", metric="num_kept", limit=1e9), evidence(place(facts={"num_kept": value})))
    assert verdict.verdict == "fail"


def test_a_place_without_the_metric_has_no_verdict_while_another_has_it(place, evidence):
    parity = place("parity", drop=DRIFT_ARRAYS)
    assert [verdict.at for verdict in decide([DRIFT], evidence(parity, place()))] == ["engine/openvino"]


@pytest.mark.parametrize(
    ("gate", "drop"),
    [
        (ACCURACY, ("scores", "baseline_scores")),
        (FLIPS, ("predictions", "baseline_predictions")),
        (DRIFT, DRIFT_ARRAYS),
        (FINITE, DRIFT_ARRAYS),
    ],
)
def test_the_only_engine_cannot_pass_by_losing_what_the_onnx_model_has(place, evidence, gate, drop):
    """There is no other engine beside it: the ONNX model was measured on the same samples, and has the metric."""
    verdicts = decide([gate], evidence(place("onnx"), place("engine/openvino", drop=drop)))
    assert {verdict.at: verdict.verdict for verdict in verdicts} == {"onnx": "pass", "engine/openvino": "fail"}
    assert "was not measured there, while onnx has it" in verdicts[1].message


def test_an_engine_that_lost_its_latency_or_a_fact_beside_another_engine_fails(place, evidence):
    silent = place("engine/openvino", drop=("latency_a_ms", "latency_b_ms"), facts={"size_bytes": 1})
    run = evidence(place("onnx", drop=("latency_a_ms", "latency_b_ms"), facts={}), place("engine/tensorrt"), silent)
    audit = Gate(id="audit", metric="kept_in_half", limit=0)
    for gate in (LATENCY, audit):
        assert {each.at: each.verdict for each in decide([gate], run)} == {
            "engine/tensorrt": "pass",
            "engine/openvino": "fail",
        }


def test_a_gate_that_finds_its_metric_nowhere_fails(place, evidence):
    verdict = _one(DRIFT, evidence(place(drop=DRIFT_ARRAYS)))
    assert (verdict.verdict, verdict.measured) == ("fail", None)
    assert "was measured at none of engine/openvino" in verdict.message


def test_a_gate_whose_place_is_misspelt_fails_and_names_the_places(place, evidence):
    verdict = _one(Gate(id="g", metric="rel_l2", limit=1, at="engines/*"), evidence(place()))
    assert verdict.verdict == "fail"
    assert "the places of this run are engine/openvino" in verdict.message


def test_no_evidence_at_all_fails(evidence):
    assert _one(DRIFT, evidence()).verdict == "fail"


def test_a_gate_for_a_precision_without_a_model_is_listed_and_forbids_nothing(place, evidence):
    gate = Gate(id="bf16", metric="rel_l2", limit=0.05, precision="bf16")
    assert decide([gate], evidence(place())) == []
    assert not_applied([gate], evidence(place())) == [
        {"id": "bf16", "reason": "no place of this run has a model in bf16"}
    ]
    assert decide([gate.model_copy(update={"at": "nowhere"})], evidence(place()))[0].verdict == "fail"


def test_a_bf16_engine_that_lost_its_drift_fails_although_other_places_have_theirs(place, evidence):
    gate = Gate(id="bf16", metric="rel_l2", limit=0.05, precision="bf16")
    lost = place(precision="bf16", drop=DRIFT_ARRAYS)
    assert _one(gate, evidence(place("onnx", precision="fp32"), lost)).verdict == "fail"


def test_a_place_that_holds_no_number_fails_by_itself(place, evidence):
    verdicts = decide([DRIFT], evidence(place(), place("engine/empty", facts={}, arrays={})))
    assert [(verdict.at, verdict.verdict) for verdict in verdicts] == [
        ("engine/openvino", "pass"),
        ("engine/empty", "fail"),
    ]


def test_an_engine_that_could_not_run_is_unvalidated_and_never_passes(place, evidence):
    built = place("engine/tensorrt-rtx", status="unvalidated", arrays={}, facts={"size_bytes": 10, "num_kept": 2})
    gates = [DRIFT, ACCURACY, LATENCY, Gate(id="size", metric="size_bytes", limit=100)]
    found = {verdict.id: verdict.verdict for verdict in decide(gates, evidence(built))}
    assert found == {"drift": "unvalidated", "accuracy": "unvalidated", "latency": "unvalidated", "size": "pass"}
    assert overall(decide([DRIFT], evidence(built))) == "unvalidated"
    assert overall(decide([DRIFT], evidence(place(), built))) == "pass"
    assert overall(decide([DRIFT], evidence(place(noise=1.0), built))) == "fail"


def test_the_runs_verdict_is_the_worst_that_counts(place, evidence):
    passing, undecided, failing = (decide([ACCURACY], evidence(place(num_lost=lost)))[0] for lost in (0, 15, 200))
    assert overall([passing, undecided]) == "inconclusive"
    assert overall([failing, undecided, passing]) == "fail"
    advisory = decide([ACCURACY.model_copy(update={"advisory": True})], evidence(place(num_lost=200)))[0]
    assert advisory.verdict == "fail"
    assert overall([advisory, passing]) == "pass"
    assert overall([]) == overall([advisory]) == "inconclusive"


def test_a_glob_and_a_precision_choose_the_places(place, evidence):
    run = evidence(place("onnx", precision="fp32"), place("emulated/fp16"), place("engine/openvino"))
    assert [verdict.at for verdict in decide([DRIFT.model_copy(update={"at": "e*/*"})], run)] == [
        "emulated/fp16",
        "engine/openvino",
    ]
    assert [verdict.at for verdict in decide([DRIFT.model_copy(update={"precision": "fp32"})], run)] == ["onnx"]


def test_an_unknown_metric_is_answered_with_the_closest(evidence):
    with pytest.raises(ConfigError, match="closest names: rel_l2"):
        decide([Gate(id="g", metric="rel_l1", limit=1)], evidence())


def test_microseconds_of_noise_do_not_fail_a_fast_model(place, evidence):
    """30 % slower, of ten microseconds: nobody waits for three microseconds."""
    arrays = dict(place(slower=1.3).arrays)
    fast = {name: arrays[name] * 0.005 if name.startswith("latency") else arrays[name] for name in arrays}
    assert _one(LATENCY, evidence(place(arrays=fast))).verdict == "pass"
    assert _one(LATENCY, evidence(place(slower=1.3))).verdict == "fail"


def test_latencies_that_include_different_things_say_so(place, evidence):
    facts = {"latency_block_size": 10, "latency_includes_a": "the run", "latency_includes_b": "the run and copies"}
    assert "they include different things" in _one(LATENCY, evidence(place(facts=facts))).message


def test_a_broken_latency_fails(place, evidence):
    arrays = dict(place().arrays)
    arrays["latency_b_ms"] = np.where(np.arange(300) == 5, np.nan, arrays["latency_b_ms"])
    assert _one(LATENCY, evidence(place(arrays=arrays))).verdict == "fail"


def test_the_message_states_both_numbers_as_the_style_guide_asks(place, evidence):
    verdict = _one(
        Gate(id="accuracy", metric="score_drop", limit=0.005), evidence(place(n=1000, num_lost=8, num_gained=2))
    )
    assert verdict.message.startswith(
        "top1 on `engine/openvino`: -0.6 pt [-1.2, -0.1] against a margin of 0.5 pt: inconclusive"
    )
    assert "(8 worse and 2 better of 1,000, tango)" in verdict.message
    assert verdict.measured == pytest.approx(0.006)
    assert verdict.interval[0] < 0.006 < verdict.interval[1]


def test_an_inconclusive_verdict_says_how_many_samples_would_decide(place, evidence):
    verdict = _one(ACCURACY, evidence(place(n=360, num_lost=4)))
    assert verdict.verdict == "inconclusive"
    assert verdict.samples_to_decide > 360
    assert "samples would decide" in verdict.message


def test_a_prediction_lost_to_nan_counts_as_a_flip_even_where_the_baseline_lost_it_too(place, evidence):
    arrays = dict(place().arrays)
    arrays["predictions"] = arrays["baseline_predictions"] = np.full(1000, -1)
    assert _one(FLIPS, evidence(place(arrays=arrays))).measured == 1.0


def test_clusters_in_the_evidence_are_respected(place, evidence):
    arrays = {**place(num_lost=10).arrays, "clusters": np.arange(1000) // 100}
    verdict = _one(ACCURACY, evidence(place(arrays=arrays)))
    assert "bca-clusters" in verdict.message
    assert verdict.verdict == "inconclusive"
    assert _one(ACCURACY, evidence(place(num_lost=10))).verdict == "pass"


def test_zero_flips_at_five_samples_never_pass_a_margin_of_one_point(place, evidence):
    for metric in ("score_drop", "relative_score_drop", "flips"):
        verdict = _one(Gate(id="g", metric=metric, limit=0.01), evidence(place(n=5)))
        assert verdict.verdict == "inconclusive"
        assert verdict.samples_to_decide == 299


@pytest.mark.slow
def test_seeded_runs_at_exactly_the_margin_pass_the_gate_in_at_most_five_percent(place, evidence):
    """The whole gate, 400 times; tests/measure simulates the statistic alone 2,000 times."""
    rng = np.random.default_rng(0)
    passed = 0
    template = place(n=800)
    for _ in range(400):
        kind = rng.choice(3, size=800, p=[0.03, 0.01, 0.96])
        arrays = {"scores": (kind != 0) * 1.0, "baseline_scores": (kind != 1) * 1.0}
        here = replace(template, arrays=arrays)
        passed += _one(ACCURACY, evidence(here)).verdict == "pass"
    assert passed / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert passed >= 2
