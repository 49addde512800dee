"""Tables of the training section: gradients against FP32, the underflow window, paired seeds, pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpdeploy.gates.verdict import format_number
from mpdeploy.report import charts
from mpdeploy.report.reading import Json, mapping, maybe_number

MAX_PARAMETERS = 8
_SHARES = {
    "flushed": "flushed to zero",
    "subnormal": "lose digits",
    "overflowing": "overflow",
    "flushed_unscaled": "flushed without a scale",
    "flushed_at_proposed_scale": "flushed at the proposed scale",
}


def gradient_table(steps: Sequence[Json]) -> dict[str, Any] | None:
    """The parameters whose gradients differ most from FP32's: cosine and excess zeros at each step compared."""
    worst: dict[str, tuple[float, float]] = {}
    for step in steps:
        zeros = mapping(step.get("excess_zeros"))
        for name, cosine in mapping(step.get("cosines")).items():
            found, lost = maybe_number(cosine), maybe_number(zeros.get(name, 0.0))
            before = worst.get(name, (1.0, 0.0))
            if found is not None:
                worst[name] = (min(before[0], found), max(before[1], lost or 0.0))
    if not worst:
        return None
    rows = [
        [name, f"{cosine:.6f}".rstrip("0"), f"{100.0 * lost:.3g} %"]
        for name, (cosine, lost) in sorted(worst.items(), key=lambda item: (item[1][0], -item[1][1]))[:MAX_PARAMETERS]
    ]
    return {
        "title": "Gradients against FP32's",
        "note": f"The same weights and batch, {len(steps)} steps; the {len(rows)} of {len(worst)} parameters that differ most.",
        "head": ["Parameter", "Cosine", "Zero in mixed precision alone"],
        "rows": rows,
    }


def shadow_table(shadows: Sequence[Json]) -> dict[str, Any] | None:
    """What the half format does to the gradients' values, from backward passes in FP32 beside the training."""
    if not shadows:
        return None
    shares = [key for key in _SHARES if any(maybe_number(item.get(key)) is not None for item in shadows)]
    rows = []
    for item in shadows[:12]:
        scale, proposed = (maybe_number(item.get(key)) for key in ("loss_scale", "proposed_scale"))
        cells = [str(item.get("step", "")), "" if scale is None else format_number(scale)]
        for key in shares:
            value = maybe_number(item.get(key))
            cells.append("" if value is None else f"{100.0 * value:.3g} %")
        rows.append([*cells, "" if proposed is None else format_number(proposed)])
    return {
        "title": "The underflow window",
        "note": "Gradients in FP32 beside the training: which share of their values the half format cannot hold.",
        "head": ["Step", "Loss scale", *(_SHARES[key] for key in shares), "Scale that would lose least"],
        "rows": rows,
    }


def parity_facts(parity: Any) -> dict[str, Any] | None:
    """AMP against FP32 over paired seeds: both sides' numbers by seed on one axis, churn, and what each look said."""
    if not isinstance(parity, Mapping) or not any(key in parity for key in ("nll", "scores", "churn", "same")):
        return None
    lines = []
    if parity.get("same"):
        lines.append("Training ran in FP32: it is its own reference.")
    looks = parity.get("verdict_at")
    if isinstance(looks, Mapping) and looks:
        lines.append("Looks: " + ", ".join(f"{verdict} with {count} seeds" for count, verdict in looks.items()) + ".")
    churn = parity.get("churn")
    if isinstance(churn, Mapping):
        lines.append(
            "Predictions that differ: " + "; ".join(f"{_words(key)} {_values(value)}" for key, value in churn.items())
        )
    cards = []
    for key, title in (("nll", "held-out loss by seed"), ("scores", "held-out score by seed")):
        found = parity.get(key)
        sides = [
            _numbers(found.get(f"{side}_by_seed")) if isinstance(found, Mapping) else []
            for side in ("candidate", "reference")
        ]
        if not isinstance(found, Mapping) or not all(sides):
            continue
        spread = (
            f"; FP32's spread over seeds {_values(found['reference_spread'])}" if "reference_spread" in found else ""
        )
        caption = f"AMP less FP32: {_values(found.get('difference'))}{spread}"
        cards.append(
            {"title": title, "chart": charts.seed_strip(*sides, label=f"{title}: {caption}"), "caption": caption}
        )
    return {"tier": str(parity.get("tier", "")), "num_seeds": parity.get("num_seeds"), "lines": lines, "cards": cards}


def pruning_facts(pruning: Any) -> dict[str, Any] | None:
    """Dense against pruned in one table, and how sparse each layer is."""
    if not isinstance(pruning, Mapping) or pruning.get("method", "off") == "off":
        return None
    sides = [mapping(pruning.get(name)) for name in ("dense", "pruned")]
    keys = dict.fromkeys(key for side in sides for key in side)
    layers = pruning.get("layers")
    sparsity = maybe_number(pruning.get("sparsity"))
    return {
        "title": f"Pruning: {pruning['method']}"
        + (f", {100.0 * sparsity:g} % asked for" if sparsity is not None else ""),
        "rows": [[_words(key), *(_values(side.get(key)) for side in sides)] for key in keys],
        "layers": [
            {
                "name": str(name),
                "share": f"{100.0 * share:.3g} %",
                "bar": charts.share_bar(
                    [("n-zero", round(1000 * share)), ("n-half", 1000 - round(1000 * share))],
                    label=f"{100.0 * share:.3g} % of the weights of {name} are zero",
                ),
            }
            for name, value in mapping(layers).items()
            if (share := maybe_number(value)) is not None
        ][:24],
        "note": str(pruning.get("measured_on", ""))
        + ("; every group of four weights holds two zeros (2:4)" if pruning.get("sparse_2_4") else ""),
    }


def _numbers(values: Any) -> list[float]:
    found = [maybe_number(value) for value in values] if isinstance(values, list | tuple) else []
    return [value for value in found if value is not None]


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def _values(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_values(item) for item in value[:8])
    number = maybe_number(value)
    return str(value) if number is None else format_number(number)
