"""The main job: run a pipeline's stages, decide its gates, write the reports. And deciding alone, from evidence."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mpdeploy import distributed
from mpdeploy.config import Gate, Pipeline
from mpdeploy.environment import fingerprint
from mpdeploy.errors import (
    GateFailedError,
    InconclusiveError,
    MpdeployError,
    NotComparableError,
    StageFailedError,
    UnavailableError,
)
from mpdeploy.files import finite_json, sha256_of_file, write_json, write_text
from mpdeploy.gates.evidence import INDEX, Evidence
from mpdeploy.gates.gate import decide, gate_json
from mpdeploy.gates.provenance import check_provenance
from mpdeploy.gates.verdict import Verdict
from mpdeploy.pipeline import Context, Listener, RunSummary, Silent, run_stages, termination_raises
from mpdeploy.report.writing import write_reports
from mpdeploy.run_dir import RunDir

VALIDATE = "50-validate"


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        path: the run directory.
        gate: gate.json, or None where the run stopped before validation.
        verdicts: what the gates said.
        chosen: the fastest engine that was measured here and failed no gate, or None.
        cached: stages that were skipped.
        failures: engines that could not be built, with their errors.
    """

    path: Path
    gate: Mapping[str, Any] | None
    verdicts: Sequence[Verdict]
    chosen: str | None
    cached: Sequence[str]
    failures: Mapping[str, MpdeployError]

    @property
    def verdict(self) -> str | None:
        """The run's: pass, fail, inconclusive or unvalidated."""
        return None if self.gate is None else str(self.gate["verdict"])

    def error(self, *, strict: bool = False) -> MpdeployError | None:
        """What the run's exit code comes from, or None where it passed."""
        if self.failures:
            names = ", ".join(self.failures)
            first = next(iter(self.failures.values()))
            kind = (
                UnavailableError
                if all(isinstance(e, UnavailableError) for e in self.failures.values())
                else StageFailedError
            )
            return kind(f"{names} could not be built: {first.message}", hint=first.hint)
        return error_of(self.verdict, self.verdicts, self.path, strict=strict)


def error_of(
    verdict: str | None, verdicts: Sequence[Verdict], path: Path, *, strict: bool = False
) -> GateFailedError | InconclusiveError | None:
    """The error for a verdict that must not pass silently."""
    if verdict == "fail":
        failed = [item.message for item in verdicts if item.verdict == "fail" and not item.advisory]
        return GateFailedError(
            f"{len(failed)} gate{'s' if len(failed) != 1 else ''} failed:\n"
            + "\n".join(f"  {line}" for line in failed),
            hint=f"the evidence is in {path}; mpdeploy report {path} draws it",
        )
    if strict and verdict in ("inconclusive", "unvalidated"):
        open_ones = [item.message for item in verdicts if item.verdict == verdict and not item.advisory]
        return InconclusiveError(
            "Not decided, and --strict was given:\n" + "\n".join(f"  {line}" for line in open_ones),
            hint="give the gate more samples, or run it where the engine can run",
        )
    return None


def run(
    pipeline: Pipeline,
    path: Path | None = None,
    *,
    engines: Sequence[str] = (),
    start: str | None = None,
    until: str | None = None,
    listener: Listener | None = None,
) -> RunResult:
    """Take a pipeline from training to gated engines, in a run directory that can be resumed.

    Under torchrun, ranks other than 0 train along and then end with 0 (see `follow`).

    Args:
        pipeline: what to do.
        path: the run directory; `runs/NAME` where None.
        engines: rows of the engine table to build; the config's, else all that are there, where empty.
        start: run this stage and those after it again; those before are taken as they are.
        until: stop after this stage.
        listener: is told what happens.

    Raises:
        MpdeployError: see `errors`. A failed gate does not raise: see `RunResult.error`.
    """
    from mpdeploy.engines import ENGINES, backend
    from mpdeploy.stages import stages_of
    from mpdeploy.stages.together import others_let_go

    if distributed.rank() != 0:
        follow(pipeline)
    listener = listener or Silent()
    if engines:
        pipeline = pipeline.model_copy(update={"build": pipeline.build.model_copy(update={"engines": tuple(engines)})})
    for name in pipeline.build.engines:  # before anything is trained: a missing engine that was asked for is an error
        missing = backend(name).available()
        if missing is not None:
            raise UnavailableError(f"The engine '{name}' was asked for: {missing.reason}", hint=missing.hint)
    for name, options in pipeline.build.options.items():
        if backend(name).available() is None:
            backend(name).check_options(options)
    chosen_engines = list(pipeline.build.engines or ENGINES)
    stages = stages_of(pipeline, chosen_engines)
    with (
        termination_raises(),
        others_let_go(listener) as listener,
        RunDir.create(path or Path("runs") / pipeline.name) as directory,
    ):
        directory.set_header(
            pipeline=pipeline.name,
            config=finite_json(pipeline.to_json()),
            gates=[gate.to_json() for gate in pipeline.gates],
            environment=fingerprint(),
        )
        for name in list(directory.records()):
            if name.startswith("40-build/") and name.split("/", 1)[1] not in chosen_engines:
                directory.drop(name)  # an engine that is no longer part of the run is not measured with it
        context = Context(directory, pipeline, listener)
        for line in power_of_gates(pipeline, directory):
            listener.message(line)
        summary = run_stages(stages, context, start=start, until=until)
        if until is not None and not _reached(until):
            return RunResult(directory.path, None, (), None, summary.cached, summary.failures)
        gate, verdicts = decide_run(directory, pipeline.gates)
        chosen = choose_engine(gate, verdicts)
        directory.set_header(chosen_engine=chosen)
        write_reports(directory, gate)
        return _result(directory, gate, verdicts, chosen, summary)


