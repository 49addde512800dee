"""`mpdeploy doctor`: what this machine is, which engines it can build and run, and what would add the others."""

from __future__ import annotations

from typing import Any

from mpdeploy.engines import ENGINES, backend
from mpdeploy.environment import fingerprint, package_version

EXTRAS = {
    "train": ("torch", "safetensors", "scikit-learn"),
    "cpu": ("onnxruntime", "openvino"),
    "gpu": ("onnxruntime-gpu", "tensorrt-cu13", "polygraphy"),
    "rtx": ("tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings"),
    "serve": ("uvicorn", "orjson", "prometheus-client"),
    "report": ("jinja2",),
    "text": ("transformers",),
}


def examine() -> dict[str, Any]:
    """Hardware and versions, each engine's state, each extra's missing packages, and warnings about what does not fit together."""
    engines: dict[str, Any] = {}
    for name in ENGINES:
        row = backend(name)
        missing = row.available()
        if missing is not None:
            engines[name] = {"builds": False, "runs": False, "reason": missing.reason, "hint": missing.hint}
            continue
        stuck = row.can_run()
        engines[name] = {
            "builds": True,
            "runs": stuck is None,
            "takes": row.takes(),
            "reason": stuck.reason if stuck else None,
            "hint": stuck.hint if stuck else None,
        }
    extras = {
        name: [package for package in packages if package_version(package) is None] for name, packages in EXTRAS.items()
    }
    return {
        "environment": fingerprint(),
        "engines": engines,
        "extras": extras,
        "providers": _providers(),
        "warnings": _warnings(),
    }


def options_of(engine: str) -> dict[str, Any]:
    """What the builds of an engine can be told: `{"engine", "options": [{"name", "takes", "default", "text", "lacking"?}]}`.

    Raises:
        ConfigError: there is no such engine.
    """
    return {"engine": engine, "options": [row.to_json() for row in backend(engine).option_rows()]}


def _providers() -> dict[str, str]:
    """ONNX Runtime's CPU and CUDA providers: `loads`, or why not."""
    from mpdeploy.engines.onnxruntime import ONNXRUNTIME, loads_cuda

    missing = ONNXRUNTIME.available()
    if missing is not None:
        return {}
    return {"CPUExecutionProvider": "loads", "CUDAExecutionProvider": loads_cuda() or "loads"}


def _warnings() -> list[str]:
    both = package_version("onnxruntime") and package_version("onnxruntime-gpu")
    if both:
        return [
            "onnxruntime and onnxruntime-gpu are both installed and share one import package: uninstall both, then install one"
        ]
    return []
