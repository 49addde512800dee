"""Slices, clusters and corpus metrics from a pipeline's functions; torchmetrics by name; places that lost a metric."""

import sys
import types

import numpy as np
import pytest

from mpdeploy.artifact import Dataset
from mpdeploy.config import ValidationConfig
from mpdeploy.errors import ConfigError, DataError, StageFailedError, UnavailableError
from mpdeploy.stages.user_metrics import resolved_corpus_metric, sample_groups
from mpdeploy.stages.validate import _check_siblings

DATA = Dataset({"x": np.arange(6.0)[:, None]}, np.arange(6), np.array([0, 0, 1, 1, 2, 2]))


def _groups(**functions):
    return sample_groups(ValidationConfig(**functions), DATA)


def test_booleans_make_one_slice_and_values_one_each():
    found = _groups(slices=lambda data: {"large": data.inputs["x"][:, 0] > 3, "class": data.labels})
    assert set(found) == {"slice/large", "slice/class=0", "slice/class=1", "slice/class=2"}
    assert found["slice/large"].tolist() == [False] * 4 + [True] * 2
    assert found["slice/class=1"].tolist() == [False, False, True, True, False, False]


def test_clusters_are_numbered():
    assert _groups(clusters=lambda data: np.array(list("bbaacc")))["clusters"].tolist() == [1, 1, 0, 0, 2, 2]


@pytest.mark.parametrize(
    ("functions", "says"),
    [
        ({"slices": lambda data: [1, 2]}, "expected a mapping"),
        ({"slices": lambda data: {"a": np.ones(5, bool)}}, "there are 6 samples"),
        ({"slices": lambda data: {"a/b": np.ones(6, bool)}}, "'/'"),
        ({"clusters": lambda data: np.ones((6, 2))}, "there are 6 samples"),
    ],
)
def test_what_has_not_one_row_a_sample_is_refused(functions, says):
    with pytest.raises(DataError, match=says):
        _groups(**functions)


def test_a_slicing_by_too_many_values_is_refused():
    data = Dataset({"x": np.zeros((99, 1))}, np.arange(99))
    with pytest.raises(DataError, match="99 distinct values") as caught:
        sample_groups(ValidationConfig(slices=lambda d: {"id": d.ids}), data)
    assert "np.digitize" in str(caught.value)


# -- torchmetrics ------------------------------------------------------------------------------------------------------


class MulticlassAccuracy:
    higher_is_better = True

    def __init__(self, num_classes):
        self.num_classes = num_classes

    def __call__(self, output, labels):
        return (output.argmax(1) == labels).float().mean()


class HammingDistance:
    higher_is_better = False

    def __init__(self, task, num_classes):
        assert task == "multiclass"

    def __call__(self, output, labels):
        return (output.argmax(1) != labels).float().mean()


class NeedsMore:
    def __init__(self, secret):
        raise AssertionError


@pytest.fixture
def torchmetrics(monkeypatch):
    module, kinds = types.ModuleType("torchmetrics"), types.ModuleType("torchmetrics.classification")
    module.HammingDistance, kinds.MulticlassAccuracy, kinds.NeedsMore = HammingDistance, MulticlassAccuracy, NeedsMore
    kinds.__all__ = ["MulticlassAccuracy"]
    monkeypatch.setitem(sys.modules, "torchmetrics", module)
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", kinds)


def test_a_torchmetrics_class_is_made_for_the_output_and_its_sign_turned(torchmetrics):
    outputs, labels = {"y": np.eye(4, dtype=np.float32)}, np.array([0, 1, 2, 0])
    assert resolved_corpus_metric("torchmetrics:MulticlassAccuracy")(outputs, labels) == 0.75
    assert resolved_corpus_metric("torchmetrics:HammingDistance")(outputs, labels) == -0.25


def test_a_name_that_torchmetrics_lacks_is_refused_with_the_closest(torchmetrics):
    with pytest.raises(ConfigError, match="no metric 'MulticlassAcuracy'") as caught:
        resolved_corpus_metric("torchmetrics:MulticlassAcuracy")
    assert "MulticlassAccuracy" in str(caught.value)


def test_a_class_that_wants_more_is_refused_with_what_to_do(torchmetrics):
    with pytest.raises(ConfigError, match="cannot be made"):
        resolved_corpus_metric("torchmetrics:NeedsMore")({"y": np.eye(4)}, np.arange(4))


def test_without_torchmetrics_the_name_is_unavailable(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(UnavailableError, match="torchmetrics, which is not installed"):
        resolved_corpus_metric("torchmetrics:MulticlassF1Score")


def test_a_name_of_no_known_kind_is_refused():
    with pytest.raises(ConfigError, match="no name that is known"):
        resolved_corpus_metric("f1")


# -- places that lost a metric -----------------------------------------------------------------------------------------


def test_places_with_the_same_metrics_are_written(place):
    _check_siblings([place("onnx"), place("engine/openvino"), place("engine/x", status="unvalidated", arrays={})])


@pytest.mark.parametrize("lost", ["scores", "predictions", "drift/logits/dot"])
def test_a_place_that_lost_a_metric_is_refused(place, lost):
    with pytest.raises(StageFailedError, match=f"`engine/openvino` was measured without {lost}"):
        _check_siblings([place("onnx"), place("engine/openvino", drop=(lost,))])


def test_a_place_that_lost_everything_is_refused(place):
    with pytest.raises(StageFailedError, match="`engine/openvino` was measured without"):
        _check_siblings([place("onnx"), place("engine/openvino", arrays={})])


def test_parity_is_compared_with_something_else_and_need_not_have_drift(place):
    _check_siblings([place("parity", baseline="fp32-reference", arrays={}), place("onnx")])
    _check_siblings([place("parity", arrays={}), place("onnx")])
