"""What a pipeline file returns: frozen, validated when it is made, and serialisable.

A pipeline file holds choices only. It defines `def pipeline() -> Pipeline` and the functions its choices name (the model, the
data). `--set train.epochs=3` replaces one field of it (`apply_overrides`), with the same validation. Each stage digests only its
own section, so that an edited gate does not retrain.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from mpdeploy.errors import ConfigError, closest_names
from mpdeploy.user_code import describe_callable

TrainPrecision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
HalfPrecision = Literal["fp16", "bf16"]
UserFunction = Callable[..., Any]


class Section(BaseModel):
    """The base of every section: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True)

    def to_json(self) -> dict[str, Any]:
        """The section as plain JSON; a function becomes its name and the digest of the source it can reach."""
        return {name: _plain(getattr(self, name)) for name in type(self).model_fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_json()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if callable(value):
        return describe_callable(value)
    return value


class DataConfig(Section):
    """Where samples come from."""

    load: UserFunction
    """`load(config: DataConfig) -> Splits`: disjoint train, early-stopping, calibration and gate samples."""
    folder: str | None = None
    """A folder that `load` may read; `--set data.folder=DIR`."""
    seed: int = 0
    """Fixes the splits."""


class TrainConfig(Section):
    """How the network is trained (stage 10-train)."""

    model: UserFunction
    """`model() -> torch.nn.Module`, freshly initialised. Called with torch's seed set."""
    loss: UserFunction | None = None
    """`loss(outputs, labels) -> scalar tensor`; cross entropy where None."""
    augment: UserFunction | None = None
    """`augment(inputs, generator) -> inputs`, on training batches only; `generator` is a torch.Generator."""
    epochs: int = Field(20, ge=1)
    """Passes over the training samples."""
    batch_size: int = Field(64, ge=1)
    """Samples a step."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(1e-2, ge=0)
    """Decoupled weight decay of AdamW."""
    schedule: Literal["constant", "cosine", "one_cycle"] = "one_cycle"
    """Learning rate over optimiser steps that were really taken: a step skipped by the loss scaler does not advance it."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the global norm of the unscaled gradients to this; None does not clip."""
    precision: TrainPrecision = "auto"
    """Autocast precision. `auto`: fp16 with a loss scaler on CUDA; on a CPU the faster of fp32 and bf16, timed before step 1."""
    cpu_precision: TrainPrecision | None = None
    """What to use instead of `precision` where training runs on a CPU."""
    loss_scaling: Literal["dynamic", "none"] = "dynamic"
    """Loss scaling under fp16. `none` exists to show what goes wrong without it."""
    reference: bool = True
    """Also train in FP32 with the same seed, order and initial weights, to compare with. A large model cannot afford it."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many epochs without a better early-stopping loss; None trains all epochs."""
    checkpoint_every_epochs: int = Field(1, ge=1)
    """How often the full state is written, so that a killed run resumes from there."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    channels_last: bool = False
    """Lay out images as NHWC in memory: faster convolutions in bf16 and fp16."""
    seed: int = 0
    """Initial weights, order of samples and augmentation."""


class ExportConfig(Section):
    """How the checkpoint becomes ONNX (stage 20-export)."""

    opset: int = Field(20, ge=18, le=25)
    """ONNX opset of the exported model."""
    output_names: tuple[str, ...] = ("logits",)
    """Names of the model's outputs, in order."""
    parity_rtol: float = Field(1e-4, gt=0)
    """Largest relative L2 difference between torch and ONNX Runtime, in FP32, at each batch size tried."""


class ConvertConfig(Section):
    """How the FP32 graph becomes a mixed one (stage 30-convert)."""

    precisions: tuple[HalfPrecision, ...] = ()
    """Which mixed models to write; empty: what the engines take on this machine, fp16 always among them."""
    keep: tuple[str, ...] = ()
    """Nodes that stay FP32: node names, globs over names, or `op:Softmax` for an op type."""
    calibration_samples: int = Field(128, ge=1)
    """How many calibration samples the ranges are taken from (at most)."""


class BuildConfig(Section):
    """Which engines are built (stage 40-build)."""

    engines: tuple[str, ...] = ()
    """Rows of the engine table; empty: every one that this machine has. One that is named and missing is an error."""
    profile: tuple[int, int, int] = (1, 8, 32)
    """Smallest, best and largest batch of a symbolic first axis."""

    @field_validator("profile")
    @classmethod
    def _rising(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if not 1 <= value[0] <= value[1] <= value[2]:
            raise ValueError(f"batches must rise from at least 1, found {value}")
        return value


class ValidationConfig(Section):
    """What is measured on the gate's samples (stage 50-validate)."""

    metric: str | UserFunction = "top1"
    """A row of `mpdeploy.measure.accuracy.METRICS`, or `metric(outputs, labels) -> one score a sample`, higher is better."""
    batch_size: int = Field(32, ge=1)
    """Samples a call when answers are collected."""
    latency_batch: int = Field(1, ge=1)
    """Samples a call when latency is measured."""
    latency_samples: int = Field(300, ge=20)
    """Timed calls for each of the two sides of a comparison."""
    sweep_batches: tuple[int, ...] = ()
    """Batches at which each engine is also timed, alone; those outside its profile or beyond the samples are left out."""
    slices: UserFunction | None = None
    """`slices(dataset) -> {name: array}`, one row a sample: booleans make one slice, other values one slice each (`name=value`)."""
    clusters: UserFunction | None = None
    """`clusters(dataset) -> integers`: samples with equal numbers are not independent (frames of a video, patches of an image)."""
    corpus_metric: str | UserFunction | None = None
    """`corpus_metric(outputs, labels) -> one number` over all samples, higher is better; or `torchmetrics:MulticlassF1Score`."""
    corpus_resamples: int = Field(1000, ge=200)
    """Resamples of the samples on which the corpus metric is computed again, for its interval."""
    noise_floors: tuple[Literal["rerun", "rebuild"], ...] = ("rerun",)
    """What drift an engine has against itself: run again on the same samples, or built again from the same model."""
    noise_floor_seeds: int = Field(0, ge=0)
    """Train so many FP32 models more, each with another seed, to see how far seeds alone move the score. Expensive: off."""


class Gate(Section):
    """One limit on one metric, wherever that metric was measured."""

    id: str
    """Unique; `--set gates.ID.limit=...` names it."""
    metric: str
    """A row of `mpdeploy.gates.METRICS`."""
    limit: float
    """The largest value allowed (for a drop in accuracy: the margin, as a fraction)."""
    at: str = "*"
    """A glob over the places where it applies: `onnx`, `emulated/fp16`, `engine/openvino`, ..."""
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Apply only to models of this precision."""
    slice: str | None = None
    """A glob over the names of slices: apply to each of these instead of to all samples. None: all samples."""
    advisory: bool = False
    """Report the verdict, but leave it out of the run's."""


DEFAULT_GATES: tuple[Gate, ...] = (
    Gate(id="finite", metric="num_nonfinite", limit=0),
    Gate(id="gradient-underflow", metric="excess_zero_gradients", limit=0.01),
    Gate(id="accuracy", metric="score_drop", limit=0.02),
    Gate(id="drift-fp32", metric="rel_l2", limit=1e-3, precision="fp32"),
    Gate(id="drift-fp16", metric="rel_l2", limit=1e-2, precision="fp16"),
    Gate(id="drift-bf16", metric="rel_l2", limit=5e-2, precision="bf16"),
    Gate(id="realised-precision", metric="kept_in_half", limit=0),
    Gate(id="latency", metric="latency_ratio", limit=1.0, at="engine/*", advisory=True),
)


class Pipeline(Section):
    """Everything `mpdeploy train-and-export` needs to know."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the run's default directory, `runs/NAME`."""
    data: DataConfig
    train: TrainConfig
    export: ExportConfig = ExportConfig()
    convert: ConvertConfig = ConvertConfig()
    build: BuildConfig = BuildConfig()
    validation: ValidationConfig = ValidationConfig()
    gates: tuple[Gate, ...] = DEFAULT_GATES

    @model_validator(mode="after")
    def _unique_gates(self) -> Pipeline:
        ids = [gate.id for gate in self.gates]
        if len(set(ids)) != len(ids):
            raise ValueError(f"gate ids repeat: {sorted(ids)}")
        return self


def apply_overrides(pipeline: Pipeline, overrides: Iterable[str]) -> Pipeline:
    """Return `pipeline` with each `a.b=value` applied.

    `value` is read as JSON where it is JSON (`3`, `true`, `["openvino"]`), else as text. All faults are reported at once.

    Raises:
        ConfigError: a malformed override, an unknown key (with the closest ones), a value of the wrong type.
    """
    faults: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            faults.append(f"--set {override}: write it as key=value, for example --set train.epochs=3")
            continue
        try:
            pipeline = _replace(pipeline, key.split("."), text, key)
        except ConfigError as error:
            faults.append(str(error).replace("\n\nhint: ", " (") + (")" if error.hint else ""))
    if faults:
        raise ConfigError("\n".join(faults))
    return pipeline


def _replace(section: Any, path: list[str], text: str, key: str) -> Any:
    name, rest = path[0], path[1:]
    fields = type(section).model_fields
    if name not in fields:
        everywhere = _keys(section)
        prefix = key[: len(key) - len(".".join(path))]
        raise ConfigError(
            f"--set {key}: there is no '{prefix}{name}'",
            hint=f"closest keys: {closest_names('.'.join(path), everywhere)}",
        )
    value = getattr(section, name)
    if rest and isinstance(value, Section):
        return _validated(section, name, _replace(value, rest, text, key), key)
    if rest and isinstance(value, tuple) and value and isinstance(value[0], Gate):
        by_id = {gate.id: gate for gate in value}
        if rest[0] not in by_id or len(rest) != 2:
            raise ConfigError(
                f"--set {key}: there is no gate '{rest[0]}' with such a field",
                hint=f"write gates.ID.limit=...; closest ids: {closest_names(rest[0], by_id)}",
            )
        changed = _replace(by_id[rest[0]], rest[1:], text, key)
        return _validated(section, name, tuple(changed if gate.id == rest[0] else gate for gate in value), key)
    if rest or isinstance(value, Section):
        raise ConfigError(f"--set {key}: '{name}' has no such part", hint=f"keys: {', '.join(_keys(section)[:8])}")
    return _validated(section, name, _parsed(fields[name].annotation, text, key), key)


def _parsed(annotation: Any, text: str, key: str) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    candidates: list[Any] = [text]
    with contextlib.suppress(ValueError):  # plain text is no JSON
        candidates.insert(0, json.loads(text))
    fault = ""
    for candidate in candidates:
        try:
            return adapter.validate_python(candidate)
        except ValidationError as error:
            fault = fault or "; ".join(item["msg"] for item in error.errors())
    raise ConfigError(f"--set {key}={text}: {fault[0].lower()}{fault[1:]}")


def _validated(section: Any, name: str, value: Any, key: str) -> Any:
    values = {field: getattr(section, field) for field in type(section).model_fields} | {name: value}
    try:
        return type(section)(**values)
    except ValidationError as error:
        faults = "; ".join(item["msg"] for item in error.errors())
        raise ConfigError(f"--set {key}={value}: {faults}") from error


def _keys(section: Section, prefix: str = "") -> list[str]:
    keys = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            keys += _keys(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Gate):
            keys += [f"{prefix}{name}.{gate.id}.{field}" for gate in value for field in ("limit", "at", "advisory")]
        else:
            keys.append(f"{prefix}{name}")
    return keys


def load_pipeline(path: Path) -> Pipeline:
    """Run a pipeline file and return what its `pipeline()` returns.

    Raises:
        ConfigError: no such file, no `pipeline()` in it, or it does not return a valid Pipeline.
        UserCodeError: the file raised; the message holds its own traceback.
    """
    from mpdeploy.user_code import import_file, user_call

    if not path.is_file():
        near = [str(file) for file in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        raise ConfigError(
            f"There is no pipeline file {path}.",
            hint=f"closest files: {closest_names(str(path), near)}" if near else "mpdeploy init NAME writes one",
        )
    module = import_file(path)
    function = getattr(module, "pipeline", None)
    if not callable(function):
        raise ConfigError(
            f"{path} defines no function 'pipeline'.",
            hint="end it with: def pipeline() -> Pipeline: return Pipeline(...)",
        )
    try:
        result = user_call(function)
    except ValidationError as error:
        faults = "\n".join(
            f"  {'.'.join(map(str, item['loc'])) or '(whole)'}: {item['msg']}" for item in error.errors()
        )
        raise ConfigError(f"{path}: {error.title} does not validate:\n{faults}") from error
    if not isinstance(result, Pipeline):
        raise ConfigError(f"{path}: pipeline() returned {type(result).__name__}, expected mpdeploy.config.Pipeline.")
    return result
