"""Which engine of a run may be served here: one that passed its gates, is the recorded file, and runs on this machine.

Order: the engine that was measured to be the fastest of those that passed (`chosen_engine` in run.json), then the rows of the engine
table from the top (tensorrt, tensorrt-rtx, openvino, onnxruntime). An engine that cannot be served gives way to the next one, and says why.

The gates are decided again from the evidence: a gate.json that says something else, or evidence of other files, is refused.
An engine's verdict is the worst of its own place and of what it was made from: `parity` (the training) and `onnx` (the export).
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mpdeploy.artifact import Engine, OnnxModel
from mpdeploy.engines import ENGINES, backend
from mpdeploy.errors import (
    ArtifactChangedError,
    GateFailedError,
    MpdeployError,
    NotComparableError,
    UnavailableError,
    UsageError,
    closest_names,
)
from mpdeploy.run_dir import RunDir

UPSTREAM = ("parity", "onnx")
BUILD = "40-build/"
REFUSED = ("fail", "unvalidated")


@dataclass(frozen=True)
class Judgement:
    """What the gates say of an engine: the worst verdict, and the sentences behind it where it is no pass."""

    verdict: str
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """An engine that may be served, as far as records can tell; its file's digest is checked by `opened`."""

    name: str
    engine: Engine
    judgement: Judgement
    warnings: tuple[str, ...] = ()

    def opened(self) -> Engine:
        """The engine, its digest checked.

        Raises:
            ArtifactChangedError: the file is not the one that was recorded.
        """
        return self.engine.verified()


class UnknownEngineError(UsageError):
    """The run has no engine of the name that was asked for."""


@dataclass
class Selection:
    """A run's engines in the order they are tried.

    Attributes:
        run: opened for reading.
        candidates: best first.
        refused: engine -> why it is not served.
        model: the exported FP32 model, if the run has one.
        golden: the golden samples, if the run has them.
    """

    run: RunDir
    candidates: tuple[Candidate, ...]
    refused: dict[str, MpdeployError] = field(default_factory=dict)
    model: OnnxModel | None = None
    golden: Path | None = None

    def refuse(self, name: str, error: MpdeployError) -> None:
        """Note why an engine was not served."""
        self.refused[name] = error

    def nothing_left(self) -> MpdeployError:
        """The error for a run of which nothing can be served here, with the reason of every engine."""
        reasons = list(self.refused.items())
        if len(reasons) == 1:
            name, error = reasons[0]
            return type(error)(f"{name} of {self.run.path} is not served: {error.message}", hint=error.hint)
        text = "\n".join(f"  {name}: {error.message}" for name, error in reasons) or "  no engine was built"
        kinds = {type(error) for error in self.refused.values()}
        kind = next(
            (each for each in (GateFailedError, ArtifactChangedError, UnavailableError) if each in kinds),
            UnavailableError,
        )
        hints = {
            GateFailedError: "mpdeploy gate RUN says more; --allow-failed serves it all the same",
            ArtifactChangedError: "put the recorded file back, or build it again with --from 40-build",
        }
        return kind(
            f"No engine of {self.run.path} can be served here:\n{text}",
            hint=hints.get(kind, "mpdeploy doctor says what this machine has"),
        )


def select(path: Path, *, engine: str | None = None, allow_failed: bool = False) -> Selection:
    """A run's engines that may be served here, best first.

    Args:
        path: the run directory.
        engine: this one and no other.
        allow_failed: serve what failed its gates or was never validated, with a warning.

    Raises:
        RunDirError: no run directory.
        UnknownEngineError: the run has no engine of that name.
        NotComparableError: gate.json or the evidence is not what the run recorded.
        MpdeployError: nothing can be served (see `Selection.nothing_left`).
    """
    run = RunDir.open(path)
    selection = Selection(run, (), model=_exported(run), golden=_golden(run))
    judgements = _judgements(run, allow_failed=allow_failed)
    candidates = []
    for name in _in_order(run, engine):
        try:
            candidates.append(_candidate(run, name, judgements, allow_failed=allow_failed))
        except MpdeployError as error:
            selection.refuse(name, error)
    selection.candidates = tuple(candidates)
    if not candidates:
        raise selection.nothing_left()
    return selection


def judge(verdicts: Sequence[Any], name: str, *, measured: bool) -> Judgement:
    """What verdicts (`mpdeploy.gates.Verdict`) say of an engine.

    Args:
        verdicts: all of the run.
        name: of the engine.
        measured: whether the evidence holds numbers of the engine itself.
    """
    place = f"engine/{name}"
    counted = [
        item
        for item in verdicts
        if not item.advisory and (item.at in (place, *UPSTREAM) or (item.at and fnmatch.fnmatchcase(place, item.at)))
    ]
    by_verdict = {
        wanted: tuple(item.message for item in counted if item.verdict == wanted)
        for wanted in ("fail", "unvalidated", "inconclusive")
    }
    if (not measured and not by_verdict["unvalidated"]) or not any(item.at == place for item in counted):
        by_verdict["unvalidated"] += (f"no gate of this run was decided on `{place}`",)
    return next((Judgement(wanted, found) for wanted, found in by_verdict.items() if found), Judgement("pass"))


def _judgements(run: RunDir, *, allow_failed: bool) -> Mapping[str, Judgement]:
    """Engine -> judgement, decided again from the evidence."""
    from mpdeploy.config import Gate
    from mpdeploy.gates.evidence import Evidence
    from mpdeploy.gates.gate import decide
    from mpdeploy.gates.provenance import check_provenance

    validated = run.record("50-validate")
    if validated is None or validated.status != "done":
        why = "the run was never validated: it has no finished 50-validate"
        return {name: Judgement("unvalidated", (why,)) for name in ENGINES}
    try:
        evidence = Evidence.load(run.path / "evidence")
        check_provenance(evidence, run)
        verdicts = decide([Gate(**item) for item in run.manifest.get("gates", [])], evidence)
        _check_gate_json(run.path / "gate.json", verdicts)
    except NotComparableError as error:
        if not allow_failed:
            raise
        return {name: Judgement("unvalidated", (error.message,)) for name in ENGINES}
    return {
        name: judge(
            verdicts,
            name,
            measured=(place := evidence.places.get(f"engine/{name}")) is not None and place.status == "measured",
        )
        for name in ENGINES
    }


def _check_gate_json(path: Path, verdicts: Sequence[Any]) -> None:
    """gate.json must say what the evidence says."""
    try:
        written = {
            (item["id"], item["at"], item["slice"], item["verdict"])
            for item in json.loads(path.read_text(encoding="utf-8"))["verdicts"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotComparableError(
            f"{path} cannot be read: {error}.", hint="mpdeploy gate RUN writes it from the evidence"
        ) from error
    decided = {(item.id, item.at, item.slice, item.verdict) for item in verdicts}
    if written != decided:
        gate, at, _, verdict = sorted(written ^ decided)[0]
        raise NotComparableError(
            f"{path} does not say what the evidence says: gate {gate} on `{at}` ({verdict}) is in one of the two alone.",
            hint="mpdeploy gate RUN writes it from the evidence",
        )


def _in_order(run: RunDir, asked: str | None) -> Iterator[str]:
    built = [name.removeprefix(BUILD) for name in run.records() if name.startswith(BUILD)]
    if asked is not None:
        if asked not in built:
            raise UnknownEngineError(
                f"{run.path} has no engine '{asked}'.",
                hint=f"its engines: {', '.join(built) or 'none'}; closest names: {closest_names(asked, built or ENGINES)}",
            )
        yield asked
        return
    chosen = run.manifest.get("chosen_engine")
    if chosen in built:
        yield str(chosen)
    yield from (name for name in ENGINES if name in built and name != chosen)


def _candidate(run: RunDir, name: str, judgements: Mapping[str, Judgement], *, allow_failed: bool) -> Candidate:
    record = run.record(BUILD + name)
    if record is None or record.status != "done" or not isinstance(engine := record.artifacts.get("engine"), Engine):
        message = record.message if record is not None and record.message else "it was not built"
        raise UnavailableError(message, hint=record.hint if record is not None else None)
    judgement = judgements[name]
    warnings: tuple[str, ...] = ()
    if judgement.verdict in REFUSED:
        what = f"its verdict is {judgement.verdict}: {_in_short(judgement.messages)}"
        if not allow_failed:
            raise GateFailedError(what, hint="mpdeploy gate RUN says more; --allow-failed serves it all the same")
        warnings = (f"{what} (served all the same, as --allow-failed says)",)
    elif judgement.verdict == "inconclusive":
        warnings = (f"its verdict is inconclusive: {_in_short(judgement.messages)}",)
    row = backend(name)
    missing = row.available() or row.can_run()
    if missing is not None:
        raise UnavailableError(f"it cannot run here: {missing.reason}", hint=missing.hint)
    return Candidate(name, replace(engine, sidecar=dict(engine.sidecar)), judgement, warnings)


def _in_short(messages: Sequence[str]) -> str:
    more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
    return f"{messages[0].rstrip('.')}{more}"


def _exported(run: RunDir) -> OnnxModel | None:
    record = run.record("20-export")
    model = record.artifacts.get("model") if record is not None and record.status == "done" else None
    return model if isinstance(model, OnnxModel) and model.path.is_file() else None


def _golden(run: RunDir) -> Path | None:
    record = run.record("20-export")
    golden = record.artifacts.get("golden") if record is not None and record.status == "done" else None
    return golden.path if golden is not None and golden.path.is_file() else None
