"""Gates on named slices, on clustered samples, and on corpus metrics."""

import math

import numpy as np
import pytest

from mpdeploy.config import Gate
from mpdeploy.gates.evidence import Evidence
from mpdeploy.gates.gate import decide, gate_json
from mpdeploy.gates.metrics import METRICS

NIGHT = Gate(id="night", metric="score_drop", limit=0.05, slice="night")


@pytest.fixture
def sliced(place):
    """1,000 samples of which 40 are lost, all of them among the 200 of the slice `night`."""

    def make(at="engine/openvino", **options):
        found = place(at, num_lost=40, **options)
        arrays = dict(found.arrays)
        arrays["slice/night"] = np.arange(1000) < 200
        arrays["slice/day"] = np.arange(1000) >= 200
        return type(found)(**{**found.__dict__, "arrays": arrays})

    return make


def test_a_slice_that_lost_fails_where_the_average_passes(sliced, evidence):
    whole = Gate(id="whole", metric="score_drop", limit=0.06)
    by_id = {each.key: each for each in decide([whole, NIGHT], evidence(sliced()))}
    assert by_id["whole on engine/openvino"].verdict == "pass"
    night = by_id["night on engine/openvino [night]"]
    assert (night.verdict, night.num_samples, night.slice) == ("fail", 200, "night")
    assert night.measured == pytest.approx(0.2)
    assert "`engine/openvino`, slice `night`" in night.message


def test_a_glob_applies_to_every_slice(sliced, evidence):
    gate = Gate(id="each", metric="score_drop", limit=0.05, slice="*")
    assert {each.slice: each.verdict for each in decide([gate], evidence(sliced()))} == {"day": "pass", "night": "fail"}


def test_drift_is_measured_on_the_slice_alone(sliced, evidence):
    found = sliced()
    arrays = dict(found.arrays)
    arrays["drift/logits/num_nonfinite"] = (np.arange(1000) == 3) * 1.0
    broken = type(found)(**{**found.__dict__, "arrays": arrays})
    gate = Gate(id="drift", metric="rel_l2", limit=0.01, slice="*")
    verdicts = {each.slice: each for each in decide([gate], evidence(broken))}
    assert verdicts["day"].verdict == "pass"
    assert verdicts["night"].measured == math.inf


def test_a_slice_that_does_not_exist_is_never_a_pass(sliced, evidence):
    (verdict,) = decide([NIGHT.model_copy(update={"slice": "dusk"})], evidence(sliced()))
    assert verdict.verdict == "fail"
    assert "no slice 'dusk'" in verdict.message
    assert "day, night" in verdict.message


def test_an_engine_that_lost_the_slice_which_the_onnx_model_has_fails(sliced, place, evidence):
    verdicts = decide([NIGHT], evidence(sliced("onnx"), place("engine/openvino")))
    assert [(each.at, each.verdict) for each in verdicts] == [("onnx", "fail"), ("engine/openvino", "fail")]
    assert "slice `night`: was not measured there, while onnx has it" in verdicts[1].message


def test_an_empty_slice_is_never_a_pass(sliced, evidence):
    found = sliced()
    empty = type(found)(**{**found.__dict__, "arrays": {**found.arrays, "slice/night": np.zeros(1000, bool)}})
    assert decide([NIGHT], evidence(empty))[0].verdict == "fail"


def test_a_slice_of_an_engine_that_cannot_run_here_is_unvalidated(place, evidence):
    waiting = place("engine/tensorrt-rtx", status="unvalidated", arrays={}, facts={"size_bytes": 9})
    assert [each.verdict for each in decide([NIGHT], evidence(waiting))] == ["unvalidated"]


def test_gate_json_holds_the_numbers_of_each_slice_and_survives_a_copy(sliced, evidence, tmp_path):
    found = evidence(sliced())
    value = gate_json(decide([NIGHT], found), found, "digits", [NIGHT])
    slices = value["places"]["engine/openvino"]["slices"]
    assert slices["night"]["scores"]["mean"] == 0.8
    assert slices["day"]["scores"]["mean"] == 1.0
    found.save(tmp_path)
    again = Evidence.load(tmp_path)
    assert gate_json(decide([NIGHT], again), again, "digits", [NIGHT]) == value


