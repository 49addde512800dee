"""A verdict, and how its numbers are written for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mpdeploy.files import finite_json
from mpdeploy.measure.statistics import Bounds

VerdictName = Literal["pass", "fail", "inconclusive", "unvalidated"]
SEVERITY: Mapping[str, int] = {"pass": 0, "inconclusive": 1, "fail": 2}
"""The run's verdict is the worst of those; `unvalidated` is listed beside it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one gate says of one place.

    Attributes:
        id: the gate's.
        at: the place, or the gate's glob where no place has what it asks for.
        metric: a row of `gates.metrics.METRICS`.
        verdict: pass, fail, inconclusive or unvalidated.
        measured: the number; NaN where it was measured and is not a number, None where nothing was measured.
        limit: what it is held against.
        interval: bounds of the measured number where it was sampled.
        num_samples: what it rests on.
        message: one line for people, with both numbers.
        advisory: left out of the run's verdict.
        samples_to_decide: how many samples would decide, where inconclusive and known.
        p_value: one-sided, of "the limit is kept", where sampled.
        slice: the named slice of the samples that it is about; empty for all of them.
    """

    id: str
    at: str
    metric: str
    verdict: VerdictName
    measured: float | None
    limit: float
    interval: Bounds | None
    num_samples: int
    message: str
    advisory: bool = False
    samples_to_decide: int | None = None
    p_value: float | None = None
    slice: str = ""

    @property
    def key(self) -> str:
        """What tells it from the others: gate, place and slice."""
        return f"{self.id} on {self.at}" + (f" [{self.slice}]" if self.slice else "")

    def to_json(self) -> dict[str, Any]:
        """As in gate.json: numbers to 12 digits, the same bytes on every machine; NaN as the string "nan"."""
        value: dict[str, Any] = stable_json(
            {
                "id": self.id,
                "at": self.at,
                "metric": self.metric,
                "verdict": self.verdict,
                "measured": self.measured,
                "limit": self.limit,
                "interval": None if self.interval is None else list(self.interval),
                "num_samples": self.num_samples,
                "message": self.message,
                "advisory": self.advisory,
                "samples_to_decide": self.samples_to_decide,
                "p_value": self.p_value,
                "slice": self.slice,
            }
        )
        return value


def overall(verdicts: Sequence[Verdict]) -> VerdictName:
    """The worst verdict of those that count and ran here.

    Where nothing that counts ran: `unvalidated` if something waits for another machine, else `inconclusive`.
    """
    counted = [verdict.verdict for verdict in verdicts if not verdict.advisory]
    ran = [name for name in counted if name in SEVERITY]
    if ran:
        return max(ran, key=lambda name: SEVERITY[name])
    return "unvalidated" if counted else "inconclusive"


def stable_json(value: Any) -> Any:
    """The value as JSON with numbers of 12 significant digits: the last bits differ between math libraries."""
    if isinstance(value, bool) or not isinstance(value, float):
        if isinstance(value, Mapping):
            return {str(key): stable_json(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [stable_json(item) for item in value]
        if hasattr(value, "item") and not isinstance(value, str | bytes):
            return stable_json(value.item())
        return finite_json(value)
    return float(f"{value:.12g}") if math.isfinite(value) else finite_json(value)


# -- numbers for people ------------------------------------------------------------------------------------------------


def format_number(value: float) -> str:
    """Three or four digits: `0`, `4.13e-04`, `0.0125`, `1.03`, `18,230,112`."""
    if not math.isfinite(value):
        return str(value).replace("nan", "NaN")
    if value == 0.0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.4g}"


def format_apart(value: float, other: float) -> str:
    """`value` with as many digits as it takes to see that it is not `other` (a cosine of 0.999998 is not 1)."""
    text = format_number(value)
    if value == other or not (math.isfinite(value) and math.isfinite(other)):
        return text
    digits = 5
    while float(text.replace(",", "")) == float(format_number(other).replace(",", "")) and digits <= 17:
        text, digits = f"{value:.{digits}g}", digits + 1
    return text


def format_count(value: int) -> str:
    """A count of samples to two digits: `1,900`."""
    digits = max(0, len(str(value)) - 2)
    return f"{round(value, -digits):,}"


def format_change(value: float, bounds: Bounds, *, scale: float, unit: str, limit: float) -> tuple[str, str]:
    """A signed change with its interval, and its limit: ('-0.6 pt [-1.4, +0.1]', '0.5 pt')."""
    digits = 1
    # The limit's leading digit, and two digits of the interval's width.
    for number, more in ((limit, 0), (bounds[1] - bounds[0], 1)):
        if math.isfinite(number) and number:
            digits = max(digits, more + math.ceil(-math.log10(abs(number) * scale)))
    digits = min(digits, 8)

    def signed(number: float) -> str:
        if not math.isfinite(number):
            return format_number(number)
        text = f"{number * scale:+.{digits}f}"
        return text.lstrip("+-") if float(text) == 0.0 else text

    space = f" {unit}" if unit else ""
    return (
        f"{signed(value)}{space} [{signed(bounds[0])}, {signed(bounds[1])}]",
        f"{limit * scale:.6g}{space}",
    )
