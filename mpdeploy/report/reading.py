"""Reading gate.json for renderers: numbers that may be strings, verdicts in the order a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mpdeploy.gates.verdict import format_apart, format_number

Json = Mapping[str, Any]

SYMBOLS: Mapping[str, str] = {"pass": "✓", "fail": "✕", "inconclusive": "?", "unvalidated": "…"}
_ORDER = ("fail", "inconclusive", "unvalidated", "pass")


def number(value: Any) -> float:
    """A number of gate.json: NaN and infinities are strings there, and null stands for nothing."""
    return math.nan if value is None else float(value)


def maybe_number(value: Any) -> float | None:
    """A finite number of a report, or None where it is none: a text, a list, a truth value, NaN."""
    if value is None or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def measured_text(verdict: Json) -> str:
    """The number and its interval; a drop is called one, since messages show the signed change."""
    if verdict["measured"] is None:
        return "not measured"
    text = format_apart(number(verdict["measured"]), number(verdict["limit"]))
    if verdict["interval"] is not None:
        low, high = (format_number(number(bound)) for bound in verdict["interval"])
        text += f" [{low}, {high}]"
    return f"drop {text}" if verdict["metric"].endswith("score_drop") else text


def worst_first(verdicts: Sequence[Json]) -> list[Json]:
    """Failed, inconclusive, unvalidated, passed; those that count before advisory ones; else in the order decided."""
    return sorted(verdicts, key=lambda verdict: (bool(verdict["advisory"]), _ORDER.index(verdict["verdict"])))


def counted(gate: Json, verdict: str) -> list[Json]:
    """The verdicts of that name that decide the run's."""
    return [each for each in gate["verdicts"] if each["verdict"] == verdict and not each["advisory"]]


def headline(gate: Json) -> str:
    """One sentence under the verdict: how many gates, what is wrong, what waits for another machine."""
    counts = {name: len(counted(gate, name)) for name in _ORDER}
    total = sum(counts.values())
    parts = []
    if counts["fail"]:
        places = list(dict.fromkeys(verdict["at"] for verdict in counted(gate, "fail")))
        parts.append(f"{counts['fail']} of {total} gate verdicts failed, at {', '.join(places[:4])}")
        if len(places) > 4:
            parts[-1] += f" and {len(places) - 4} more"
    if counts["inconclusive"]:
        text = f"{counts['inconclusive']} cannot be decided with these samples"
        if gate["samples_to_decide"]:
            text += f" (~{gate['samples_to_decide']:,} would)"
        parts.append(text)
    if not counts["fail"] and not counts["inconclusive"]:
        parts.append(f"all {counts['pass']} gate verdicts passed" if counts["pass"] else "no gate that counts ran here")
    if gate["unvalidated"]:
        parts.append(f"not validated on this machine: {', '.join(gate['unvalidated'])}")
    sentence = "; ".join(parts)
    return sentence[0].upper() + sentence[1:] + "."


def mapping(value: Any) -> Json:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def dicts(value: Any) -> list[Json]:
    """The mappings in a list that may be no list."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []
