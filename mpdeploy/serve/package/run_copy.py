"""A run directory with what serving needs and nothing else: records, evidence, the exported model, the chosen engines.

The manifest is copied as it is, so every digest and every verdict can be checked again where the copy is opened. Checkpoints, training
state and the golden samples stay behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from mpdeploy.errors import ArtifactChangedError
from mpdeploy.files import sha256_of_file
from mpdeploy.run_dir import MANIFEST, RunDir
from mpdeploy.serve.package.models import ONNX, PackagedModel


def copy_run(run: RunDir, folder: Path, models: Sequence[PackagedModel]) -> None:
    """Copy a run into `folder`, which is made, with the engines of `models` alone.

    Raises:
        ArtifactChangedError: a file changed while it was copied.
    """
    folder.mkdir(parents=True)
    for name in (MANIFEST, "gate.json"):
        if (run.path / name).is_file():
            shutil.copyfile(run.path / name, folder / name)
    if (run.path / "evidence").is_dir():
        shutil.copytree(run.path / "evidence", folder / "evidence", ignore=shutil.ignore_patterns(".*"))
    exported = run.record("20-export")
    if exported is not None and "model" in exported.artifacts:
        model = exported.artifacts["model"].path
        copy_with_companions(model, folder / model.relative_to(run.path))
    for item in models:
        home = folder / item.path.parent.relative_to(run.path)
        if item.engine != ONNX:
            home.mkdir(parents=True, exist_ok=True)
            for file in sorted(item.path.parent.glob("engine.*")):
                shutil.copyfile(file, home / file.name)
        copied = home / item.path.name
        if sha256_of_file(copied) != item.sha256:
            raise ArtifactChangedError(f"{item.path} changed while it was copied.", hint="run the command again")


def copy_with_companions(source: Path, target: Path) -> None:
    """Copy an ONNX file, and the files beside it that hold its weights where it keeps them there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    for name in external_files(source):
        (target.parent / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.parent / name, target.parent / name)


def external_files(path: Path) -> list[str]:
    """The files that an ONNX file keeps weights in, by their names beside it.

    Raises:
        ArtifactChangedError: it names one outside its folder.
    """
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    model = onnx.load(path, load_external_data=False)
    tensors = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    names = sorted({ExternalDataInfo(tensor).location for tensor in tensors})
    for name in names:
        if not (path.parent / name).resolve().is_relative_to(path.parent.resolve()):
            raise ArtifactChangedError(f"{path} keeps weights outside its folder: {name}.")
    return names
