"""What a pipeline's functions say of the gate's samples: slices, clusters, corpus metrics; and torchmetrics by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, Dataset
from mpdeploy.config import ValidationConfig
from mpdeploy.errors import ConfigError, DataError, UnavailableError, closest_names
from mpdeploy.gates.evidence import SLICE
from mpdeploy.measure.corpus import CorpusMetric
from mpdeploy.user_code import user_call

TORCHMETRICS = "torchmetrics:"
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


def corpus_metric_name(metric: Any) -> str:
    """What evidence and messages call it."""
    return metric if isinstance(metric, str) else str(getattr(metric, "__name__", type(metric).__name__))


def resolved_corpus_metric(metric: Any) -> CorpusMetric:
    """A function of (outputs, labels): the user's own, guarded, or an adapter around a torchmetrics class.

    Raises:
        ConfigError: a name that is none.
        UnavailableError: torchmetrics is not installed.
    """
    if not isinstance(metric, str):
        return lambda outputs, labels: user_call(metric, outputs, labels)
    if not metric.startswith(TORCHMETRICS):
        raise ConfigError(
            f"validation.corpus_metric '{metric}' is no name that is known.",
            hint=f"give a function of (outputs, labels), or {TORCHMETRICS}NAME, for example {TORCHMETRICS}MulticlassF1Score",
        )
    return _TorchMetric(metric.removeprefix(TORCHMETRICS))


class _TorchMetric:
    """One of torchmetrics' classes, fresh at every call; its sign is turned where lower is better."""

    def __init__(self, name: str) -> None:
        try:
            self._module: Any = importlib.import_module("torchmetrics")
            kinds: Any = importlib.import_module("torchmetrics.classification")
        except ImportError as error:
            raise UnavailableError(
                f"The metric '{TORCHMETRICS}{name}' needs torchmetrics, which is not installed.",
                hint="pip install torchmetrics, or give a function of (outputs, labels)",
            ) from error
        self._class: Any = getattr(kinds, name, None) or getattr(self._module, name, None)
        if not inspect.isclass(self._class):
            known = sorted({*getattr(kinds, "__all__", ()), *getattr(self._module, "__all__", ())})
            raise ConfigError(
                f"torchmetrics has no metric '{name}'.", hint=f"closest names: {closest_names(name, known)}"
            )
        self._name = name

    def __call__(self, outputs: Mapping[str, Array], labels: Array | None) -> float:
        import torch

        if labels is None:
            raise DataError(f"The metric '{TORCHMETRICS}{self._name}' needs labels, and this data has none.")
        output = next(iter(outputs.values()))
        metric = self._made(output)
        value = float(metric(torch.from_numpy(np.array(output)), torch.from_numpy(np.array(labels))))
        return -value if getattr(metric, "higher_is_better", True) is False else value

    def _made(self, output: Array) -> Any:
        accepted = inspect.signature(self._class.__new__ if "__new__" in vars(self._class) else self._class).parameters
        offered: dict[str, Any] = {"task": "multiclass"}
        if output.ndim >= 2:
            offered["num_classes"] = output.shape[1]
        try:
            return self._class(**{name: value for name, value in offered.items() if name in accepted})
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"torchmetrics' {self._name} cannot be made for an output of shape {list(output.shape)}: {error}.",
                hint="give a function of (outputs, labels) that makes it",
            ) from error