# -- clusters ----------------------------------------------------------------------------------------------------------


def test_flips_of_clustered_samples_are_less_certain(place, evidence):
    """Twenty flips in one video are one observation, not twenty."""
    found = place(num_lost=20)
    together = type(found)(**{**found.__dict__, "arrays": {**found.arrays, "clusters": np.arange(1000) // 20}})
    gate = Gate(id="flips", metric="flips", limit=0.03)
    alone, clustered = (decide([gate], evidence(each))[0] for each in (found, together))
    assert alone.verdict == "pass"
    assert clustered.verdict == "inconclusive"
    assert clustered.measured == alone.measured


# -- corpus metrics ----------------------------------------------------------------------------------------------------


def _corpus(place, drop, *, spread=0.01, n=1000, **facts):
    rng = np.random.default_rng(3)
    base = 0.9 + 0.02 * rng.normal(size=1000)
    draws = base - drop - spread * rng.normal(size=1000)
    found = place()
    left_out = 0.9 + 0.001 * rng.normal(size=100)
    arrays = {
        **found.arrays, "baseline_corpus_draws": base, "corpus_draws": draws,
        "baseline_corpus_left_out": left_out, "corpus_left_out": left_out - drop,
    }  # fmt: skip
    values = {
        "baseline_corpus_value": 0.9, "corpus_value": 0.9 - drop, "corpus_num_units": n, "corpus_num_samples": n,
        "corpus_worth_largest": 0.002, "corpus_worth_typical": 0.001, "corpus_is_smooth": False,
    }  # fmt: skip
    return type(found)(
        **{**found.__dict__, "arrays": arrays, "facts": {**found.facts, **values, **facts},
           "notes": {**found.notes, "corpus_metric": "macro_f1"}}
    )  # fmt: skip


@pytest.mark.parametrize(("drop", "verdict"), [(0.0, "pass"), (0.045, "inconclusive"), (0.1, "fail")])
def test_a_corpus_metric_is_decided_from_its_resamples(place, evidence, drop, verdict):
    gate = Gate(id="f1", metric="corpus_drop", limit=0.05)
    found = decide([gate], evidence(_corpus(place, drop)))[0]
    assert found.verdict == verdict, found.message
    assert found.message.startswith("macro_f1 on `engine/openvino`: ")
    assert (found.samples_to_decide is not None) is (verdict == "inconclusive")


@pytest.mark.parametrize("facts", [{"corpus_value": math.nan}, {"corpus_value": None}])
def test_a_corpus_metric_that_was_lost_is_never_a_pass(place, evidence, facts):
    gate = Gate(id="f1", metric="corpus_drop", limit=0.05)
    assert decide([gate], evidence(_corpus(place, 0.0, **facts)))[0].verdict == "fail"


def test_a_worth_that_was_not_measured_is_never_a_pass(place, evidence):
    found = _corpus(place, 0.0)
    facts = {name: value for name, value in found.facts.items() if name != "corpus_worth_largest"}
    verdict = decide(
        [Gate(id="f1", metric="corpus_drop", limit=0.05)], evidence(type(found)(**{**found.__dict__, "facts": facts}))
    )[0]
    assert (verdict.verdict, "not whole" in verdict.message) == ("fail", True)


@pytest.mark.parametrize("missing", ["baseline_corpus_draws", "corpus_draws", "corpus_left_out"])
def test_resamples_that_are_missing_on_one_side_are_never_a_pass(place, evidence, missing):
    found = _corpus(place, 0.0)
    arrays = {name: array for name, array in found.arrays.items() if name != missing}
    verdict = decide(
        [Gate(id="f1", metric="corpus_drop", limit=0.05)], evidence(type(found)(**{**found.__dict__, "arrays": arrays}))
    )[0]
    assert verdict.verdict == "fail"
    assert "not whole" in verdict.message


def test_a_place_without_a_corpus_metric_does_not_have_it(place):
    assert METRICS["corpus_drop"].find(place(), 0.05) is None
