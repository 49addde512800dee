"""What of a run goes into a package: the engines it may hold, verified and with what the gates said of them, best first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mpdeploy.artifact import Engine, OnnxModel, TensorSpec
from mpdeploy.engines import ENGINES
from mpdeploy.engines.base import Profile, ShapeRange
from mpdeploy.errors import (
    ArtifactChangedError,
    GateFailedError,
    NotComparableError,
    RunDirError,
    UsageError,
    closest_names,
)
from mpdeploy.files import sha256_of_file
from mpdeploy.run_dir import RunDir
from mpdeploy.serve.package.batching import batching_of, profile_from_sidecar
from mpdeploy.serve.package.models import ONNX, PackagedModel
from mpdeploy.serve.selection import UPSTREAM, Judgement
from mpdeploy.serve.selection import judge as judge_engine

if TYPE_CHECKING:
    from mpdeploy.gates.verdict import Verdict

EXPORT = "20-export"
BUILD = "40-build"


@dataclass(frozen=True)
class Chosen:
    """The models of a package, best first, and why others of the run are not in it."""

    models: tuple[PackagedModel, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def models_of(
    run: RunDir,
    judge: Callable[[str], Judgement],
    *,
    rows: Sequence[str],
    asked: Sequence[str] = (),
    refused: Mapping[str, str] | None = None,
    allow_failed: bool = False,
) -> Chosen:
    """The models of a run that a target takes.

    Args:
        run: opened.
        judge: engine -> what the gates said of it.
        rows: engines the target takes, best first; `onnx` is the exported FP32 model.
        asked: engines the user named; all of the target where none. `onnx` need not be named where the target takes it.
        refused: engine -> why the target never takes it.
        allow_failed: take what failed or was never validated.

    Raises:
        UsageError: an engine was named that the target does not take or the run does not have.
        GateFailedError: an engine was named that may not be served, or nothing of the run may be.
        ArtifactChangedError: a file is not the one that was recorded.
    """
    refused = refused or {}
    found, left_out = _found(run), {}
    for name in asked:
        _check_asked(name, rows, refused, found, run)
    models, warnings = [], []
    for name in (*rows, *(name for name in found if name not in rows)):
        if name in refused:
            if name in found:
                left_out[name] = refused[name]
            continue
        if name not in rows or (asked and name not in asked and name != ONNX):
            if name in found and name in rows:
                left_out[name] = "not asked for"
            continue
        if name not in found:
            left_out[name] = _why_missing(run, name)
            continue
        model = _model(run, name, judge)
        if model.verdict in ("fail", "unvalidated"):
            what = f"{name}: {model.verdict}" + "".join(f"\n  {reason}" for reason in model.reasons)
            if not allow_failed:
                if name in asked:
                    raise GateFailedError(
                        f"{what}\nIt is not packaged.", hint="mend it, or say --allow-failed; the package says so then"
                    )
                more = f" (and {len(model.reasons) - 1} more)" if len(model.reasons) > 1 else ""
                left_out[name] = f"{model.verdict}: {model.reasons[0]}{more}"
                continue
            warnings.append(f"{what.splitlines()[0]}: packaged all the same, as --allow-failed says")
        elif model.verdict == "inconclusive":
            warnings.append(f"{name}: inconclusive: {'; '.join(model.reasons)}")
        models.append(model)
    if not models:
        raise GateFailedError(
            f"{run.path} has nothing that may be packaged:\n"
            + "\n".join(f"  {name}: {why}" for name, why in left_out.items()),
            hint="mpdeploy gate RUN says more; --allow-failed packages it all the same",
        )
    return Chosen(tuple(models), left_out, tuple(warnings))


def _found(run: RunDir) -> dict[str, str]:
    """Engine -> the stage that finished with it."""
    records = run.records()
    stages = {name: f"{BUILD}/{name}" for name in ENGINES} | {ONNX: EXPORT}
    return {
        name: stage
        for name, stage in stages.items()
        if stage in records and records[stage].status == "done" and _artifact_name(name) in records[stage].artifacts
    }


def _artifact_name(engine: str) -> str:
    return "model" if engine == ONNX else "engine"


def _why_missing(run: RunDir, engine: str) -> str:
    record = run.record(f"{BUILD}/{engine}")
    return "the run did not build it" if record is None else f"{record.status}: {record.message or 'no engine'}"


def _check_asked(
    name: str, rows: Sequence[str], refused: Mapping[str, str], found: Mapping[str, str], run: RunDir
) -> None:
    if name in refused:
        raise UsageError(f"--engine {name}: {refused[name]}.", hint=f"this target takes {', '.join(rows)}")
    if name not in rows:
        raise UsageError(f"--engine {name}: there is no such engine.", hint=f"closest: {closest_names(name, rows)}")
    if name not in found:
        raise UsageError(
            f"--engine {name}: {run.path} has none: {_why_missing(run, name)}.", hint=f"it has {', '.join(found)}"
        )


def _model(run: RunDir, name: str, judge: Callable[[str], Judgement]) -> PackagedModel:
    artifact = run.artifact(_found(run)[name], _artifact_name(name))
    judged = judge(name)
    sidecar: Mapping[str, Any] = artifact.sidecar if isinstance(artifact, Engine) else {}
    inputs, outputs = _engine_types(artifact.inputs, sidecar), _engine_types(artifact.outputs, sidecar)
    profile = profile_from_sidecar(sidecar) if sidecar.get("profile") else run_profile(run, artifact.inputs)
    assert isinstance(artifact, Engine | OnnxModel)
    if name == "openvino" and (weights := sidecar.get("weights_sha256")):
        _check_weights(artifact, str(weights))
    return PackagedModel(
        engine=name,
        path=artifact.path,
        sha256=artifact.sha256,
        inputs=inputs,
        outputs=outputs,
        batching=batching_of(inputs, outputs, profile, where=f"{name} of {run.path.name}"),
        place=place_of(name),
        verdict=judged.verdict,
        reasons=judged.messages,
        precision=artifact.precision,
        sidecar=sidecar,
    )


def _check_weights(engine: Engine | OnnxModel, recorded: str) -> None:
    path = engine.path.with_suffix(".bin")
    found = sha256_of_file(path) if path.is_file() else "missing"
    if found != recorded:
        raise ArtifactChangedError(
            f"{path} is not the one that was recorded: sha256 {found[:12]}, recorded was {recorded[:12]}.",
            hint="put the recorded file back, or build the engine again",
        )


def _engine_types(specs: tuple[TensorSpec, ...], sidecar: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """The specs with the dtypes of the engine's own tensors, where they differ from the model's (float64 in TensorRT)."""
    types: Mapping[str, str] = sidecar.get("engine_dtypes", {})
    return tuple(replace(spec, dtype=types.get(spec.name, spec.dtype)) for spec in specs)


def run_profile(run: RunDir, inputs: Sequence[TensorSpec]) -> Profile:
    """The shapes that a run's engines were built for; the declared batch sizes where it has none.

    Raises:
        RunDirError: neither is there.
    """
    for name, record in run.records().items():
        if name.startswith(f"{BUILD}/") and "engine" in record.artifacts:
            sidecar = record.artifacts["engine"].sidecar
            if sidecar.get("profile") and set(sidecar["profile"]) <= {spec.name for spec in inputs}:
                whole = profile_from_sidecar(sidecar)  # what has no profiles of its own takes all that they take
                return {each: ShapeRange(item.smallest, item.best, item.largest) for each, item in whole.items()}
    batches = run.manifest.get("config", {}).get("build", {}).get("profile")
    if not batches:
        raise RunDirError(f"{run.path} says nowhere which shapes are served.", hint="build an engine of it first")
    return {
        spec.name: ShapeRange(*((size, *spec.shape[1:]) for size in batches))
        for spec in inputs
        if spec.shape and not isinstance(spec.shape[0], int) and all(isinstance(axis, int) for axis in spec.shape[1:])
    }


def judge_of(run: RunDir, *, allow_failed: bool) -> Callable[[str], Judgement]:
    """Decide a run's gates again from its evidence; the answer says of an engine, or of `onnx`, what they said.

    Raises:
        NotComparableError: the evidence is not what the run recorded; with `allow_failed`, everything is unvalidated instead.
    """
    from mpdeploy.config import Gate
    from mpdeploy.gates.evidence import Evidence
    from mpdeploy.gates.gate import decide
    from mpdeploy.gates.provenance import check_provenance

    record = run.record("50-validate")
    if record is None or record.status != "done":
        never = Judgement("unvalidated", ("the run was never validated: it has no finished 50-validate",))
        return lambda name: never
    try:
        evidence = Evidence.load(run.path / "evidence")
        check_provenance(evidence, run)
    except NotComparableError as error:
        if not allow_failed:
            raise
        changed = Judgement("unvalidated", (error.message,))
        return lambda name: changed
    verdicts = decide([Gate(**item) for item in run.manifest.get("gates", [])], evidence)

    def judge(name: str) -> Judgement:
        place = evidence.places.get(place_of(name))
        measured = place is not None and place.status == "measured"
        return (
            judge_exported(verdicts, measured=measured)
            if name == ONNX
            else judge_engine(verdicts, name, measured=measured)
        )

    return judge


def judge_exported(verdicts: Sequence[Verdict], *, measured: bool) -> Judgement:
    """What the gates say of the exported FP32 model: the worst of its own place and of the training's parity."""
    counted = [item for item in verdicts if not item.advisory and item.at in UPSTREAM]
    for wanted in ("fail", "unvalidated", "inconclusive"):
        if found := tuple(item.message for item in counted if item.verdict == wanted):
            return Judgement(wanted, found)
        if wanted == "fail" and not (measured and any(item.at == ONNX for item in counted)):
            return Judgement("unvalidated", (f"no gate of this run was decided on `{ONNX}`",))
    return Judgement("pass")


def place_of(name: str) -> str:
    """Where the evidence of an engine, or of `onnx`, stands."""
    return ONNX if name == ONNX else f"engine/{name}"
