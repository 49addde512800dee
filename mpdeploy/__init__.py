"""mpdeploy: from mixed-precision training to a served engine, and no shipping of what drifted.

The command line calls the functions named here; nothing is imported until one of them is used.

    run(pipeline, path)            train-and-export
    convert(model, data=...)       FP32 ONNX -> mixed precision
    search_model(model, data=...)  the smallest FP32 keep-list that meets a gate
    emulate(model)                 a mixed model that rounds as half hardware does, on a CPU
    compare, bench, inspect        drift, latency and precision of models and engines
    build(model, engine=...)       an engine
    gate(path)                     decide a run again from its evidence
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "run": "mpdeploy.train_and_export",
    "gate": "mpdeploy.train_and_export",
    "convert": "mpdeploy.conversion",
    "search_model": "mpdeploy.searching",
    "emulate": "mpdeploy.precision.emulate",
    "compare": "mpdeploy.comparison",
    "bench": "mpdeploy.comparison",
    "build": "mpdeploy.building",
    "inspect": "mpdeploy.inspection",
    "load_pipeline": "mpdeploy.config",
    "Pipeline": "mpdeploy.config",
}
__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mpdeploy' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)
