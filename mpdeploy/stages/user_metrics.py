"""What a pipeline's functions say of the gate's samples: slices, clusters, corpus metrics, words for a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, Dataset
from mpdeploy.config import ValidationConfig
from mpdeploy.errors import DataError
from mpdeploy.gates.changes import most_changed
from mpdeploy.gates.evidence import SLICE, Place
from mpdeploy.measure.corpus import CorpusMetric
from mpdeploy.stages.torch_metrics import TorchMetric
from mpdeploy.user_code import user_call

MAX_TEXT = 600
"""Characters of a sample's text that are kept."""
MAX_VALUES = 50
"""A slicing by more values than this is a mistake: slices of a handful of samples decide nothing."""


def sample_groups(config: ValidationConfig, dataset: Dataset) -> dict[str, Array]:
    """`slice/NAME` and `clusters` as arrays of evidence, from the pipeline's functions.

    Raises:
        DataError: a function returned something that has not one row a sample.
        UserCodeError: a function raised.
    """
    arrays: dict[str, Array] = {}
    if config.slices is not None:
        found = user_call(config.slices, dataset)
        if not isinstance(found, Mapping):
            raise DataError(
                f"validation.slices returned {type(found).__name__}, expected a mapping of name -> one row a sample."
            )
        for name, values in found.items():
            arrays |= _slices_of(str(name), _one_row_a_sample(values, dataset, f"slice '{name}'"))
    if config.clusters is not None:
        clusters = _one_row_a_sample(user_call(config.clusters, dataset), dataset, "validation.clusters")
        arrays["clusters"] = np.unique(clusters, return_inverse=True)[1].astype(np.int64)
    return arrays


def _one_row_a_sample(values: Any, dataset: Dataset, what: str) -> Array:
    array = np.asarray(values)
    if array.shape != (len(dataset),) or array.dtype == object:
        raise DataError(
            f"{what} is {array.dtype}{list(array.shape)}, and there are {len(dataset)} samples.",
            hint="return one value a sample, in the order of dataset.ids",
        )
    return array


def _slices_of(name: str, values: Array) -> dict[str, Array]:
    if "/" in name:
        raise DataError(f"The slice '{name}' has a '/' in its name.", hint="use another sign")
    if values.dtype == bool:
        return {SLICE + name: values}
    distinct = np.unique(values)
    if len(distinct) > MAX_VALUES:
        raise DataError(
            f"The slicing '{name}' has {len(distinct)} distinct values, more than {MAX_VALUES}.",
            hint="bin them first: np.digitize(values, edges)",
        )
    return {f"{SLICE}{name}={str(value).replace('/', '_')}": values == value for value in distinct}


def sample_texts(config: ValidationConfig, dataset: Dataset, places: Sequence[Place]) -> dict[str, str]:
    """Sample id -> what it says, of the samples that changed most at each place; empty where the pipeline does not say.

    Raises:
        DataError: `describe_samples` returned something that has not one text a sample.
        UserCodeError: it raised.
    """
    if config.describe_samples is None:
        return {}
    chosen: dict[int, None] = {}
    for place in places:
        if place.status == "measured" and len(place.arrays.get("ids", ())) == len(dataset):
            chosen |= dict.fromkeys(int(index) for index in most_changed(place))
    if not chosen:
        return {}
    asked = dataset.take(np.array(sorted(chosen)))
    found = user_call(config.describe_samples, asked)
    if isinstance(found, str) or not hasattr(found, "__len__") or len(found) != len(asked):
        raise DataError(
            f"validation.describe_samples returned {type(found).__name__}, and it was asked for {len(asked)} samples.",
            hint="return one text a sample, in the order of dataset.ids",
        )
    return {str(int(each)): str(text)[:MAX_TEXT] for each, text in zip(asked.ids, found, strict=True) if text}


def corpus_metric_name(metric: Any) -> str:
    """What evidence and messages call it."""
    return metric if isinstance(metric, str) else str(getattr(metric, "__name__", type(metric).__name__))


def resolved_corpus_metric(metric: Any) -> CorpusMetric:
    """A function of (outputs, labels): the user's own, guarded, or an adapter around a torchmetrics class.

    Raises:
        ConfigError: a name that is none.
        UnavailableError: torchmetrics is not installed.
    """
    if isinstance(metric, str):
        return TorchMetric(metric)
    return lambda outputs, labels: user_call(metric, outputs, labels)
