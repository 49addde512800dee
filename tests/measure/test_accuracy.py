"""Task metrics: one score a sample."""

import math

import numpy as np
import pytest

from mpdeploy.errors import ConfigError, DataError, UserCodeError
from mpdeploy.measure.accuracy import METRICS, predictions, score

LOGITS = np.array([[0.1, 2.0, 0.3], [5.0, 1.0, 1.0], [0.0, 0.0, 1.0]], dtype=np.float32)


def test_top1_is_one_where_the_largest_score_is_the_label():
    assert score("top1", {"logits": LOGITS}, np.array([1, 1, 2])).tolist() == [1.0, 0.0, 1.0]
    assert predictions("top1", {"logits": LOGITS}).tolist() == [1, 0, 2]


def test_a_nan_answer_has_a_nan_score_and_no_class():
    logits = LOGITS.copy()
    logits[1, 2] = np.nan
    scores = score("top1", {"logits": logits}, np.array([1, 0, 2]))
    assert scores[0] == 1.0
    assert math.isnan(scores[1])
    assert predictions("top1", {"logits": logits}).tolist() == [1, -1, 2]


def test_top5_counts_the_five_largest_and_a_constant_answer_is_not_right_everywhere():
    logits = np.tile(np.arange(8.0), (8, 1))
    assert score("top5", {"y": logits}, np.arange(8)).tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert score("top5", {"y": np.zeros((8, 8))}, np.arange(8)).sum() == 5
    with pytest.raises(DataError, match="top5 of 3 classes"):
        score("top5", {"y": LOGITS}, np.array([0, 1, 2]))


def test_token_accuracy_counts_labelled_tokens_only():
    output = np.zeros((2, 3, 4))
    output[:, :, 1] = 1.0
    labels = np.array([[1, 1, -100], [1, 2, 3]])
    assert score("token_accuracy", {"y": output}, labels) == pytest.approx([1.0, 1 / 3])
    output[0, 2, 0] = np.nan  # not counted
    output[1, 0, 0] = np.nan
    scores = score("token_accuracy", {"y": output}, labels)
    assert scores[0] == 1.0
    assert math.isnan(scores[1])
    with pytest.raises(DataError, match="Sample 1 has no token"):
        score("token_accuracy", {"y": output}, np.array([[1, 1, 1], [-100, -100, -100]]))


def test_errors_are_negated_means_over_a_samples_values():
    output, labels = np.array([[1.0], [2.0]], dtype=np.float32), np.array([1.5, 2.0])
    assert score("neg_abs_error", {"y": output}, labels).tolist() == [-0.5, 0.0]
    assert score("neg_squared_error", {"y": output}, labels).tolist() == [-0.25, 0.0]
    with pytest.raises(DataError, match="labels of the output's shape"):
        score("neg_abs_error", {"y": np.zeros((2, 3))}, labels)


def test_the_first_output_is_the_one_that_is_scored():
    assert score("top1", {"logits": LOGITS, "features": np.zeros((3, 7))}, np.array([1, 0, 2])).tolist() == [1, 1, 1]


def test_a_users_function_gets_all_outputs_and_the_labels():
    def hits(outputs, labels):
        return outputs["logits"].argmax(1) == labels

    assert score(hits, {"logits": LOGITS}, np.array([1, 1, 2])).tolist() == [1.0, 0.0, 1.0]
    assert predictions(hits, {"logits": LOGITS}) is None


def test_a_users_function_that_returns_a_single_number_is_refused():
    with pytest.raises(DataError, match="one number a sample"):
        score(lambda outputs, labels: 0.93, {"y": LOGITS}, np.zeros(3, dtype=int))


def test_a_users_function_that_raises_is_shown_as_their_code():
    def broken(outputs, labels):
        return outputs["no such output"]

    with pytest.raises(UserCodeError, match="KeyError"):
        score(broken, {"y": LOGITS}, None)


def test_an_unknown_name_is_answered_with_the_closest():
    with pytest.raises(ConfigError, match="closest names: top1"):
        score("top-1", {"y": LOGITS}, np.zeros(3, dtype=int))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "needs labels"),
        (np.zeros(4, dtype=int), "3 answers and 4 labels"),
        (np.array([0, 1, 3]), "3 classes"),
        (np.array([0, -1, 1]), "3 classes"),
        (np.array([0.0, 1.0, 1.0]), "class numbers"),
        (np.zeros((3, 1), dtype=int), "labels \\[samples\\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        score("top1", {"y": LOGITS}, labels)


def test_every_row_explains_itself():
    for name, row in METRICS.items():
        assert row.description, name
        assert row.is_binary is (name in {"top1", "top5"})
