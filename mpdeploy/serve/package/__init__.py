"""`mpdeploy package RUN`: the engines that passed the gates, as Triton, KServe or Ray Serve want them.

Nothing here talks to a cluster: a package is a folder that the tools of each platform take. It is checked in a temporary folder
and shown under its name only when it is right; `package.json` says what it was made from and what the gates said.

triton    a model repository                                      triton.py, model_config.py, check.py
kserve    an InferenceService and what it mounts                  kserve.py
ray       a Serve application and its configuration               ray.py, ray_application.py
choose    which models of a run, with their verdicts              choose.py, models.py, batching.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from mpdeploy.errors import UsageError, closest_names

TARGETS: Mapping[str, str] = {
    "triton": "mpdeploy.serve.package.target_triton",
    "kserve": "mpdeploy.serve.package.target_kserve",
    "ray": "mpdeploy.serve.package.target_ray",
}
"""Target -> the module whose `write(request, folder)` makes it."""


@dataclass(frozen=True)
class PackageRequest:
    """What is asked for.

    Attributes:
        run: the run directory.
        target: a row of `TARGETS`.
        output: the folder to make.
        engines: names; none: what the target takes.
        name: of the model in URLs; none: the pipeline's.
        allow_failed: package what failed or was never validated, and say so.
        options: the target's own, by name.
    """

    run: Path
    target: str
    output: Path
    engines: tuple[str, ...] = ()
    name: str | None = None
    allow_failed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Package:
    """A package that was written.

    Attributes:
        path: its folder.
        provenance: what its `package.json` holds.
        next_steps: commands that deploy it.
    """

    path: Path
    provenance: Mapping[str, Any]
    next_steps: Sequence[str]


def package(request: PackageRequest) -> Package:
    """Write a package.

    Raises:
        UsageError: no such target or engine, or the output folder holds other things.
        GateFailedError: what was asked for may not be served.
        ArtifactChangedError, NotComparableError: files or evidence that are not what the run recorded.
        ConfigError: the package would not fit its engines.
    """
    if request.target not in TARGETS:
        raise UsageError(
            f"There is no target '{request.target}'.", hint=f"closest: {closest_names(request.target, TARGETS)}"
        )
    from mpdeploy.files import atomic_folder, write_json
    from mpdeploy.serve.package.provenance import PACKAGE_FILE, check_output

    check_output(request.output)
    target = import_module(TARGETS[request.target])
    with atomic_folder(request.output) as folder:
        provenance, next_steps = target.write(request, folder)
        write_json(folder / PACKAGE_FILE, provenance)
    return Package(request.output, provenance, next_steps)


Options = TypeVar("Options")
_FLAGS = {
    "labels": "--labels",
    "labels_file": "--labels",
    "version": "--model-version",
    "max_queue_size": "--queue-size",
    "queue_timeout_us": "--queue-timeout-ms",
}


def options_for(cls: type[Options], target: str, given: Mapping[str, Any]) -> Options:
    """A target's own options from what was given.

    Raises:
        UsageError: the target has no such option, or not such a value.
    """
    known = [item.name for item in fields(cls)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            flags = sorted({_flag(item) for item in known})
            raise UsageError(f"{_flag(name)} is no option of --target {target}.", hint=f"it has {', '.join(flags)}")
    return cls(**given)


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")
