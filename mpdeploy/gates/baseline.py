"""A baseline: a small file, committed with the code, of what a promoted run measured on each hardware.

    {"schema": 1, "harness": 1, "entries": {"NVIDIA L4": {"engine/tensorrt": {"scores": ..., ...}}}}

Only `promote` ever writes it. Scores are kept per sample (packed: 50,000 scores of 0 or 1 are 8 kB), so that a later
run is compared pair by pair, as with FP32; so are its slices and its corpus metric's resamples. The promoted run's gates on
scores stand in the file too: a later run is held to these limits, whatever its own pipeline says.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, digest_of_arrays
from mpdeploy.config import Gate
from mpdeploy.environment import hardware_key
from mpdeploy.errors import GateFailedError, NotComparableError, UsageError
from mpdeploy.files import write_json
from mpdeploy.gates.evidence import HARNESS_VERSION, SLICE, Evidence, Place
from mpdeploy.gates.gate import decide
from mpdeploy.gates.metrics import METRICS
from mpdeploy.gates.packing import packed, unpacked
from mpdeploy.gates.verdict import Verdict
from mpdeploy.run_dir import RunDir

SCHEMA_VERSION = 1
BASELINE_GATES: tuple[Gate, ...] = (
    Gate(id="baseline-accuracy", metric="score_drop", limit=0.02),
    Gate(id="baseline-corpus", metric="corpus_drop", limit=0.02),
    Gate(id="baseline-latency", metric="latency_ratio", limit=1.1, advisory=True),
    Gate(id="baseline-size", metric="size_ratio", limit=1.1),
)
"""What a run is held to against its baseline, beside the promoted run's own gates on scores (see `gates_of`).

Latency is advisory: the two sides were not measured in turns, so what else the machine did is part of the ratio."""
SLICE_LIMIT = 0.05
"""A slice that the promoted run had no gate on fails where it is shown to have dropped by more than this."""
_COMPARED = ("score_drop", "relative_score_drop", "corpus_drop", "flips")
_CORPUS_FACTS = ("corpus_value", "corpus_num_units", "corpus_num_samples", "corpus_worth_largest",
                 "corpus_worth_typical", "corpus_is_smooth")  # fmt: skip

_PROMOTE = "mpdeploy baseline promote RUN --reason TEXT writes one"


def promote(run_dir: RunDir, path: Path, reason: str) -> dict[str, Any]:
    """Write what a run measured of its engines into the baseline file; entries of other hardware and engines stay.

    Returns:
        What the file now holds of this hardware: place -> entry.

    Raises:
        UsageError: no reason was given.
        GateFailedError: the run failed its gates.
        NotComparableError: the run has no evidence or no gate.json, or the file is from another harness.
    """
    if not reason.strip():
        raise UsageError("A baseline needs a reason.", hint="--reason 'why these numbers are the ones to keep'")
    evidence = Evidence.load(run_dir.path / "evidence")
    _check_verdict(run_dir.path)
    hardware = _hardware_of(evidence)
    declared = [Gate(**item) for item in run_dir.manifest.get("gates", [])]
    entries = {
        at: _entry_of(place, evidence, reason.strip(), run_dir.path.name)
        | {"gates": [gate.to_json() for gate in declared if _concerns(gate, place)]}
        for at, place in evidence.places.items()
        if place.status == "measured" and at.startswith("engine/")
    }
    if not entries:
        raise NotComparableError(
            f"{run_dir.path} measured no engine: there is nothing to promote.", hint="run 40-build first"
        )
    held: dict[str, Any] = {"schema": SCHEMA_VERSION, "harness": HARNESS_VERSION, "entries": {}}
    if path.exists():
        held = _read(path)
    held["entries"][hardware] = {**held["entries"].get(hardware, {}), **entries}
    write_json(path, held)
    return dict(held["entries"][hardware])


def compare(evidence: Evidence, path: Path, gates: Iterable[Gate] | None = None) -> list[Verdict]:
    """Verdicts of this run's engines against the baseline of the same hardware.

    Args:
        evidence: of the run.
        path: the baseline file.
        gates: what to decide; where None, what `gates_of` says of each entry.

    Raises:
        NotComparableError: no file, none for this hardware or any of these engines, or measured by another harness, on
            other samples, or of nothing that the gates ask for.
    """
    if not path.is_file():
        raise NotComparableError(f"There is no baseline file {path}.", hint=_PROMOTE)
    held = _read(path)
    hardware = _hardware_of(evidence)
    entries: Mapping[str, Any] = held["entries"].get(hardware, {})
    if not entries:
        raise NotComparableError(
            f"{path} holds no baseline of '{hardware}', only of {', '.join(held['entries']) or 'nothing'}: "
            "numbers from other hardware cannot be compared.",
            hint=_PROMOTE,
        )
    measured = {at: place for at, place in evidence.places.items() if at in entries and place.status == "measured"}
    if not measured:
        raise NotComparableError(
            f"{path} holds {', '.join(entries)} of '{hardware}', and this run measured none of them.", hint=_PROMOTE
        )
    verdicts: list[Verdict] = []
    for at, place in measured.items():
        compared = _against(place, entries[at], evidence, path)
        wanted = gates_of(entries[at], at) if gates is None else list(gates)
        # A gate on what neither side has (scores, without labels) does not concern them; what one side lacks fails.
        wanted = [gate for gate in wanted if METRICS[gate.metric].find(compared, gate.limit) is not None]
        verdicts += decide(wanted, Evidence({at: compared}, evidence.digests, evidence.environment))
    if not verdicts:
        raise NotComparableError(f"{path} and this run have no number in common that a gate asks for.", hint=_PROMOTE)
    # Of a slice that nobody put a gate on, only what is shown counts: a small one would leave every run inconclusive.
    return [
        replace(
            verdict,
            id=verdict.id if verdict.id.startswith("baseline") else f"baseline-{verdict.id}",
            advisory=verdict.advisory or (verdict.id == _WATCH and verdict.verdict == "inconclusive"),
        )
        for verdict in verdicts
    ]


_WATCH = "baseline-slice"


def gates_of(entry: Mapping[str, Any], at: str) -> list[Gate]:
    """What an engine is held to against its entry.

    The promoted run's own gates on scores, with its own limits, so that a later run cannot loosen them; `BASELINE_GATES`
    for what it had none on; and `SLICE_LIMIT` for each of its slices that no gate names.
    """
    own = [Gate(**item).model_copy(update={"at": at}) for item in entry.get("gates", ())]
    whole = {gate.metric for gate in own if gate.slice is None}
    others = [
        gate
        for gate in BASELINE_GATES
        if gate.metric not in whole and not (gate.metric == "score_drop" and "relative_score_drop" in whole)
    ]
    named = [gate.slice for gate in own if gate.slice is not None]
    slices = [
        Gate(id=_WATCH, metric="score_drop", limit=SLICE_LIMIT, slice=glob.escape(str(name)))
        for name in entry.get("slices", ())
        if not any(fnmatch.fnmatchcase(str(name), pattern) for pattern in named)
    ]
    return [*own, *others, *slices]


def _concerns(gate: Gate, place: Place) -> bool:
    """Whether a run's gate is one that later runs of this engine are held to as well."""
    return (
        gate.metric in _COMPARED
        and fnmatch.fnmatchcase(place.at, gate.at)
        and gate.precision in (None, place.precision)
    )


