"""Task metrics as one score a sample, higher being better, so that two models can be compared pair by pair.

A score is NaN where the model's answer is: that sample was lost, and a NaN metric is never a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpdeploy.artifact import Array
from mpdeploy.errors import ConfigError, DataError, closest_names
from mpdeploy.measure.statistics import FloatArray
from mpdeploy.user_code import user_call

Outputs = Mapping[str, Array]
Metric = str | Callable[..., Any]
IGNORED_LABEL = -100
"""Tokens with this label are not counted, as in torch's cross entropy."""
LOST = -1
"""The class predicted where the answer holds a NaN: none."""


@dataclass(frozen=True, slots=True)
class MetricRow:
    """A task metric.

    Attributes:
        scores: (output, labels) -> one score a sample.
        predictions: output -> one class a sample, where the metric predicts classes.
        is_binary: every score is 0 or 1.
        unit: `pt` where a score is a share (a hundredth of it is one point), else empty.
        description: one line.
    """

    scores: Callable[[Array, Array], FloatArray]
    predictions: Callable[[Array], Array] | None
    is_binary: bool
    unit: str
    description: str


def _top1(output: Array, labels: Array) -> FloatArray:
    labels = _class_labels(output, labels, "top1")
    return _unless_lost(output, predicted_classes(output) == labels)


def _top5(output: Array, labels: Array) -> FloatArray:
    labels = _class_labels(output, labels, "top5")
    if output.shape[1] <= 5:
        raise DataError(
            f"top5 of {output.shape[1]} classes is right whatever the model answers.", hint="use the metric top1"
        )
    rows = np.arange(len(output))
    label_score = output[rows, labels][:, None]
    # Ties count for the class with the smaller number, as argmax does: a model that answers a constant is not right
    # everywhere.
    before = (output > label_score) | ((output == label_score) & (np.arange(output.shape[1]) < labels[:, None]))
    return _unless_lost(output, before.sum(axis=1) < 5)


def _token_accuracy(output: Array, labels: Array) -> FloatArray:
    if output.ndim != 3 or labels.shape != output.shape[:2]:
        raise DataError(
            f"token_accuracy needs an output [samples, tokens, classes] and labels [samples, tokens], "
            f"found {list(output.shape)} and {list(labels.shape)}."
        )
    _check_integers(labels, "token_accuracy")
    counted = labels != IGNORED_LABEL
    if not counted.any(axis=1).all():
        sample = int(np.argmin(counted.any(axis=1)))
        raise DataError(f"Sample {sample} has no token whose label is not {IGNORED_LABEL}: it has no score.")
    right = (output.argmax(axis=2) == labels) & counted
    scores = right.sum(axis=1) / counted.sum(axis=1)
    lost = (np.isnan(output).any(axis=2) & counted).any(axis=1)
    return np.where(lost, np.nan, scores)


def _neg_abs_error(output: Array, labels: Array) -> FloatArray:
    return np.asarray(-np.abs(_errors(output, labels, "neg_abs_error")).mean(axis=1))


def _neg_squared_error(output: Array, labels: Array) -> FloatArray:
    return np.asarray(-(_errors(output, labels, "neg_squared_error") ** 2).mean(axis=1))


def predicted_classes(output: Array) -> Array:
    """The class with the largest score of each sample, [n]; -1 where the answer holds a NaN."""
    return np.where(np.isnan(output).any(axis=1), LOST, output.argmax(axis=1)).astype(np.int64)


METRICS: dict[str, MetricRow] = {
    "top1": MetricRow(
        _top1, predicted_classes, True, "pt", "1 where the class with the largest score is the label, else 0"
    ),
    "top5": MetricRow(
        _top5, predicted_classes, True, "pt", "1 where the label is among the five largest scores, else 0"
    ),
    "token_accuracy": MetricRow(
        _token_accuracy, None, False, "pt", "share of labelled tokens whose largest score is the label"
    ),
    "neg_abs_error": MetricRow(_neg_abs_error, None, False, "", "mean absolute error of the sample's values, negated"),
    "neg_squared_error": MetricRow(
        _neg_squared_error, None, False, "", "mean squared error of the sample's values, negated"
    ),
}


