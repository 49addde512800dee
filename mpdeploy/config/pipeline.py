"""The other sections, the gates, and the pipeline that holds them all."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from mpdeploy.config.section import Section, UserFunction
from mpdeploy.config.training import TrainConfig

HalfPrecision = Literal["fp16", "bf16"]


class DataConfig(Section):
    """Where samples come from."""

    load: UserFunction
    """`load(config: DataConfig) -> Splits`: disjoint train, early-stopping, calibration and gate samples."""
    folder: str | None = None
    """A folder that `load` may read; `--set data.folder=DIR`."""
    seed: int = 0
    """Fixes the splits."""


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