def follow(pipeline: Pipeline) -> NoReturn:
    """Ranks other than 0: train along where rank 0 trains, then end the process with 0: what gates say is rank 0's exit code alone."""
    from mpdeploy.stages.together import train_along

    train_along(pipeline)
    sys.exit(0)


def power_of_gates(pipeline: Pipeline, directory: RunDir) -> list[str]:
    """What each gate on a paired 0/1 metric can decide with the gate's samples, said before anything runs.

    Empty where the number of samples is not known yet: an earlier try records it, else the data is asked for it.
    """
    from mpdeploy.measure.accuracy import METRICS
    from mpdeploy.measure.power import power_sentence

    metric = pipeline.validation.metric
    margins = [gate for gate in pipeline.gates if gate.metric == "score_drop" and gate.slice is None and gate.limit > 0]
    if not margins or not isinstance(metric, str) or metric not in METRICS or not METRICS[metric].is_binary:
        return []
    count = _num_gate_samples(pipeline, directory)
    return [] if count is None else [f"gate {gate.id}: {power_sentence(count, gate.limit)}" for gate in margins]


def _num_gate_samples(pipeline: Pipeline, directory: RunDir) -> int | None:
    trained = directory.record("10-train")
    if trained is not None and trained.status == "done":
        return int(trained.report["splits"]["gate"])
    from mpdeploy.stages.common import load_splits

    try:
        return len(load_splits(pipeline).gate)
    except MpdeployError:
        return None  # the stage that needs the data says what is wrong with it


def _reached(until: str) -> bool:
    return until.startswith(VALIDATE)


def _result(
    directory: RunDir, gate: Mapping[str, Any], verdicts: Sequence[Verdict], chosen: str | None, summary: RunSummary
) -> RunResult:
    return RunResult(directory.path, gate, verdicts, chosen, summary.cached, summary.failures)


def decide_run(directory: RunDir, gates: Sequence[Gate]) -> tuple[dict[str, Any], list[Verdict]]:
    """Decide from a run's evidence alone, and return gate.json's content.

    Raises:
        NotComparableError: no evidence, or it is not what the manifest recorded.
    """
    record = directory.record(VALIDATE)
    index = directory.path / "evidence" / INDEX
    if record is None or record.status != "done":
        raise NotComparableError(
            f"{directory.path} has no finished {VALIDATE}: there is no evidence to decide from.",
            hint=f"mpdeploy train-and-export PIPELINE --run {directory.path}",
        )
    recorded = record.artifacts["evidence"].sha256
    found = sha256_of_file(index) if index.is_file() else "missing"
    if found != recorded:
        raise NotComparableError(
            f"The evidence in {index.parent} is not what the run recorded: sha256 {found[:12]}, recorded was {recorded[:12]}.",
            hint="restore it, or measure again with --from 50-validate",
        )
    evidence = Evidence.load(index.parent)
    check_provenance(evidence, directory)
    verdicts = decide(gates, evidence)
    return gate_json(verdicts, evidence, str(directory.manifest.get("pipeline", "")), gates), verdicts