def resolve(metric: str) -> MetricRow:
    """The row of that name.

    Raises:
        ConfigError: there is none; the hint holds the closest names.
    """
    if metric.startswith("torchmetrics:"):
        raise ConfigError(
            f"'{metric}' is one number over all samples, and a metric gives one a sample.",
            hint="name it as validation.corpus_metric, and gate on corpus_drop",
        )
    if metric not in METRICS:
        raise ConfigError(
            f"There is no metric '{metric}'.",
            hint=f"closest names: {closest_names(metric, METRICS)}; or give a function of (outputs, labels)",
        )
    return METRICS[metric]


def metric_name(metric: Metric) -> str:
    """What evidence and messages call it."""
    return metric if isinstance(metric, str) else str(getattr(metric, "__name__", type(metric).__name__))


def score(metric: Metric, outputs: Outputs, labels: Array | None) -> FloatArray:
    """One score a sample, float64 [n], higher is better; NaN where the model's answer is NaN.

    A metric of the table looks at the only (or first) output. A user's function is called with all outputs and the
    labels, which may be None for it.

    Raises:
        ConfigError: no metric of that name.
        DataError: labels are missing or do not fit the output, or a user's function did not return one number a sample.
        UserCodeError: a user's function raised.
    """
    num_samples = len(_first(outputs))
    if not isinstance(metric, str):
        scores = np.asarray(user_call(metric, outputs, labels))
        if scores.shape != (num_samples,) or not (np.issubdtype(scores.dtype, np.number) or scores.dtype == bool):
            raise DataError(
                f"The metric '{metric_name(metric)}' returned {scores.dtype}{list(scores.shape)} "
                f"for {num_samples} samples.",
                hint="return one number a sample, higher being better; gates compare models sample by sample",
            )
        return scores.astype(np.float64)
    row = resolve(metric)
    if labels is None:
        raise DataError(
            f"The metric '{metric}' needs labels, and this data has none.", hint="give them with --labels FILE.npz"
        )
    if len(labels) != num_samples:
        raise DataError(f"There are {num_samples} answers and {len(labels)} labels.")
    return np.asarray(row.scores(_first(outputs), np.asarray(labels)), dtype=np.float64)


def predictions(metric: Metric, outputs: Outputs) -> Array | None:
    """One predicted class a sample, int64 [n], or None where the metric predicts no classes."""
    if not isinstance(metric, str):
        return None
    row = resolve(metric)
    return None if row.predictions is None else row.predictions(_class_scores(_first(outputs), metric))


def margins(metric: Metric, outputs: Outputs) -> Array | None:
    """How far each sample's largest score lies above its second largest, float32 [n]; None where no classes are predicted.

    NaN where the answer holds one.
    """
    if predictions(metric, outputs) is None:
        return None
    best = np.sort(np.asarray(_first(outputs), dtype=np.float64), axis=1)[:, -2:]
    return np.asarray(best[:, 1] - best[:, 0], dtype=np.float32)


def _first(outputs: Outputs) -> Array:
    if not outputs:
        raise DataError("There is no output to score.")
    return next(iter(outputs.values()))


def _class_scores(output: Array, metric: str) -> Array:
    if output.ndim != 2 or output.shape[1] < 2:
        raise DataError(
            f"{metric} needs an output [samples, classes] with at least two classes, found {list(output.shape)}.",
            hint="give a function of (outputs, labels) as the metric",
        )
    return output


def _class_labels(output: Array, labels: Array, metric: str) -> Array:
    num_classes = _class_scores(output, metric).shape[1]
    if labels.ndim != 1:
        raise DataError(
            f"{metric} needs labels [samples], found {list(labels.shape)}.", hint="labels are class numbers"
        )
    _check_integers(labels, metric)
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise DataError(
            f"Labels lie in [{labels.min()}, {labels.max()}]; "
            f"the model has {num_classes} classes, 0 to {num_classes - 1}."
        )
    return labels


def _check_integers(labels: Array, metric: str) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{metric} needs class numbers as labels, found {labels.dtype}.", hint="labels.astype('int64')")


def _unless_lost(output: Array, right: Array) -> FloatArray:
    return np.where(np.isnan(output).any(axis=1), np.nan, right.astype(np.float64))


def _errors(output: Array, labels: Array, metric: str) -> FloatArray:
    """Output minus label, [n, values of a sample]; axes of length 1 do not matter."""
    if np.squeeze(output[:1]).shape != np.squeeze(labels[:1]).shape:
        raise DataError(
            f"{metric} needs labels of the output's shape {list(output.shape)}, found {list(labels.shape)}."
        )
    n = len(output)
    return np.asarray(output, dtype=np.float64).reshape(n, -1) - np.asarray(labels, dtype=np.float64).reshape(n, -1)
