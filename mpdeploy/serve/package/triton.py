"""A model repository for Triton: one folder a model, with its config.pbtxt, its file in a version folder, and its labels.

NAME        what clients ask for: the TensorRT plan, or the ONNX model where the run has no plan that may be served
NAME_onnx   beside a plan: the FP32 ONNX model, for machines whose GPU or TensorRT the plan was not built for

Triton runs one backend a model, so a plan and its fallback are two models; no ensemble stands between a client and either.
The ONNX model runs on the CPU, as when its gates were decided: on a GPU ONNX Runtime would compute its FP32 in TF32.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpdeploy.artifact import TensorSpec
from mpdeploy.errors import ConfigError, UsageError
from mpdeploy.files import sha256_of_file, write_json, write_text
from mpdeploy.serve.dtypes import datatype_of
from mpdeploy.serve.package.model_config import config_text
from mpdeploy.serve.package.models import ONNX, PackagedModel
from mpdeploy.serve.package.run_copy import copy_with_companions

CONFIG, LABELS = "config.pbtxt", "labels.txt"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Backend:
    """How Triton is told to run a file: `kind` is where its instances live."""

    name: str
    file: str
    kind: str


BACKENDS: Mapping[str, Backend] = {
    "tensorrt": Backend("tensorrt", "model.plan", "KIND_GPU"),
    ONNX: Backend("onnxruntime", "model.onnx", "KIND_CPU"),
}
"""Engine -> Triton's backend for it."""
NO_BACKEND: Mapping[str, str] = {
    "tensorrt-rtx": "Triton has no TensorRT-RTX backend: an RTX plan is never packaged for it",
    "openvino": "Triton's OpenVINO backend cannot be told to run the graph as typed, so it would not run what the gates judged",
    "onnxruntime": "its file is optimised for one version of ONNX Runtime; the exported ONNX model is packaged in its stead",
}
"""Engine -> why Triton does not get it."""


@dataclass(frozen=True, slots=True)
class TritonOptions:
    """What the configurations say beside the models."""

    version: int = 1
    """The version folder. A later one beside it in a repository takes over when Triton polls or is told to load."""
    instances: int = 1
    """Instances a device."""
    max_queue_size: int = 1024
    """Requests that wait; more are refused at once with UNAVAILABLE."""
    queue_timeout_us: int = 5_000_000
    """How long a request waits for its batch before it is refused; a request may ask for less."""
    cuda_graphs: bool = True
    """Capture a CUDA graph for each of the profile's batch sizes (plans only)."""
    warm_up: bool = True
    """Run each of the profile's batch sizes before a model is ready."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in order."""

    def __post_init__(self) -> None:
        for name in ("version", "instances", "max_queue_size", "queue_timeout_us"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}.")


def check_model_name(name: str) -> str:
    """A name that is a folder and a part of a URL.

    Raises:
        UsageError: it cannot be both.
    """
    if not MODEL_NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot name a served model.", hint="letters, digits, '_', '-' and '.', for example --name digits"
        )
    return name


def names_of(models: Sequence[PackagedModel], name: str) -> dict[str, PackagedModel]:
    """Name in the repository -> model: the first is what clients ask for, the others carry their engine's name."""
    return {name if index == 0 else f"{name}_{model.engine}": model for index, model in enumerate(models)}


def write_repository(folder: Path, models: Mapping[str, PackagedModel], options: TritonOptions) -> None:
    """Write a model repository into `folder`, which exists.

    Raises:
        ConfigError: a tensor that Triton's configuration cannot hold, or labels that fit no output.
    """
    for name, model in models.items():
        backend = BACKENDS[model.engine]
        home = folder / name
        version = home / str(options.version)
        version.mkdir(parents=True)
        if model.engine == ONNX:
            copy_with_companions(model.path, version / backend.file)
        else:
            shutil.copyfile(model.path, version / backend.file)
        if sha256_of_file(version / backend.file) != model.sha256:
            raise ConfigError(f"{model.path} changed while it was copied.", hint="run the command again")
        if model.sidecar:
            write_json(version / f"{backend.file}.json", plan_sidecar(model))
        if options.labels:
            write_text(home / LABELS, "\n".join(options.labels) + "\n")
        write_text(home / CONFIG, _comment(model) + config_text(config_of(name, model, options)))


def plan_sidecar(model: PackagedModel) -> dict[str, Any]:
    """What a plan must find where it is loaded: the library's version and the GPU it was built for."""
    wanted = (
        "library", "library_version", "device", "os", "machine", "flags", "options", "profile", "precision", "source_sha256", "built",
    )  # fmt: skip
    return {"sha256": model.sha256} | {name: model.sidecar[name] for name in wanted if name in model.sidecar}


