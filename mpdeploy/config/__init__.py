"""What a pipeline file returns: frozen, validated when it is made, and serialisable.

A pipeline file holds choices only. It defines `def pipeline() -> Pipeline` and the functions its choices name (the model, the
data). `--set train.epochs=3` replaces one field of it (`apply_overrides`), with the same validation. Each stage digests only its
own section, so that an edited gate does not retrain.
"""

from __future__ import annotations

from mpdeploy.config.loading import load_pipeline
from mpdeploy.config.overrides import apply_overrides
from mpdeploy.config.parallel import ParallelConfig
from mpdeploy.config.parity import ParityConfig
from mpdeploy.config.pipeline import (
    DEFAULT_GATES,
    PARITY_GATES,
    BuildConfig,
    ConvertConfig,
    DataConfig,
    ExportConfig,
    Gate,
    HalfPrecision,
    Pipeline,
    ValidationConfig,
)
from mpdeploy.config.pruning import PruningConfig
from mpdeploy.config.section import Section, UserFunction
from mpdeploy.config.training import TrainConfig, TrainPrecision

__all__ = [
    "DEFAULT_GATES",
    "PARITY_GATES",
    "BuildConfig",
    "ConvertConfig",
    "DataConfig",
    "ExportConfig",
    "Gate",
    "HalfPrecision",
    "ParallelConfig",
    "ParityConfig",
    "Pipeline",
    "PruningConfig",
    "Section",
    "TrainConfig",
    "TrainPrecision",
    "UserFunction",
    "ValidationConfig",
    "apply_overrides",
    "load_pipeline",
]
