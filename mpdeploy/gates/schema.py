"""JSON Schema of gate.json (draft 2020-12). tests/gates/test_gate_json.py validates what is written against it."""

from __future__ import annotations

from typing import Any

_NAMES = ["pass", "fail", "inconclusive", "unvalidated"]
_NUMBER: dict[str, Any] = {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]}
_NUMBER_OR_NULL: dict[str, Any] = {"anyOf": [*_NUMBER["anyOf"], {"type": "null"}]}
_COUNT_OR_NULL: dict[str, Any] = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]}
_DIGESTS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(properties: dict[str, Any], *, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


_VERDICT = _object(
    {
        "id": {"type": "string", "description": "the gate"},
        "at": {"type": "string", "description": "the place, or the gate's glob where nothing there has the metric"},
        "metric": {"type": "string"},
        "verdict": {"enum": _NAMES},
        "measured": {**_NUMBER_OR_NULL, "description": "null: not measured; a drop is baseline minus candidate"},
        "limit": _NUMBER,
        "interval": {
            "anyOf": [{"type": "array", "items": _NUMBER, "minItems": 2, "maxItems": 2}, {"type": "null"}],
            "description": "each end a one-sided 95 % bound; of latency_ratio a two-sided 95 % interval",
        },
        "num_samples": {"type": "integer", "minimum": 0},
        "message": {"type": "string"},
        "advisory": {"type": "boolean", "description": "left out of the run's verdict"},
        "samples_to_decide": _COUNT_OR_NULL,
        "p_value": {
            **_NUMBER_OR_NULL,
            "description": "one-sided, of 'the limit is kept'; null where nothing was sampled",
        },
        "slice": {"type": "string", "description": "the named slice of the samples; empty: all of them"},
    }
)

_SCORES = _object(
    {
        "metric": {"type": "string"},
        "mean": _NUMBER,
        "baseline_mean": _NUMBER,
        "num_samples": {"type": "integer"},
        "num_lost": {"type": "integer"},
        "num_gained": {"type": "integer"},
        "mcnemar_p_value": _NUMBER_OR_NULL,
    }
)

_FLIPS = _object({"count": {"type": "integer"}, "share": _NUMBER})

_PLACE = _object(
    {
        "precision": {"type": "string"},
        "stage": {"type": "string"},
        "baseline": {"type": "string"},
        "status": {"enum": ["measured", "unvalidated"]},
        "digests": _DIGESTS,
        "notes": {"type": "object"},
        "facts": {"type": "object"},
        "drift": {"type": "object", "description": "output -> rel_l2, max_abs, cosine, num_nonfinite, worst_sample"},
        "scores": _SCORES,
        "flips": _FLIPS,
        "slices": {
            "description": "slice -> its numbers",
            "type": "object",
            "additionalProperties": _object(
                {
                    "num_samples": {"type": "integer"},
                    "scores": _SCORES,
                    "flips": _FLIPS,
                    "rel_l2": {**_NUMBER, "description": "of the worst output"},
                },
                optional=("scores", "flips", "rel_l2"),
            ),
        },
        "corpus": _object(
            {
                "metric": {"type": "string"},
                "value": _NUMBER,
                "baseline_value": _NUMBER,
                "num_resamples": {"type": "integer"},
            }
        ),
        "latency": _object(
            {
                "median_ms": _NUMBER,
                "baseline_median_ms": _NUMBER,
                "p99_ms": _NUMBER_OR_NULL,
                "num_samples": {"type": "integer"},
            }
        ),
    },
    optional=("drift", "scores", "flips", "slices", "corpus", "latency"),
)

GATE_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "gate.json of mpdeploy",
    **_object(
        {
            "schema": {"const": 1},
            "harness": {"type": "integer"},
            "pipeline": {"type": "string"},
            "verdict": {"enum": _NAMES},
            "unvalidated": {
                "type": "array",
                "items": {"type": "string"},
                "description": "places that could not run here",
            },
            "verdicts": {"type": "array", "items": _VERDICT},
            "not_applied": {
                "type": "array",
                "items": _object({"id": {"type": "string"}, "reason": {"type": "string"}}),
                "description": "gates for a precision that this run has no model of",
            },
            "failure_claim": {
                "description": "Holm's correction of the sampled gates: passing needs none, since all must pass",
                **_object(
                    {
                        "num_sampled": {"type": "integer"},
                        "num_failed": {"type": "integer"},
                        "num_failed_corrected": {"type": "integer"},
                        "adjusted_p_values": {"type": "object", "additionalProperties": _NUMBER},
                        "statement": {"type": "string"},
                    }
                ),
            },
            "samples_to_decide": _COUNT_OR_NULL,
            "places": {"type": "object", "additionalProperties": _PLACE},
            "digests": _DIGESTS,
            "environment": {"type": "object"},
        }
    ),
}
