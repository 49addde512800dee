"""The gate of a search: a drift, or the drop of a task metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import Array
from mpdeploy.data_files import load_labels
from mpdeploy.errors import ConfigError, DataError, UsageError
from mpdeploy.measure.accuracy import Metric, metric_name, resolve, score
from mpdeploy.searching.problem import Scorer


def parse_drop(text: str) -> float:
    """`0.2pt` -> 0.002; a bare number is taken in the metric's own unit.

    Raises:
        UsageError: no number.
    """
    number, is_points = (text[:-2], True) if text.strip().endswith("pt") else (text, False)
    try:
        value = float(number)
    except ValueError as error:
        raise UsageError(f"--max-drop {text} is no number.", hint="give 0.2pt (points), or 0.002") from error
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"--max-drop {text} is no number of 0 or more.", hint="give how much the metric may fall")
    return value / 100 if is_points else value


def gate_of(
    max_drift: float | None, metric: Metric | None, labels: Path | Array | None, max_drop: float | None
) -> tuple[float, str]:
    """The limit, and the gate in words.

    Raises:
        UsageError: no gate, two gates, or half of one.
        ConfigError: no metric of that name.
    """
    if metric is None:
        if max_drop is not None or labels is not None:
            raise UsageError("--labels and --max-drop need a --metric.", hint="add --metric top1")
        if max_drift is not None and not max_drift > 0:
            raise UsageError(f"--max-drift {max_drift:g} is no drift above 0.", hint="--max-drift 1e-3")
        if max_drift is None:
            raise UsageError(
                "The search needs a gate.",
                hint="give --max-drift 1e-3, or --labels FILE --metric top1 --max-drop 0.2pt",
            )
        return max_drift, f"drift at most {max_drift:g}"
    if max_drift is not None:
        raise UsageError("Give one gate: --max-drift, or --metric with --max-drop.", hint="drop one of them")
    if max_drop is None:
        raise UsageError(f"The metric '{metric_name(metric)}' needs a --max-drop.", hint="add --max-drop 0.2pt")
    if isinstance(metric, str):
        resolve(metric)
        if labels is None:
            raise UsageError(f"The metric '{metric}' needs --labels.", hint="add --labels FILE.npz with one array")
    elif not callable(metric):
        raise ConfigError("A metric is a name, or a function of (outputs, labels).", hint="metric='top1'")
    return max_drop, f"{metric_name(metric)} falls by at most {max_drop:g}"


def scorer_of(metric: Metric, labels: Path | Array | None) -> tuple[Scorer, int | None]:
    """What scores outputs, row by row, and how many labels there are, if any.

    Raises:
        DataError: the labels are no list.
    """
    known = load_labels(labels) if isinstance(labels, Path) else labels
    if known is not None and not np.ndim(known):
        raise DataError("The labels are a single value.", hint="one label a sample, along the first axis")

    def scores(outputs: Mapping[str, Array], rows: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return score(metric, outputs, None if known is None else known[list(rows)])

    return scores, None if known is None else len(known)
