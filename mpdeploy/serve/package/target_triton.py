"""`--target triton`: a model repository, its README and its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpdeploy.errors import UsageError
from mpdeploy.files import write_text
from mpdeploy.run_dir import RunDir
from mpdeploy.serve.package import PackageRequest, options_for
from mpdeploy.serve.package.check import check_repository
from mpdeploy.serve.package.choose import Chosen, judge_of, models_of
from mpdeploy.serve.package.models import ONNX, PackagedModel
from mpdeploy.serve.package.provenance import provenance_of
from mpdeploy.serve.package.triton import (
    BACKENDS,
    NO_BACKEND,
    TritonOptions,
    check_model_name,
    names_of,
    write_repository,
)

ROWS = ("tensorrt", ONNX)


def write(request: PackageRequest, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Write the repository into `folder`; see `package`."""
    run = RunDir.open(request.run)
    chosen, names = repository_of(run, request, folder, triton_options(request.options))
    checks = check_repository(folder, names)
    listed = {name: model.provenance() | {"path": name} for name, model in names.items()}
    provenance = provenance_of(
        run, request.target, chosen, listed, allow_failed=request.allow_failed, checks=checks
    )  # fmt: skip
    steps = [f"tritonserver --model-repository={request.output} --disable-auto-complete-config"]
    write_text(folder / "README.md", readme(names))
    return provenance, steps


def repository_of(
    run: RunDir,
    request: PackageRequest,
    folder: Path,
    options: TritonOptions,
    refused: Mapping[str, str] = NO_BACKEND,
) -> tuple[Chosen, dict[str, PackagedModel]]:
    """Choose the models of a run and write their repository into `folder`; `refused` says which engines never, and why."""
    name = check_model_name(request.name or str(run.manifest.get("pipeline") or run.path.resolve().name))
    chosen = models_of(
        run,
        judge_of(run, allow_failed=request.allow_failed),
        rows=ROWS,
        asked=request.engines,
        refused=NO_BACKEND,
        allow_failed=request.allow_failed,
    )
    names = names_of(chosen.models, name)
    write_repository(folder, names, options)
    return chosen, names


def triton_options(given: Mapping[str, Any]) -> TritonOptions:
    """The options that were given, the labels read from their file.

    Raises:
        UsageError: an option Triton packages do not have, or labels that cannot be read.
    """
    values = dict(given)
    if (file := values.pop("labels_file", None)) is not None:
        values["labels"] = read_labels(Path(file))
    return options_for(TritonOptions, "triton", values)


def read_labels(path: Path) -> tuple[str, ...]:
    """One label a line.

    Raises:
        UsageError: it cannot be read, is empty or has an empty line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The labels {path} cannot be read: {error}.", hint="a text file, one label a line") from error
    if not lines or any(not line.strip() for line in lines):
        raise UsageError(f"The labels {path} have an empty line, or none at all.", hint="one label a line, in order")
    return tuple(line.strip() for line in lines)


def readme(names: dict[str, PackagedModel]) -> str:
    """What the repository holds and how it is started."""
    lines = ["# A model repository for Triton", ""]
    for name, model in names.items():
        backend = BACKENDS[model.engine]
        batch = f"batches up to {model.batching.max_batch}" if model.batching.max_batch else "no batch axis"
        lines.append(f"- `{name}`: {backend.file} in {model.precision}, {batch}, verdict {model.verdict}")
    plans = [(name, model) for name, model in names.items() if model.engine == "tensorrt"]
    for name, model in plans:
        device = model.sidecar.get("device") or {}
        lines += [
            "",
            f"The plan of `{name}` loads on {device.get('name', 'the GPU it was built on')} with TensorRT "
            f"{model.sidecar.get('library_version', '?')} only (see the .json beside it): take the Triton release with that",
            f"TensorRT, or ask `{name}_{ONNX}`, which runs on any CPU.",
        ]
    lines += [
        "",
        "The configurations are complete, so nothing is left to be guessed:",
        "",
        "    tritonserver --model-repository=THIS_FOLDER --disable-auto-complete-config",
        "",
        "`package.json` says which run this was made from and what its gates said.",
        "",
    ]
    return "\n".join(lines)