def _check_verdict(run: Path) -> None:
    try:
        verdict = json.loads((run / "gate.json").read_text(encoding="utf-8"))["verdict"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotComparableError(f"{run} holds no readable gate.json: {error}.", hint=f"mpdeploy gate {run}") from error
    if verdict not in ("pass", "inconclusive"):
        raise GateFailedError(
            f"{run} has the verdict '{verdict}': it cannot be a baseline.", hint="promote a run that passed its gates"
        )


def _hardware_of(evidence: Evidence) -> str:
    try:
        return hardware_key(dict(evidence.environment))
    except (KeyError, TypeError) as error:
        raise NotComparableError(
            f"The evidence does not say which hardware it was measured on ({error}).",
            hint="measure again with --from 50-validate",
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema, harness = held["schema"], held["harness"]
        for engines in held["entries"].values():
            for entry in engines.values():
                dict(entry["digests"])
                gates_of(entry, "*")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotComparableError(
            f"The baseline file {path} cannot be read: {error}.", hint="restore it from git"
        ) from error
    if schema != SCHEMA_VERSION or harness != HARNESS_VERSION:
        raise NotComparableError(
            f"{path} was measured by harness {harness} (schema {schema}); "
            f"this one is {HARNESS_VERSION} ({SCHEMA_VERSION}).",
            hint="remove the file and promote a run of this version",
        )
    return held


def _entry_of(place: Place, evidence: Evidence, reason: str, run: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "reason": reason,
        "promoted": time.strftime("%Y-%m-%d", time.gmtime()),
        "run": run,
        "precision": place.precision,
        "metric": place.notes.get("metric"),
        "digests": {**evidence.digests, **place.digests},
        "versions": evidence.environment.get("packages", {}),
    }
    if "ids" in place.arrays:
        entry["ids_sha256"] = digest_of_arrays({"ids": place.arrays["ids"]})
    for name, array in (("scores", "scores"), ("predictions", "predictions"), ("latency_ms", "latency_b_ms")):
        if array in place.arrays:
            entry[name] = packed(place.arrays[array])
    if "latency_b_ms" in place.arrays:
        entry["median_ms"] = float(np.median(place.arrays["latency_b_ms"]))
        entry["latency_block_size"] = place.facts.get("latency_block_size")
        entry["latency_includes"] = place.facts.get("latency_includes_b")
    if "scores" in place.arrays:
        entry["mean_score"] = float(np.mean(place.arrays["scores"]))
    if "size_bytes" in place.facts:
        entry["size_bytes"] = place.facts["size_bytes"]
    if place.slices:
        entry["slices"] = place.slices
    if "corpus_draws" in place.arrays:
        entry["corpus"] = {
            "metric": place.notes.get("corpus_metric"),
            **{name: place.facts.get(name) for name in _CORPUS_FACTS},
            **{name: packed(place.arrays[name]) for name in ("corpus_draws", "corpus_left_out")},
        }
    return entry


def _against(place: Place, entry: Mapping[str, Any], evidence: Evidence, path: Path) -> Place:
    """The place of this run, with the baseline file's numbers where FP32's were."""
    kept = ("ids", "scores", "predictions", "clusters", *(name for name in place.arrays if name.startswith(SLICE)))
    arrays = {name: place.arrays[name] for name in kept if name in place.arrays}
    dataset, held = evidence.digests.get("dataset"), entry["digests"].get("dataset")
    ids = digest_of_arrays({"ids": arrays["ids"]}) if "ids" in arrays else None
    if dataset != held or ids != entry.get("ids_sha256"):
        raise NotComparableError(
            f"The baseline of `{place.at}` in {path} was measured on other samples or labels: dataset "
            f"{str(held)[:12]}, this run's is {str(dataset)[:12]}.",
            hint="promote a run on these samples",
        )
    if entry.get("metric") != place.notes.get("metric"):
        raise NotComparableError(
            f"The baseline of `{place.at}` in {path} was scored by '{entry.get('metric')}', this run by "
            f"'{place.notes.get('metric')}'.",
            hint="promote a run with this metric",
        )
    for name in ("scores", "predictions"):
        if name in entry:
            arrays[f"baseline_{name}"] = unpacked(entry[name], path)
    facts = {name: place.facts[name] for name in ("size_bytes",) if name in place.facts}
    _add_corpus(arrays, facts, place, entry.get("corpus"), path)
    if "size_bytes" in entry:
        facts["baseline_size_bytes"] = entry["size_bytes"]
    if "latency_ms" in entry:
        arrays["latency_a_ms"] = unpacked(entry["latency_ms"], path)
    if "latency_ms" in entry and "latency_b_ms" in place.arrays:
        before, now = arrays["latency_a_ms"], place.arrays["latency_b_ms"]
        block_size = int(place.facts.get("latency_block_size") or 1)
        length = min(len(before), len(now)) // block_size * block_size
        arrays |= {"latency_a_ms": before[:length], "latency_b_ms": now[:length]}
        facts |= {
            "latency_block_size": block_size,
            "latency_includes_a": entry.get("latency_includes"),
            "latency_includes_b": place.facts.get("latency_includes_b"),
        }
    return replace(place, baseline=f"baseline {path.name}", facts=facts, arrays=arrays)


def _add_corpus(arrays: dict[str, Array], facts: dict[str, Any], place: Place, held: Any, path: Path) -> None:
    """The corpus metric here and in the baseline file, as arrays and facts; what one side lacks is left out and fails.

    Raises:
        NotComparableError: it is another metric, or its resamples are not of the same units.
    """
    names = ("corpus_draws", "corpus_left_out")
    arrays |= {name: place.arrays[name] for name in names if name in place.arrays}
    facts |= {name: place.facts[name] for name in _CORPUS_FACTS if name in place.facts}
    if held is None:
        if "corpus_draws" in arrays:  # a metric that is new has nothing to be compared with
            for name in names:
                arrays.pop(name, None)
            for name in _CORPUS_FACTS:
                facts.pop(name, None)
        return
    arrays |= {f"baseline_{name}": unpacked(held[name], path) for name in names}
    facts["baseline_corpus_value"] = held["corpus_value"]
    if "corpus_draws" not in arrays:
        return
    here = (place.notes.get("corpus_metric"), facts.get("corpus_num_units"), len(arrays["corpus_draws"]))
    there = (held["metric"], held["corpus_num_units"], len(arrays["baseline_corpus_draws"]))
    if here != there:
        raise NotComparableError(
            f"The corpus metric of `{place.at}` in {path} is '{there[0]}' of {there[1]:,} samples or clusters with "
            f"{there[2]:,} resamples; this run's is '{here[0]}' of {here[1]:,} with {here[2]:,}.",
            hint="promote a run with this metric",
        )
    for name in ("corpus_worth_largest", "corpus_worth_typical"):
        facts[name] = max(float(facts[name]), float(held[name]))
    facts["corpus_is_smooth"] = facts["corpus_is_smooth"] is True and held["corpus_is_smooth"] is True
