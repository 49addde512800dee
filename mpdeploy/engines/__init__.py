"""The table of engines: one row a backend. Adding an engine is one file and one row here."""

from __future__ import annotations

from importlib import import_module

from mpdeploy.engines.base import EngineBackend
from mpdeploy.errors import ConfigError, closest_names

# name -> (module, object in it): a backend's module is imported when its row is used, its library when it has work to do
ENGINES: dict[str, tuple[str, str]] = {
    "tensorrt": ("mpdeploy.engines.tensorrt", "TENSORRT"),
    "tensorrt-rtx": ("mpdeploy.engines.tensorrt", "TENSORRT_RTX"),
    "openvino": ("mpdeploy.engines.openvino", "OPENVINO"),
    "onnxruntime": ("mpdeploy.engines.onnxruntime", "ONNXRUNTIME"),
}


def backend(name: str) -> EngineBackend:
    """The backend of a row.

    Raises:
        ConfigError: there is no such row.
    """
    if name not in ENGINES:
        raise ConfigError(f"There is no engine '{name}'.", hint=f"closest names: {closest_names(name, ENGINES)}")
    module, row = ENGINES[name]
    found: EngineBackend = getattr(import_module(module), row)
    return found
