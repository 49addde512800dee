"""The other sections, the gates, and the pipeline that holds them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, field_validator, model_validator

from mpdeploy.config.metric_name import parse_torchmetrics
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
    limit: int | None = Field(None, ge=20)
    """At most so many samples in all, each class in proportion; an official test split gives at most a fifth of them."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of the model's outputs; empty: those found in the data, sorted."""
    text_columns: tuple[str, ...] = Field((), max_length=2)
    """Text: the column of the sentence, or of two sentences; empty: the names GLUE uses (`sentence`, `premise` and `hypothesis`, ...)."""
    label_column: str = "label"
    """Text: the column of the label, a number or a name."""
    max_length: int = Field(128, ge=4)
    """Text: tokens a sample has at most; longer ones are cut."""
    padding: Literal["longest", "max_length"] = "longest"
    """Text: pad to the longest sample, rounded up to a multiple of 8, or always to `max_length`."""
    image_size: tuple[int, int] = (224, 224)
    """Images: height and width in pixels; the shorter side is resized to fit and the rest is cut off evenly."""
    image_channels: Literal[1, 3] = 3
    """Images: 3 for RGB, 1 for grey."""
    cache_folder: str | None = None
    """Images: where decoded samples are kept; `mpdeploy` in the user's cache folder where None."""
    model_folder: str | None = None
    """A local transformers folder: weights, and the tokenizer or image processor that belongs to them."""


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
    shortest: dict[str, int] = Field(default_factory=lambda: {"sequence": 1})
    """Symbolic axes, by name, that may be shorter than the golden samples, and how short; others have their length throughout."""
    options: Mapping[str, Mapping[str, bool | int | str | tuple[str, ...]]] = Field(default_factory=dict)
    """Engine -> its own build options, those that `mpdeploy doctor --engine NAME` lists: `{"tensorrt": {"tf32": True}}`."""

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
    """`corpus_metric(outputs, labels) -> one number` over all samples, higher is better; or `torchmetrics:F1Score(average="macro")`."""
    corpus_resamples: int = Field(1000, ge=200)
    """Resamples of the samples on which the corpus metric is computed again, for its interval."""
    noise_floors: tuple[Literal["rerun", "rebuild", "tf32"], ...] = ("rerun", "tf32")
    """What moves when nothing was changed: an engine run again, or built again from the same model; FP32 against TF32 (on a GPU)."""
    describe_samples: UserFunction | None = None
    """`describe_samples(dataset) -> one text a sample`, for the report: what a sample of token ids or features says to a reader."""
    noise_floor_seeds: int = Field(0, ge=0)
    """Train so many FP32 models more, each with another seed, to see how far seeds alone move the score. Expensive: off."""

    @field_validator("corpus_metric")
    @classmethod
    def _parses(cls, value: str | UserFunction | None) -> str | UserFunction | None:
        if isinstance(value, str):
            parse_torchmetrics(value)
        return value


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
    times_noise: float | None = Field(None, gt=0)
    """Raise the limit to so many times the noise floor that was measured for it, where that is more (`limit=0`: from noise alone).

    The floor of `rel_l2` is the largest of `validation.noise_floors` at the place, that of `score_drop` the standard deviation
    between seeds (`validation.noise_floor_seeds`, at least 2). Where none was measured the limit stays as it is."""
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


PARITY_GATES: tuple[Gate, ...] = (
    Gate(id="parity-nll", metric="parity_nll", limit=0.05, at="parity/*"),
    Gate(id="parity-score", metric="parity_score_drop", limit=0.02, at="parity/*", advisory=True),
    Gate(id="parity-churn", metric="parity_churn", limit=0.02, at="parity/*", advisory=True),
)
"""What `train.parity.tier` from 1 on brings with it, where the pipeline has no gate on paired seeds of its own."""


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
    def _parity_gates(self) -> Pipeline:
        own = tuple(gate for gate in self.gates if gate not in PARITY_GATES)
        brought = PARITY_GATES if self.train.parity.tier else ()
        kept = tuple(gate for gate in self.gates if gate in own or brought)
        if not any(gate.metric.startswith("parity_") for gate in kept):
            kept += brought
        object.__setattr__(self, "gates", kept)  # frozen: this is still its making
        return self

    @model_validator(mode="after")
    def _unique_gates(self) -> Pipeline:
        ids = [gate.id for gate in self.gates]
        if len(set(ids)) != len(ids):
            raise ValueError(f"gate ids repeat: {sorted(ids)}")
        return self
