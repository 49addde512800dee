"""A model repository, read back and held against the models it was made from before anybody sees it.

The files are read strictly (`model_config`), by tritonclient too where it is installed, and every number in them that a profile
limits is compared with that profile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpdeploy.artifact import TensorSpec
from mpdeploy.errors import ConfigError
from mpdeploy.files import sha256_of_file
from mpdeploy.serve.package.model_config import check_with_client, config_values
from mpdeploy.serve.package.models import PackagedModel
from mpdeploy.serve.package.triton import BACKENDS, CONFIG, triton_type


def check_repository(folder: Path, models: Mapping[str, PackagedModel]) -> dict[str, Any]:
    """Check a repository against its models; the answer says what was checked with what.

    Raises:
        ConfigError: all faults at once.
    """
    faults: list[str] = []
    with_client = True
    for name, model in models.items():
        path = folder / name / CONFIG
        text = path.read_text(encoding="utf-8")
        config = config_values(text, where=str(path.relative_to(folder)))
        with_client &= check_with_client(text, where=str(path.relative_to(folder)))
        faults += [f"{name}: {fault}" for fault in _faults(config, model, folder / name)]
    if faults:
        raise ConfigError("The model repository does not fit its engines:\n" + "\n".join(f"  {f}" for f in faults))
    return {"config_schema": "strict", "tritonclient": "read" if with_client else "not installed", "profiles": "kept"}


def _faults(config: Mapping[str, Any], model: PackagedModel, home: Path) -> Iterator[str]:
    if config.get("name") != home.name:
        yield f"its name is '{config.get('name')}', its folder is '{home.name}'"
    backend = BACKENDS[model.engine]
    if config.get("backend") != backend.name:
        yield f"backend '{config.get('backend')}' does not run a {model.engine} file"
    yield from _file_faults(config, model, home)
    for key, specs in (("input", model.inputs), ("output", model.outputs)):
        yield from _tensor_faults(key, config.get(key, []), specs, model)
    largest = model.batching.max_batch
    max_batch = config.get("max_batch_size", 0)
    if max_batch > largest:
        yield f"max_batch_size is {max_batch}, the profile ends at {largest}"
    if (max_batch == 0) != (largest == 0):
        yield f"max_batch_size is {max_batch} and the model has {'a' if largest else 'no'} batch axis"
    for size in config.get("dynamic_batching", {}).get("preferred_batch_size", []):
        if not 1 <= size <= max_batch:
            yield f"the preferred batch size {size} is not between 1 and {max_batch}"
    for sample in config.get("model_warmup", []):
        shapes = {name: value.get("dims", []) for name, value in sample.get("inputs", {}).items()}
        yield from _shape_faults(f"warm-up '{sample.get('name')}'", sample.get("batch_size", 0), shapes, model)
    for spec in config.get("optimization", {}).get("cuda", {}).get("graph_spec", []):
        shapes = {name: value.get("dim", []) for name, value in spec.get("input", {}).items()}
        yield from _shape_faults("a CUDA graph", spec.get("batch_size", 0), shapes, model)
    for group in config.get("instance_group", []):
        if group.get("kind") != backend.kind:
            yield f"instances are {group.get('kind')}, its gates were decided for {backend.kind}"
        known = [str(number) for number in range(len(model.batching.profiles))]
        if unknown := [number for number in group.get("profile", []) if number not in known]:
            yield f"instances ask for the profiles {unknown}; the engine has {', '.join(known)}"


def _file_faults(config: Mapping[str, Any], model: PackagedModel, home: Path) -> Iterator[str]:
    name = config.get("default_model_filename", "")
    versions = [folder for folder in home.iterdir() if folder.is_dir() and folder.name.isdigit()]
    if not versions:
        yield "there is no version folder"
    for folder in versions:
        file = folder / name
        if not name or not file.is_file():
            yield f"version {folder.name} has no file '{name}'"
        elif (found := sha256_of_file(file)) != model.sha256:
            yield f"version {folder.name} holds another file: sha256 {found[:12]}, the run recorded {model.sha256[:12]}"
        if model.engine == "tensorrt" and not (folder / f"{name}.json").is_file():
            yield f"version {folder.name} has no sidecar that says which TensorRT and GPU the plan is for"


def _tensor_faults(
    key: str, found: list[Mapping[str, Any]], specs: tuple[TensorSpec, ...], model: PackagedModel
) -> Iterator[str]:
    if [tensor.get("name") for tensor in found] != [spec.name for spec in specs]:
        yield f"its {key}s are {[tensor.get('name') for tensor in found]}, the model's {[spec.name for spec in specs]}"
        return
    for tensor, spec in zip(found, specs, strict=True):
        wanted = triton_type(spec.dtype, where=spec.name)
        if tensor.get("data_type") != wanted:
            yield f"{key} '{spec.name}' is {tensor.get('data_type')}, the model has {wanted}"
        dims = [int(axis) for axis in tensor.get("dims", [])]
        held = [] if "reshape" in tensor and dims == [1] else dims
        if held != model.batching.dims(spec):
            yield f"{key} '{spec.name}' has the axes {dims}, the model has {model.batching.dims(spec)}"


def _shape_faults(what: str, batch: int, shapes: Mapping[str, list[Any]], model: PackagedModel) -> Iterator[str]:
    if set(shapes) != {spec.name for spec in model.inputs}:
        yield f"{what} gives {sorted(shapes)}, the inputs are {[spec.name for spec in model.inputs]}"
        return
    batched = model.batching.max_batch > 0
    ranks = {spec.name: len(spec.shape or ()) for spec in model.inputs}
    whole = {
        name: ([batch] if batched else []) + ([int(axis) for axis in dims] if ranks[name] > int(batched) else [])
        for name, dims in shapes.items()
    }
    if not model.batching.fits(whole):
        limits = " or ".join(
            ", ".join(f"{name} {list(item.smallest)} to {list(item.largest)}" for name, item in profile.items())
            for profile in model.batching.profiles
        )
        yield f"{what} gives {whole}, no profile takes that: {limits}"
