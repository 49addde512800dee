"""A class of torchmetrics as a corpus metric: found by name, made for the output it is given, its sign turned where lower is better."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mpdeploy.artifact import Array
from mpdeploy.config.metric_name import TORCHMETRICS, parse_torchmetrics
from mpdeploy.errors import ConfigError, DataError, UnavailableError, closest_names

_ROOMS = ("torchmetrics.classification", "torchmetrics.regression", "torchmetrics.retrieval", "torchmetrics")
_DETECTION = "MeanAveragePrecision"
_FUNCTION = "give a function of (outputs, labels) that calls it"


class TorchMetric:
    """One of torchmetrics' classes, as a function of (outputs, labels) -> one number, higher being better.

    The task and the number of classes or labels are read off the output's shape where the class asks for them and the
    text does not give them; the first (or only) output is what it is computed on.
    """

    def __init__(self, text: str) -> None:
        try:
            self._name, self._arguments = parse_torchmetrics(text)
        except ValueError as error:
            raise ConfigError(f"validation.corpus_metric: {error}.") from error
        self._class = _found(self._name)
        self._made: dict[tuple[int, ...], Any] = {}

    def __call__(self, outputs: Mapping[str, Array], labels: Array | None) -> float:
        """The metric on these samples.

        Raises:
            DataError: no labels, or labels that do not fit the output.
            ConfigError: the class cannot be made with these arguments, or gives more than one number.
        """
        import torch

        if labels is None:
            raise DataError(f"The metric '{TORCHMETRICS}{self._name}' needs labels, and this data has none.")
        output = np.asarray(next(iter(outputs.values())))
        labels = np.asarray(labels)
        if output.ndim == labels.ndim + 1 and output.shape[-1] == 1:
            output = output[..., 0]
        metric = self._metric(output)
        metric.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a resample may lack a class; torchmetrics leaves it out
            try:
                # In float64, so that a smooth metric shows the small change of one sample among many.
                metric.update(*(torch.from_numpy(_plain(array)) for array in (output, labels)))
                value = metric.compute()
            except (ValueError, TypeError, RuntimeError, IndexError) as error:
                raise DataError(
                    f"torchmetrics' {self._name} cannot take the output {output.dtype}{list(output.shape)} "
                    f"and the labels {labels.dtype}{list(labels.shape)}: {error}",
                    hint=_FUNCTION,
                ) from error
        if not hasattr(value, "numel") or value.numel() != 1:
            raise ConfigError(
                f"torchmetrics' {self._name} gives more than one number.",
                hint=f"{TORCHMETRICS}{self._name}(average='macro'), or {_FUNCTION}",
            )
        return float(value) * (-1.0 if metric.higher_is_better is False else 1.0)

    def _metric(self, output: Array) -> Any:
        """An instance for outputs of this shape, made once."""
        key = output.shape[1:]
        if key not in self._made:
            accepted = inspect.signature(
                self._class.__new__ if "__new__" in vars(self._class) else self._class
            ).parameters
            offered: dict[str, Any] = {"task": "multiclass" if output.ndim >= 2 else "binary"}
            if output.ndim >= 2:
                offered |= {"num_classes": output.shape[1], "num_labels": output.shape[1]}
            chosen = {name: value for name, value in offered.items() if name in accepted} | self._arguments
            try:
                self._made[key] = self._class(**chosen)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"torchmetrics' {self._name} cannot be made with "
                    f"{', '.join(f'{name}={value!r}' for name, value in chosen.items()) or 'no arguments'}: {error}",
                    hint=f"its arguments: {', '.join(name for name in accepted if name not in ('cls', 'kwargs'))}",
                ) from error
        return self._made[key]


def _found(name: str) -> Any:
    """The class of that name.

    Raises:
        ConfigError: there is none; the hint holds the closest names.
        UnavailableError: torchmetrics, or what this class needs, is not installed.
    """
    if name == _DETECTION:
        raise ConfigError(
            f"torchmetrics' {_DETECTION} takes lists of boxes, which outputs of one shape are not.",
            hint=f"{_FUNCTION} (it needs torchvision and pycocotools); for classes: {TORCHMETRICS}MulticlassAveragePrecision",
        )
    try:
        rooms = [importlib.import_module(room) for room in _ROOMS]
    except ImportError as error:
        raise UnavailableError(
            f"The metric '{TORCHMETRICS}{name}' needs torchmetrics, which is not installed.",
            hint="pip install torchmetrics, or give a function of (outputs, labels)",
        ) from error
    for room in rooms:
        if inspect.isclass(found := getattr(room, name, None)) and hasattr(found, "compute"):
            return found
    raise ConfigError(
        f"torchmetrics has no metric '{name}'.",
        hint=f"closest names: {closest_names(name, sorted(set(_names(rooms))))}",
    )


def _names(rooms: list[Any]) -> Iterator[str]:
    for room in rooms:
        yield from (name for name in getattr(room, "__all__", ()) if inspect.isclass(getattr(room, name, None)))


def _plain(array: Array) -> Array:
    """A copy that torch can own."""
    return np.array(array, dtype=np.float64 if np.issubdtype(array.dtype, np.floating) else None)
