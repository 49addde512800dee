"""A baseline: a small file, committed with the code, of what a promoted run measured on each hardware.

    {"schema": 1, "harness": 1, "entries": {"NVIDIA L4": {"engine/tensorrt": {"scores": ..., ...}}}}

Only `promote` ever writes it. Scores are kept per sample (packed: 50,000 scores of 0 or 1 are 8 kB), so that a later
run is compared pair by pair, as with FP32.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
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
from mpdeploy.gates.evidence import HARNESS_VERSION, Evidence, Place
from mpdeploy.gates.gate import decide
from mpdeploy.gates.metrics import METRICS
from mpdeploy.gates.verdict import Verdict
from mpdeploy.run_dir import RunDir

SCHEMA_VERSION = 1
BASELINE_GATES: tuple[Gate, ...] = (
    Gate(id="baseline-accuracy", metric="score_drop", limit=0.02),
    Gate(id="baseline-latency", metric="latency_ratio", limit=1.1, advisory=True),
    Gate(id="baseline-size", metric="size_ratio", limit=1.1),
)
"""What a run is held to against its baseline where the caller names no gates.

Latency is advisory: the two sides were not measured in turns, so what else the machine did is part of the ratio."""

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
    entries = {
        at: _entry_of(place, evidence, reason.strip(), run_dir.path.name)
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


def compare(evidence: Evidence, path: Path, gates: Iterable[Gate] = BASELINE_GATES) -> list[Verdict]:
    """Verdicts of this run's engines against the baseline of the same hardware.

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
    places = {at: _against(place, entries[at], evidence, path) for at, place in measured.items()}
    # A gate on what neither side has (scores, without labels) does not concern them; what one side lacks fails below.
    wanted = [gate for gate in gates if any(METRICS[gate.metric].find(place, gate.limit) for place in places.values())]
    if not wanted:
        raise NotComparableError(f"{path} and this run have no number in common that a gate asks for.", hint=_PROMOTE)
    verdicts = decide(wanted, Evidence(places, evidence.digests, evidence.environment))
    return [
        verdict if verdict.id.startswith("baseline") else replace(verdict, id=f"baseline-{verdict.id}")
        for verdict in verdicts
    ]


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
            entry[name] = _packed(place.arrays[array])
    if "latency_b_ms" in place.arrays:
        entry["median_ms"] = float(np.median(place.arrays["latency_b_ms"]))
        entry["latency_block_size"] = place.facts.get("latency_block_size")
        entry["latency_includes"] = place.facts.get("latency_includes_b")
    if "scores" in place.arrays:
        entry["mean_score"] = float(np.mean(place.arrays["scores"]))
    if "size_bytes" in place.facts:
        entry["size_bytes"] = place.facts["size_bytes"]
    return entry


def _against(place: Place, entry: Mapping[str, Any], evidence: Evidence, path: Path) -> Place:
    """The place of this run, with the baseline file's numbers where FP32's were."""
    arrays = {name: place.arrays[name] for name in ("ids", "scores", "predictions", "clusters") if name in place.arrays}
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
            arrays[f"baseline_{name}"] = _unpacked(entry[name], path)
    facts = {name: place.facts[name] for name in ("size_bytes",) if name in place.facts}
    if "size_bytes" in entry:
        facts["baseline_size_bytes"] = entry["size_bytes"]
    if "latency_ms" in entry:
        arrays["latency_a_ms"] = _unpacked(entry["latency_ms"], path)
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


def _packed(array: Array) -> dict[str, Any]:
    """An array as compressed text; 0/1 values take one bit."""
    array = np.asarray(array)
    is_bits = array.ndim == 1 and bool(((array == 0) | (array == 1)).all())
    if np.issubdtype(array.dtype, np.integer) and len(array):
        array = array.astype(np.result_type(np.min_scalar_type(array.min()), np.min_scalar_type(array.max())))
    content = np.packbits(array.astype(bool)).tobytes() if is_bits else np.ascontiguousarray(array).tobytes()
    return {
        "dtype": "bits" if is_bits else array.dtype.str,
        "shape": list(array.shape),
        "data": base64.b64encode(zlib.compress(content, 9)).decode("ascii"),
    }


def _unpacked(value: Mapping[str, Any], path: Path) -> Array:
    try:
        content = zlib.decompress(base64.b64decode(value["data"], validate=True))
        shape = tuple(int(length) for length in value["shape"])
        if value["dtype"] == "bits":
            return np.unpackbits(np.frombuffer(content, dtype=np.uint8), count=shape[0]).astype(np.float64)
        return np.frombuffer(content, dtype=np.dtype(value["dtype"])).reshape(shape).copy()
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise NotComparableError(
            f"The baseline file {path} cannot be read: {error}.", hint="restore it from git"
        ) from error