def gate(path: Path, *, baseline: Path | None = None) -> tuple[dict[str, Any], list[Verdict]]:
    """Decide a run's gates again from `evidence/` and `run.json` alone: no model, no engine, no GPU. Writes gate.json.

    Args:
        path: the run directory.
        baseline: also compare with this file of promoted numbers; those verdicts are added to what is returned, and gate.json
            is not written: it holds the run's own gates only.

    Raises:
        RunDirError: no run directory.
        NotComparableError: evidence that does not match its digests, or no baseline that can be compared with.
    """
    from mpdeploy.gates.verdict import overall

    directory = RunDir.open(path)
    gates = tuple(Gate(**item) for item in directory.manifest.get("gates", []))
    value, verdicts = decide_run(directory, gates)
    if baseline is None:
        write_json(path / "gate.json", value)
        return value, verdicts
    from mpdeploy.gates.baseline import compare

    verdicts += compare(Evidence.load(path / "evidence"), baseline)
    return value | {"verdict": overall(verdicts), "verdicts": [item.to_json() for item in verdicts]}, verdicts


def report(path: Path) -> list[Path]:
    """Decide a run from its evidence and write its reports; returns their paths."""
    directory = RunDir.open(path)
    gates = tuple(Gate(**item) for item in directory.manifest.get("gates", []))
    value, _ = decide_run(directory, gates)
    return write_reports(directory, value)


def report_pair(before: Path, after: Path) -> Path:
    """Decide two runs from their evidence and write one page that compares them, into the second; returns its path."""
    from mpdeploy.report.pair import render_pair

    first, second = RunDir.open(before), RunDir.open(after)

    def value(run: RunDir) -> dict[str, Any]:
        return decide_run(run, tuple(Gate(**item) for item in run.manifest.get("gates", [])))[0]

    path = after / f"compared-with-{before.resolve().name}.html"
    write_text(path, render_pair(first, second, value(first), value(second)))
    return path


def result_json(result: RunResult) -> dict[str, Any]:
    """What `train-and-export --json` prints: the table of places, the verdicts, what was skipped and what failed."""
    directory = RunDir.open(result.path)
    records = directory.records()
    gate_value = result.gate or {}
    rows = [_row(at, place, records, result.verdicts) for at, place in gate_value.get("places", {}).items()]
    rows += [
        {"stage": name, "artifact": name.split("/", 1)[1], "bytes": None, "rel_l2": None, "score": None, "score_change_pt": None,
         "median_ms": None, "verdict": record.status, "message": record.message, "hint": record.hint}
        for name, record in records.items()
        if name.startswith("40-build/") and record.status != "done"
    ]  # fmt: skip
    return {
        "run": str(result.path),
        "verdict": result.verdict,
        "chosen_engine": result.chosen,
        "unvalidated": list(gate_value.get("unvalidated", [])),
        "table": rows,
        "verdicts": [item.to_json() for item in result.verdicts],
        "stages": {
            name: {
                "status": record.status, "cached": name in result.cached, "seconds": record.seconds, "message": record.message,
                "hint": record.hint,
            }
            for name, record in records.items()
        },
        "failures": {name: str(error) for name, error in result.failures.items()},
    }  # fmt: skip


def _row(at: str, place: Mapping[str, Any], records: Mapping[str, Any], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    severity = ["pass", "unvalidated", "inconclusive", "fail"]
    here = [item.verdict for item in verdicts if item.at == at and not item.advisory]
    change = next(
        (
            item
            for item in verdicts
            if item.at == at and item.metric == "score_drop" and item.interval and not item.slice
        ),
        None,
    )
    drifts = [drift["rel_l2"] for drift in (place.get("drift") or {}).values()]
    size = place["facts"].get("size_bytes")
    if size is None and place["stage"] in records:
        model = records[place["stage"]].artifacts.get("model")
        size = model.path.stat().st_size if model is not None and model.path.exists() else None
    latency = place.get("latency") or {}
    return {
        "stage": place["stage"].split("/")[0],
        "artifact": at.removeprefix("engine/"),
        "bytes": size,
        "rel_l2": max(drifts, key=float) if drifts else None,
        "score": (place.get("scores") or {}).get("mean"),
        "score_change_pt": None
        if change is None or change.interval is None or change.measured is None
        else {
            "measured": 0.0 - 100 * change.measured,
            "low": -100 * change.interval[1],
            "high": -100 * change.interval[0],
        },
        "median_ms": latency.get("median_ms"),
        "verdict": max(here, key=severity.index) if here else None,
    }


def choose_engine(gate_value: Mapping[str, Any], verdicts: Sequence[Verdict]) -> str | None:
    """The engine with the smallest median latency among those measured here that failed no gate."""
    failed = {item.at for item in verdicts if item.verdict == "fail" and not item.advisory}
    medians = {
        at: place["latency"]["median_ms"]
        for at, place in gate_value.get("places", {}).items()
        if at.startswith("engine/") and place["status"] == "measured" and at not in failed and place.get("latency")
    }
    return min(medians, key=lambda at: float(medians[at])).split("/", 1)[1] if medians else None
