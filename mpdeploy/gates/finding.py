"""What a metric's function finds at a place, and the row that makes a function a metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mpdeploy.gates.evidence import Place
from mpdeploy.measure.statistics import Bounds, Decision


@dataclass(frozen=True, slots=True)
class Finding:
    """What a metric's function found at a place.

    Attributes:
        measured: the number; NaN where it could not be made out.
        num_samples: what it rests on.
        name: what it is called for people, where that is not the metric's name.
        text: number, interval and limit for people; empty: written from `measured` and the limit.
        detail: what else a reader wants, in brackets after the verdict.
        interval: of a number that was sampled.
        decision: of a number that was sampled; None: the number itself is compared with the limit.
        samples_to_decide: where inconclusive and known.
        p_value: one-sided, of "the limit is kept".
    """

    measured: float
    num_samples: int
    name: str = ""
    text: str = ""
    detail: str = ""
    interval: Bounds | None = None
    decision: Decision | None = None
    samples_to_decide: int | None = None
    p_value: float | None = None


@dataclass(frozen=True, slots=True)
class MetricRow:
    """A metric that gates can put a limit on.

    Attributes:
        find: (place, limit) -> what was found there, or None where the place does not have this metric.
        unit: of the limit.
        description: one line.
        limit_is: whether the limit is the largest or the smallest value allowed.
        needs_run: it cannot be known of an engine that was only built; its verdict there is `unvalidated`.
    """

    find: Callable[[Place, float], Finding | None]
    unit: str
    description: str
    limit_is: Literal["largest", "smallest"] = "largest"
    needs_run: bool = True


def lost(reason: str, num_samples: int = 0) -> Finding:
    """A number that should be there and is not one."""
    return Finding(math.nan, num_samples, detail=reason)
