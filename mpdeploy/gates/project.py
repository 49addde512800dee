"""Gates of a project that only converts: the `[gates]` of an `mpdeploy.toml`, decided on one model's drift.

[gates]
max_rel_l2 = 1e-2            # max_METRIC or min_METRIC = LIMIT
min_cosine = 0.9999
max_num_kept = 40

[gates.outliers]             # or a gate with all its fields, as in a pipeline file
metric = "worst_sample_rel_l2"
limit = 0.05
advisory = true
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpdeploy.config import Gate
from mpdeploy.errors import ConfigError, GateFailedError, closest_names
from mpdeploy.gates.evidence import Evidence, Place, arrays_of_drift
from mpdeploy.gates.gate import decide
from mpdeploy.gates.metrics import METRICS
from mpdeploy.gates.verdict import Verdict, VerdictName, overall
from mpdeploy.measure.drift import DriftReport

PROJECT_FILE = "mpdeploy.toml"
MODEL_METRICS = (
    "num_nonfinite", "rel_l2", "worst_sample_rel_l2", "max_abs", "cosine", "num_kept", "size_bytes", "size_ratio",
)  # fmt: skip
"""What is known of a model that was only converted or compared."""
_FACTS = ("num_kept", "size_bytes", "size_ratio")


@dataclass(frozen=True)
class ProjectGates:
    """The gates of a project file, and where they were declared."""

    path: Path
    gates: tuple[Gate, ...]


def find_project_gates(start: Path) -> ProjectGates | None:
    """The gates of the nearest `mpdeploy.toml`: in `start` or the folders above it, up to the repository's root.

    None where there is no such file, or it declares no gates.

    Raises:
        ConfigError: the file is no TOML, or a gate in it does not validate; all faults at once.
    """
    for folder in [start.resolve(), *start.resolve().parents]:
        if (folder / PROJECT_FILE).is_file():
            gates = load_project_gates(folder / PROJECT_FILE)
            return ProjectGates(folder / PROJECT_FILE, gates) if gates else None
        if (folder / ".git").exists():
            return None
    return None


def load_project_gates(path: Path) -> tuple[Gate, ...]:
    """The gates that a project file declares.

    Raises:
        ConfigError: see `find_project_gates`.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    declared = document.get("gates", {})
    if not isinstance(declared, Mapping):
        raise ConfigError(f"{path}: 'gates' is no table.", hint="write [gates] and then max_rel_l2 = 1e-2")
    gates, faults = [], []
    for name, value in declared.items():
        try:
            gates.append(_gate(str(name), value))
        except (ValueError, TypeError) as error:  # pydantic's ValidationError is a ValueError
            faults.append(f"  gates.{name}: {_says(error)}")
    if faults:
        raise ConfigError(f"{path} does not validate:\n" + "\n".join(faults))
    return tuple(gates)


def decide_model(
    gates: Sequence[Gate],
    drift: DriftReport | None,
    *,
    at: str = "model",
    precision: str = "fp16",
    facts: Mapping[str, Any] | None = None,
) -> list[Verdict]:
    """Decide a project's gates on one model.

    Args:
        gates: of the project file.
        drift: against the FP32 model on the data given; None where there was no data: gates on it then fail.
        at: the place's name in messages.
        precision: of the model; gates for another precision do not apply.
        facts: `num_kept`, `size_bytes`, `size_ratio`, as far as known; gates on others are left out.
    """
    known = dict(facts or {})
    place = Place(
        at, precision, "convert", facts=known, arrays={} if drift is None else arrays_of_drift(drift),
    )  # fmt: skip
    applying = [
        gate for gate in gates if gate.metric not in _FACTS or gate.metric in known or gate.metric == "size_ratio"
    ]
    applying = [gate for gate in applying if gate.metric != "size_ratio" or "size_ratio" in known]
    return [verdict for verdict in decide(applying, Evidence({at: place}, {}, {})) if verdict.id != "measured"]


def project_gates_accept(start: Path, *, at: str) -> Callable[[DriftReport | None, str, Mapping[str, Any]], None]:
    """A function that raises where a model does not pass the gates of the nearest project file; it accepts all where there is none.

    Raises:
        ConfigError: see `find_project_gates`.
    """
    found = find_project_gates(start)

    def accept(drift: DriftReport | None, precision: str, facts: Mapping[str, Any]) -> None:
        if found is not None:
            raise_if_failed(decide_model(found.gates, drift, at=at, precision=precision, facts=facts), found.path)

    return accept


def raise_if_failed(verdicts: Sequence[Verdict], where: Path) -> VerdictName:
    """The overall verdict, `pass` where nothing was decided.

    Raises:
        GateFailedError: with the message of each gate that failed.
    """
    failed = [verdict.message for verdict in verdicts if verdict.verdict == "fail" and not verdict.advisory]
    if failed:
        raise GateFailedError(
            f"{len(failed)} gate{'s' if len(failed) != 1 else ''} of {where} failed:\n"
            + "\n".join(f"  {line}" for line in failed),
            hint="convert with --search, keep more nodes with --keep, or change the limit",
        )
    return overall(verdicts) if verdicts else "pass"


def _gate(name: str, value: Any) -> Gate:
    if isinstance(value, Mapping):
        gate = Gate(**{"id": name, **value})
        if gate.metric not in METRICS:
            raise ValueError(
                f"there is no metric '{gate.metric}'; closest names: {closest_names(gate.metric, METRICS)}"
            )
    else:
        side, _, metric = name.partition("_")
        if side not in ("max", "min") or metric not in METRICS:
            wanted = [f"{'min' if METRICS[each].limit_is == 'smallest' else 'max'}_{each}" for each in MODEL_METRICS]
            raise ValueError(f"write it as max_METRIC or min_METRIC; closest names: {closest_names(name, wanted)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"the limit must be a number, found {value!r}")
        if side != ("min" if METRICS[metric].limit_is == "smallest" else "max"):
            raise ValueError(f"the limit of {metric} is the {METRICS[metric].limit_is} value allowed, not a {side}")
        gate = Gate(id=name, metric=metric, limit=float(value))
    if gate.metric not in MODEL_METRICS:
        raise ValueError(
            f"{gate.metric} is not known of a converted model, only {', '.join(MODEL_METRICS)}; "
            "a pipeline file can gate on the others"
        )
    if gate.slice is not None or gate.at != "*":
        raise ValueError("'slice' and 'at' have no meaning for one model")
    return gate


def _says(error: Exception) -> str:
    listed = getattr(error, "errors", None)
    if listed is None:
        return str(error)
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'gate'}: {item['msg']}" for item in listed())
