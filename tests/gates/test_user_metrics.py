"""Slices, clusters and corpus metrics from a pipeline's functions; torchmetrics by name; places that lost a metric."""

import re
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from mpdeploy.artifact import Dataset
from mpdeploy.config import ValidationConfig
from mpdeploy.errors import ConfigError, DataError, StageFailedError, UnavailableError
from mpdeploy.measure import accuracy
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


RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(200, 4)).astype(np.float32)
CLASSES = np.where(RNG.random(200) < 0.7, LOGITS.argmax(1), RNG.integers(0, 4, 200))
VALUES = RNG.normal(size=(200, 1)).astype(np.float32)
TRUTH = (VALUES[:, 0] + 0.1 * RNG.normal(size=200)).astype(np.float32)


def _sklearn(name):
    return getattr(pytest.importorskip("sklearn.metrics"), name)


def _softmax(logits):
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def _average_precision(logits, labels):
    score = _sklearn("average_precision_score")
    return np.mean([score(labels == each, _softmax(logits)[:, each]) for each in range(4)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MulticlassAccuracy(average='micro')", lambda x, y: (x.argmax(1) == y).mean()),
        ("MulticlassF1Score", lambda x, y: _sklearn("f1_score")(y, x.argmax(1), average="macro")),
        ("F1Score(average='macro')", lambda x, y: _sklearn("f1_score")(y, x.argmax(1), average="macro")),
        ("F1Score(average='weighted')", lambda x, y: _sklearn("f1_score")(y, x.argmax(1), average="weighted")),
        ("MulticlassAveragePrecision", _average_precision),
        ("MulticlassAUROC", lambda x, y: _sklearn("roc_auc_score")(y, _softmax(x), multi_class="ovr")),
        ("MatthewsCorrCoef", lambda x, y: _sklearn("matthews_corrcoef")(y, x.argmax(1))),
        ("HammingDistance(average='micro')", lambda x, y: -(x.argmax(1) != y).mean()),  # lower is better: negated
    ],
)
def test_metrics_of_classes_are_what_scikit_learn_says(text, expected):
    found = resolved_corpus_metric(f"torchmetrics:{text}")({"y": LOGITS}, CLASSES)
    assert found == pytest.approx(expected(LOGITS, CLASSES), abs=1e-6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MeanSquaredError", -np.mean((VALUES[:, 0] - TRUTH) ** 2)),
        ("MeanSquaredError(squared=False)", -np.sqrt(np.mean((VALUES[:, 0] - TRUTH) ** 2))),
        ("R2Score", 1 - np.sum((VALUES[:, 0] - TRUTH) ** 2) / np.sum((TRUTH - TRUTH.mean()) ** 2)),
        ("PearsonCorrCoef", np.corrcoef(VALUES[:, 0], TRUTH)[0, 1]),
    ],
)
def test_metrics_of_numbers_have_their_sign_turned_where_lower_is_better(text, expected):
    """The output is [n, 1] and the labels are [n], as regressors and their data are."""
    found = resolved_corpus_metric(f"torchmetrics:{text}")({"y": VALUES}, TRUTH)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_binary_metric_and_one_of_several_labels_are_made_for_their_outputs():
    shares, truth = RNG.random(50), RNG.integers(0, 2, 50)
    found = resolved_corpus_metric("torchmetrics:Accuracy")({"y": shares}, truth)
    assert found == pytest.approx(np.mean((shares > 0.5) == truth))
    shares, truth = RNG.random((50, 3)), RNG.integers(0, 2, (50, 3))
    found = resolved_corpus_metric("torchmetrics:MultilabelAccuracy")({"y": shares}, truth)
    assert found == pytest.approx(np.mean((shares > 0.5) == truth))


def test_a_metric_is_fresh_at_every_call():
    metric = resolved_corpus_metric("torchmetrics:MulticlassAccuracy(average='micro')")
    outputs = {"y": np.eye(4, dtype=np.float32)}
    assert [metric(outputs, np.arange(4)), metric(outputs, np.array([1, 2, 3, 0])), metric(outputs, np.arange(4))] == [
        1.0, 0.0, 1.0,
    ]  # fmt: skip


def test_a_resample_that_lacks_a_class_is_no_fault():
    """Warnings are errors in these tests: torchmetrics' own about the class would be one."""
    metric = resolved_corpus_metric("torchmetrics:MulticlassAveragePrecision")
    assert 0.0 < metric({"y": LOGITS[:20]}, np.zeros(20, dtype=np.int64)) <= 1.0


def test_corpus_draws_are_taken_of_a_torchmetrics_class():
    from mpdeploy.measure.corpus import corpus_bounds, corpus_draws, corpus_worth

    metric = resolved_corpus_metric("torchmetrics:MulticlassF1Score")
    worse = LOGITS.copy()
    worse[:40] = -worse[:40]
    sides = [corpus_draws(metric, {"y": each}, CLASSES, num_resamples=200) for each in (LOGITS, worse)]
    found = corpus_bounds(*sides, corpus_worth(metric, {"y": LOGITS}, CLASSES))
    assert 0.05 < found.bounds[0] < found.drop < found.bounds[1] < 0.3
    assert corpus_worth(resolved_corpus_metric("torchmetrics:R2Score"), {"y": VALUES}, TRUTH).is_smooth


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("MulticlassAcuracy", "no metric 'MulticlassAcuracy'.*closest names: MulticlassAccuracy"),
        ("MulticlassF1Score(beta=2)", "cannot be made with .*beta=2.*its arguments: "),
        ("MulticlassF1Score(average='none')", "more than one number"),
        ("MeanAveragePrecision", "lists of boxes.*a function of"),
        ("MeanMetricc", "no metric"),
    ],
)
def test_what_torchmetrics_cannot_do_is_refused_with_what_to_do(text, says):
    with pytest.raises(ConfigError) as caught:
        resolved_corpus_metric(f"torchmetrics:{text}")({"y": LOGITS}, CLASSES)
    assert re.search(says, str(caught.value).replace("\n", " ")), str(caught.value)


def test_labels_that_do_not_fit_are_refused_with_both_shapes():
    metric = resolved_corpus_metric("torchmetrics:MulticlassF1Score")
    with pytest.raises(DataError, match=r"the output float32\[200, 4\] and the labels int64\[7\]"):
        metric({"y": LOGITS}, np.zeros(7, dtype=np.int64))
    with pytest.raises(DataError, match="needs labels"):
        metric({"y": LOGITS}, None)


def test_without_torchmetrics_the_name_is_unavailable(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    with pytest.raises(UnavailableError, match="torchmetrics, which is not installed"):
        resolved_corpus_metric("torchmetrics:MulticlassF1Score")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("f1", "write it as torchmetrics:NAME"),
        ("torchmetrics:F1Score('macro')", "each argument with its name"),
        ("torchmetrics:F1Score(average=macro)", "'average' is no plain value"),
        ("torchmetrics:F1Score(", "does not parse"),
        ("torchmetrics:__import__('os').system('x')", "each argument with its name"),
    ],
)
def test_a_text_that_is_no_metric_is_refused_where_it_is_declared(text, says):
    with pytest.raises(ValidationError, match=says):
        ValidationConfig(corpus_metric=text)


def test_a_corpus_metric_named_as_the_metric_is_told_where_it_belongs():
    with pytest.raises(ConfigError, match="one number over all samples") as caught:
        accuracy.resolve("torchmetrics:F1Score")
    assert "corpus_metric" in str(caught.value)


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
