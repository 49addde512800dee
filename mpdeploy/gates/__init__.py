"""Deciding: three-valued verdicts from evidence that can be decided again on any machine.

`mpdeploy.gates.METRICS` is the table of what a gate may ask for: one function and one row a metric.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "METRICS":
        from mpdeploy.gates.metrics import METRICS

        return METRICS
    raise AttributeError(f"module 'mpdeploy.gates' has no attribute '{name}'")
