"""Does the evidence belong to this run? Numbers of other artifacts, samples or labels are refused (exit 12)."""

from __future__ import annotations

from mpdeploy.artifact import FileArtifact
from mpdeploy.errors import ArtifactChangedError, NotComparableError
from mpdeploy.files import sha256_of_file
from mpdeploy.gates.evidence import INDEX, Evidence
from mpdeploy.run_dir import RunDir

_MEASURE_AGAIN = "measure again with --from 50-validate"


def check_provenance(evidence: Evidence, run_dir: RunDir) -> None:
    """Refuse evidence that does not match the run's records: other engines, models, samples or labels, an edited index.

    Only digests that both sides hold are compared, so that evidence and run.json alone are enough; files are read where
    they are still there.

    Raises:
        NotComparableError: with what differs, and the two digests.
    """
    records = run_dir.records()
    artifacts = {
        (stage, name): artifact for stage, record in records.items() for name, artifact in record.artifacts.items()
    }
    for artifact in artifacts.values():
        if artifact.path.name == INDEX:
            _check_index(artifact)
    for name, digest in evidence.digests.items():
        for (stage, artifact_name), artifact in artifacts.items():
            if artifact_name == name and artifact.sha256 != digest:
                raise NotComparableError(
                    f"The evidence was measured with another '{name}': {digest[:12]}, "
                    f"while {stage} holds {artifact.sha256[:12]}.",
                    hint=_MEASURE_AGAIN,
                )
            if artifact_name == name and artifact.path.is_file() and sha256_of_file(artifact.path) != digest:
                raise NotComparableError(
                    f"{artifact.path} is not the file that the evidence was measured with: "
                    "samples, labels or answers changed.",
                    hint=f"put the recorded file back, or {_MEASURE_AGAIN}",
                )
    for place in evidence.places.values():
        measured, record = place.digests.get("artifact"), records.get(place.stage)
        if measured is None or record is None or not record.artifacts:
            continue
        held = {artifact.sha256 for artifact in record.artifacts.values()}
        if measured not in held:
            raise NotComparableError(
                f"The evidence of `{place.at}` is stale: it was measured on an artifact with digest {measured[:12]}, "
                f"and {place.stage} now holds {', '.join(sorted(digest[:12] for digest in held))}.",
                hint=_MEASURE_AGAIN,
            )


def _check_index(artifact: FileArtifact) -> None:
    try:
        artifact.verified()
    except ArtifactChangedError as error:
        raise NotComparableError(
            f"The evidence's index is not the one that was recorded: {error.message}",
            hint=f"restore it, or {_MEASURE_AGAIN}",
        ) from error
