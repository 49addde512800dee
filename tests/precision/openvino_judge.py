"""OpenVINO as a judge: it runs a graph as typed, in half precision for real, on CPUs that have the units."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

UNITS = {"fp16": "avx512_fp16", "bf16": "amx_bf16"}
"""Precision -> the flag of a CPU on which OpenVINO computes in it."""


def skip_where_it_cannot_judge(precision: str) -> None:
    """Skip a test, with the reason, on a CPU where OpenVINO computes half nodes in FP32, or where it is not installed."""
    pytest.importorskip("openvino")
    if UNITS[precision] not in _flags():
        pytest.skip(
            f"this CPU has no {UNITS[precision]}: OpenVINO computes {precision} nodes in FP32 here and cannot judge"
        )


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def answers_as_typed(path: Path, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What OpenVINO answers with every node in the precision that the file says."""
    import openvino as ov

    compiled = ov.Core().compile_model(path, "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
    answers = compiled(dict(feeds))
    return [np.asarray(answers[number]) for number in range(len(compiled.outputs))]
