"""Noise floors: what moves when nothing was changed is recorded, and a limit can be a multiple of it."""

from types import SimpleNamespace

import numpy as np
import pytest

from mpdeploy.artifact import Dataset
from mpdeploy.config import Gate, ValidationConfig
from mpdeploy.errors import ConfigError
from mpdeploy.gates.gate import decide, limit_at
from mpdeploy.stages.noise import tf32_noise
from mpdeploy.stages.validate import _with_floors

FACTS = {"noise_rerun_rel_l2": 0.0, "noise_rebuild_rel_l2": 2e-7, "noise_tf32_rel_l2": 4e-4, "noise_seeds_score": 0.006}


def _gate(metric="rel_l2", limit=0.0, times=3.0):
    return Gate(id="derived", metric=metric, limit=limit, times_noise=times)


def test_a_limit_is_so_many_times_the_largest_floor_of_the_place(place, evidence):
    """The place drifts by 1e-3. Three times TF32's 4e-4 is 1.2e-3, and twice is less than it drifts."""
    here = evidence(place(facts=FACTS))
    three, two = (decide([_gate(times=times)], here)[0] for times in (3.0, 2.0))
    assert (three.verdict, two.verdict) == ("pass", "fail")
    assert three.limit == pytest.approx(1.2e-3)
    assert "the limit is 3 times the noise floor 4.00e-04 (noise_tf32_rel_l2)" in three.message


def test_a_declared_limit_that_is_larger_stays(place, evidence):
    verdict = decide([_gate(limit=0.01)], evidence(place(facts=FACTS)))[0]
    assert (verdict.verdict, verdict.limit) == ("pass", 0.01)
    assert "less than the declared limit" in verdict.message


@pytest.mark.parametrize("facts", [{}, {"noise_rerun_rel_l2": 0.0}, {"noise_rerun_rel_l2": "nan"}])
def test_noise_that_was_not_measured_never_widens_a_limit(place, evidence, facts):
    verdict = decide([_gate()], evidence(place(facts={"size_bytes": 1, **facts})))[0]
    assert (verdict.verdict, verdict.limit) == ("fail", 0.0)
    assert "no noise floor above zero was measured here" in verdict.message


def test_the_margin_of_a_score_is_a_multiple_of_what_seeds_alone_move(place, evidence):
    """Three standard deviations between seeds are 1.8 points: 8 lost of 1,000 are within, 40 are not."""
    few, many = (decide([_gate("score_drop")], evidence(place(num_lost=lost, facts=FACTS)))[0] for lost in (8, 40))
    assert (few.verdict, many.verdict) == ("pass", "fail")
    assert "against a margin of 1.8 pt" in few.message


def test_a_metric_without_a_floor_is_refused(place, evidence):
    with pytest.raises(ConfigError, match="no noise floor of 'max_abs' is measured"):
        decide([_gate("max_abs")], evidence(place()))
    assert limit_at(Gate(id="g", metric="max_abs", limit=1.0), place()) == (1.0, "")


def test_floors_of_the_whole_run_stand_at_every_place_that_was_compared_with_the_golden_answers(place):
    tf32, seeds = {"rel_l2": 1e-4}, {"spread": 0.01}
    found = _with_floors(place(facts={"size_bytes": 1}), tf32, seeds)
    assert found.facts == {"size_bytes": 1, "noise_tf32_rel_l2": 1e-4, "noise_seeds_score": 0.01}
    for other in (place("parity"), place("x", status="unvalidated"), place("x", baseline="fp32-reference")):
        assert _with_floors(other, tf32, seeds) is other
    assert _with_floors(place(facts={}), {"missing": "no GPU"}, {"spread": None}).facts == {}


def test_without_a_gpu_the_floor_of_tf32_is_missing_with_its_reason():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    data = Dataset({"x": np.zeros((4, 2), np.float32)}, np.arange(4))
    context = SimpleNamespace(pipeline=None, run=None)
    assert "torch sees none here" in tf32_noise(context, data, ValidationConfig())["missing"]
    assert tf32_noise(context, data, ValidationConfig(noise_floors=("rerun",))) == {}


@pytest.mark.gpu
def test_tf32_differs_from_fp32_by_its_ten_bits(run_copy):
    """On a GPU: more than FP32's rounding, and no more than a few of TF32's (2^-11 each)."""
    import torch

    import mpdeploy
    from mpdeploy.artifact import Golden
    from mpdeploy.pipeline import Context, Silent
    from mpdeploy.run_dir import RunDir

    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    pipeline = mpdeploy.load_pipeline(run_copy.parent / "tiny.py")
    with RunDir.open(run_copy) as directory:
        context = Context(directory, pipeline, Silent())
        samples = Golden.load(directory.artifact("20-export", "golden").path).dataset
        found = tf32_noise(context, samples, pipeline.validation)
    assert 1e-6 < found["rel_l2"] < 1e-2