def config_of(name: str, model: PackagedModel, options: TritonOptions) -> dict[str, Any]:
    """The fields of a model's config.pbtxt."""
    backend, batching = BACKENDS[model.engine], model.batching
    on_gpu = backend.kind == "KIND_GPU"
    config: dict[str, Any] = {
        "name": name,
        "backend": backend.name,
        "default_model_filename": backend.file,
        "max_batch_size": batching.max_batch,
        "input": [_tensor(spec, model) for spec in model.inputs],
        "output": [_tensor(spec, model) for spec in model.outputs],
        "version_policy": {"latest": {"num_versions": 1}},
        "instance_group": [
            # an instance loads all of a plan's optimisation profiles, and runs a batch in the one it fits best
            {"kind": backend.kind, "count": options.instances}
            | ({"profile": [str(number) for number in range(len(batching.profiles))]} if on_gpu else {})
        ],
        "parameters": {
            f"mpdeploy.{key}": {"string_value": str(value)}
            for key, value in model.provenance().items()
            if key != "not_passed"
        },
    }
    if batching.max_batch:
        config["dynamic_batching"] = {
            "max_queue_delay_microseconds": 0,  # greedy: take what queued while the last batch ran, wait for nothing
            "default_queue_policy": {
                "timeout_action": "REJECT",
                "default_timeout_microseconds": options.queue_timeout_us,
                "allow_timeout_override": True,
                "max_queue_size": options.max_queue_size,
            },
        }
        if on_gpu:  # the sizes the plan was tuned and its graphs are captured for
            config["dynamic_batching"]["preferred_batch_size"] = [size for size in batching.sizes if size > 1]
    if on_gpu and options.cuda_graphs:
        config["optimization"] = {"cuda": {"graphs": True, "graph_spec": _graph_specs(model)}}
    if options.warm_up:
        config["model_warmup"] = _warm_up(model)
    if options.labels:
        _add_labels(config["output"], model, options.labels)
    return config


def triton_type(dtype: str, *, where: str) -> str:
    """`float32` -> `TYPE_FP32`.

    Raises:
        ConfigError: Triton has no such type.
    """
    try:
        found = datatype_of(dtype)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{where}: Triton has no data type for {dtype}.", hint="cast it inside the model and export again"
        ) from error
    return "TYPE_STRING" if found == "BYTES" else f"TYPE_{found}"


def _comment(model: PackagedModel) -> str:
    lines = [
        f"{model.engine} in {model.precision}, from the run's place '{model.place}': {model.verdict}",
        f"sha256 {model.sha256}",
    ]
    return "".join(f"# {line}\n" for line in lines)


def _tensor(spec: TensorSpec, model: PackagedModel) -> dict[str, Any]:
    dims = model.batching.dims(spec)
    kind = triton_type(spec.dtype, where=f"'{spec}' of {model.path.name}")
    tensor: dict[str, Any] = {"name": spec.name, "data_type": kind, "dims": dims}
    if not dims:  # Triton wants at least one axis; clients send [batch, 1] for [batch]
        tensor |= {"dims": [1], "reshape": {"shape": []}}
    return tensor


def _graph_specs(model: PackagedModel) -> list[dict[str, Any]]:
    """A graph for each batch size with the best lengths: a graph replays one shape and no other."""
    return [
        {
            "batch_size": size if model.batching.max_batch else 0,
            "input": {name: {"dim": shape or [1]} for name, shape in shapes.items()},
        }
        for name, size, shapes in model.batching.samples()
        if " x best" in name
    ]


def _warm_up(model: PackagedModel) -> list[dict[str, Any]]:
    dtypes = {spec.name: spec.dtype for spec in model.inputs}
    return [
        {
            "name": name,
            "batch_size": size,
            "inputs": {
                each: {
                    "data_type": triton_type(dtypes[each], where=each),
                    "dims": shape or [1],
                    # whole numbers are often indices: 0 is one for sure
                    ("random_data" if "float" in dtypes[each] else "zero_data"): True,
                }
                for each, shape in shapes.items()
            },
        }
        for name, size, shapes in model.batching.samples()
    ]


def _add_labels(outputs: list[dict[str, Any]], model: PackagedModel, labels: Sequence[str]) -> None:
    fitting = [output for output in outputs if output["dims"][-1] == len(labels)]
    if not fitting:
        found = ", ".join(str(spec) for spec in model.outputs)
        raise ConfigError(
            f"There are {len(labels)} labels, and no output has {len(labels)} classes: {found}.",
            hint="give one label a line, as many as the output has classes",
        )
    for output in fitting:
        output["label_filename"] = LABELS
