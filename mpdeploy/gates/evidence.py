"""Evidence: per-sample numbers and raw latencies of every place that was measured, enough to decide the gates again.

evidence/index.json         what was measured where, with the digest of each file, of the data, models and harness
evidence/samples.json       texts of the samples that changed most, where the pipeline's describe_samples gives them
evidence/PLACE.npz          one file a place ('engine/openvino' -> engine-openvino.npz):
    ids                     [n]  sample ids
    scores, baseline_scores [n]  the task metric for each sample, here and where it is compared with
    predictions, baseline_predictions  [n]  (where the metric predicts classes)
    margins, baseline_margins  [n]  the largest score less the second largest, where it does
    drift/OUTPUT/FIELD      [n]  fields of `measure.drift.OutputDrift`
    latency_a_ms, latency_b_ms   [m] the baseline's and this place's raw latencies, interleaved in blocks of equal size
    clusters                [n]  samples with equal numbers are not independent
    slice/NAME              [n]  whether a sample belongs to the named slice
    corpus_draws, baseline_corpus_draws  [b]  a corpus metric on resamples of the samples, the same ones on both sides
    corpus_left_out, baseline_corpus_left_out  [g]  the same without each of g groups of samples
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import Array
from mpdeploy.errors import NotComparableError
from mpdeploy.files import atomic_path, sha256_of_file, write_json
from mpdeploy.measure.drift import SAMPLE_FIELDS, DriftReport, OutputDrift

INDEX = "index.json"
SAMPLES = "samples.json"
SLICE = "slice/"
SAMPLE_ARRAYS = ("ids", "scores", "baseline_scores", "predictions", "baseline_predictions", "margins", "baseline_margins",
                 "clusters")  # fmt: skip
HARNESS_VERSION = 1
"""Raised whenever a number that is measured changes its meaning: older evidence is then not comparable."""


@dataclass(frozen=True)
class Place:
    """What was measured at one place: `parity`, `onnx`, `emulated/fp16`, `engine/openvino`, ...

    Attributes:
        at: the place's name.
        precision: of the model that ran there: fp32, fp16 or bf16.
        stage: the stage whose artifact it is.
        baseline: the place it is compared with: `golden` or `fp32-reference`.
        status: `measured`, or `unvalidated` where it was built here and could not be run here (its gates cannot pass).
        facts: single numbers and lists that gates read: `excess_zero_gradients`, `kept_in_half`, `size_bytes`, ...
        arrays: see the module's docstring.
        digests: of the model or engine (`artifact`), of what it was made from (`source`).
        notes: what a reader needs: what a latency includes, why it is unvalidated.
        slice: the named slice that this part of a place is; empty for the whole place.
    """

    at: str
    precision: str
    stage: str
    baseline: str = "golden"
    status: str = "measured"
    facts: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    slice: str = ""

    @property
    def slices(self) -> list[str]:
        """Names of its slices."""
        return sorted(name.removeprefix(SLICE) for name in self.arrays if name.startswith(SLICE))

    def sliced(self, name: str) -> Place:
        """The part of it that a slice is: every array that has one row a sample, of the slice's samples alone.

        Facts, latencies and corpus draws are of the whole place and are left out.

        Raises:
            KeyError: there is no such slice.
        """
        mask = np.asarray(self.arrays[SLICE + name]).astype(bool)
        arrays = {
            key: array[mask]
            for key, array in self.arrays.items()
            if (key in SAMPLE_ARRAYS or key.startswith("drift/")) and len(array) == len(mask)
        }
        return replace(self, facts={}, arrays=arrays, slice=name)

    @property
    def drift(self) -> DriftReport | None:
        """The drift that was measured here, put together from its per-sample numbers."""
        names = sorted({key.split("/", 1)[1].rsplit("/", 1)[0] for key in self.arrays if key.startswith("drift/")})
        if not names:
            return None
        return DriftReport(
            {name: OutputDrift(*(self.arrays[f"drift/{name}/{item}"] for item in SAMPLE_FIELDS)) for name in names}
        )


def arrays_of_drift(report: DriftReport) -> dict[str, Array]:
    """A drift report as a place's arrays."""
    return {
        f"drift/{name}/{item}": getattr(output, item)
        for name, output in report.outputs.items()
        for item in SAMPLE_FIELDS
    }


@dataclass(frozen=True)
class Evidence:
    """All places of a run, and what they were measured with.

    Attributes:
        places: by name, in the order of the flow.
        digests: `dataset`, `golden`, ... : sha256.
        environment: hardware and versions, see `mpdeploy.environment.fingerprint`.
    """

    places: Mapping[str, Place]
    digests: Mapping[str, str]
    environment: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Write every place and then the index, each atomically: an index never names a file that is not whole."""
        index: dict[str, Any] = {
            "schema": 1,
            "harness": HARNESS_VERSION,
            "digests": dict(self.digests),
            "environment": dict(self.environment),
            "places": {},
        }
        for place in self.places.values():
            path = folder / f"{place.at.replace('/', '-')}.npz"
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **dict(place.arrays))
            index["places"][place.at] = {
                "file": path.name,
                "sha256": sha256_of_file(path),
                "precision": place.precision,
                "stage": place.stage,
                "baseline": place.baseline,
                "status": place.status,
                "facts": dict(place.facts),
                "digests": dict(place.digests),
                "notes": dict(place.notes),
            }
        write_json(folder / INDEX, index)

    @classmethod
    def load(cls, folder: Path) -> Evidence:
        """Read what `save` wrote, checking the digest of every file.

        Raises:
            NotComparableError: no evidence, a file changed or missing, or written by another harness.
        """
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            harness, listed = index["harness"], dict(index["places"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NotComparableError(
                f"There is no readable evidence in {folder}: {error}.", hint="run the stage 50-validate to measure it"
            ) from error
        if harness != HARNESS_VERSION:
            raise NotComparableError(
                f"The evidence in {folder} was measured by harness {harness}; this one is {HARNESS_VERSION}.",
                hint="measure again with --from 50-validate",
            )
        try:
            places = dict(_places(folder, listed))
            return cls(places, dict(index["digests"]), dict(index["environment"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise NotComparableError(
                f"The evidence in {folder} is malformed: {type(error).__name__}: {error}.",
                hint="restore it, or measure again with --from 50-validate",
            ) from error


def _places(folder: Path, listed: Mapping[str, Any]) -> Iterator[tuple[str, Place]]:
    for at, entry in listed.items():
        if entry["status"] not in ("measured", "unvalidated"):
            raise ValueError(f"'{at}' has the status '{entry['status']}'")
        path = folder / Path(entry["file"]).name
        found = sha256_of_file(path) if path.is_file() else "missing"
        if found != entry["sha256"]:
            raise NotComparableError(
                f"The evidence file {path} is not the one that was measured: "
                f"sha256 {found[:12]}, recorded was {entry['sha256'][:12]}.",
                hint="restore it, or measure again with --from 50-validate",
            )
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        yield (
            at,
            Place(
                at=at,
                precision=entry["precision"],
                stage=entry["stage"],
                baseline=entry["baseline"],
                status=entry["status"],
                facts=entry["facts"],
                arrays=arrays,
                digests=entry["digests"],
                notes=entry["notes"],
            ),
        )
