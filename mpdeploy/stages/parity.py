"""Paired seeds: trained in 10-train as far as `train.parity` asks for, kept there, and shown to the gates as the place `parity/seeds`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpdeploy.artifact import Array, Dataset, FileArtifact
from mpdeploy.config import Gate
from mpdeploy.files import atomic_path
from mpdeploy.gates.evidence import Evidence, Place
from mpdeploy.gates.gate import TRAINING_BASELINE, decide
from mpdeploy.gates.parity import PREFIX
from mpdeploy.measure import accuracy
from mpdeploy.measure.equivalence import churn
from mpdeploy.pipeline import Context
from mpdeploy.stages.user_metrics import sample_groups

if TYPE_CHECKING:
    from torch import nn

    from mpdeploy.train.precision import PrecisionChoice
    from mpdeploy.train.splits import Splits

AT = "parity/seeds"
_DECIDING = ("parity_nll", "parity_nll_nats")


def parity_key(context: Context) -> dict[str, Any]:
    """What paired seeds rest on beside the training itself: the metric, clusters, and at tier 2 the margins that end the looking."""
    pipeline = context.pipeline
    if not pipeline.train.parity.tier:
        return {}
    validation = pipeline.validation.to_json()
    key: dict[str, Any] = {name: validation[name] for name in ("metric", "clusters")}
    if pipeline.train.parity.tier == 2:
        key["margins"] = [[gate.metric, gate.limit] for gate in _margins(pipeline.gates)]
    return key


def _margins(gates: Sequence[Gate]) -> list[Gate]:
    return [gate for gate in gates if gate.metric in _DECIDING]


def paired_seeds(
    context: Context, choice: PrecisionChoice, splits: Splits, key: str, amp: nn.Module, reference: nn.Module | None
) -> tuple[dict[str, FileArtifact], dict[str, Any]]:
    """Train pairs of seeds, at tier 2 until the held-out loss is decided: (artifacts, report). Empty at tier 0.

    Args:
        context: of 10-train.
        choice: AMP's precision.
        splits: the data; the calibration split is held out.
        key: of the training's states.
        amp: the model of `train.seed` in AMP.
        reference: the same in FP32, where it was trained.
    """
    from mpdeploy.train.parity import held_out_answers, train_pair

    config, looks = context.pipeline.train, context.pipeline.train.parity.looks
    if not looks:
        return {}, {"tier": 0}
    if choice.precision == "fp32":
        context.message("parity: training ran in fp32, which is its own reference")
        return {}, {"tier": config.parity.tier, "looks": list(looks), "same": True}
    samples = splits.calibration
    arrays: dict[str, Array] = {"ids": samples.ids}
    groups = sample_groups(context.pipeline.validation, samples)
    arrays |= {name: value for name, value in groups.items() if name == "clusters"}
    folder = context.run.folder("10-train") / "parity"
    verdicts: dict[str, str] = {}
    number = 0
    for count in looks:
        while number < count:
            if number == 0 and reference is not None:
                pair = reference, amp
            else:
                pair = train_pair(
                    config, choice, splits.train, splits.early_stopping, seed=config.seed + number, folder=folder,
                    state_key=key,
                    progress=lambda done, total, text, n=number: context.progress(  # type: ignore[misc]
                        done, total, f"paired seed {n + 1} of {looks[-1]}: {text}"
                    ),
                )  # fmt: skip
            for side, model in zip(("reference", "candidate"), pair, strict=True):
                answers = held_out_answers(config, choice.device, model, samples)
                for kind, row in _rows(context, answers.outputs, answers.nll, samples).items():
                    name = f"{PREFIX}{side}_{kind}"
                    arrays[name] = np.concatenate([arrays[name], row[None]]) if name in arrays else row[None]
            number += 1
        verdicts[str(count)] = _verdict(context, arrays, looks)
        if verdicts[str(count)] != "inconclusive":
            break
    path = context.run.folder("10-train") / "parity.npz"
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    report = {"tier": config.parity.tier, "looks": list(looks), "num_seeds": number, "verdict_at": verdicts}
    return {"parity": FileArtifact.of(path)}, report | summary(arrays)


def _rows(context: Context, outputs: Array, nll: Array, samples: Dataset) -> dict[str, Array]:
    """One model's numbers, [num_samples] each."""
    metric, named = context.pipeline.validation.metric, {context.pipeline.export.output_names[0]: outputs}
    rows = {"nll": nll, "scores": np.asarray(accuracy.score(metric, named, samples.labels), dtype=np.float64)}
    predicted = accuracy.predictions(metric, named)
    return rows if predicted is None or predicted.ndim != 1 else rows | {"predictions": predicted}


def _verdict(context: Context, arrays: Mapping[str, Array], looks: Sequence[int]) -> str:
    """The worst verdict of the gates on the held-out loss, with the seeds there are."""
    gates = _margins(context.pipeline.gates)
    if not gates:
        return "inconclusive"
    evidence = Evidence({AT: _place(arrays, {"parity_looks": list(looks)}, {}, {})}, {}, {})
    found = {verdict.verdict for verdict in decide([gate.model_copy(update={"at": AT}) for gate in gates], evidence)}
    return next(name for name in ("fail", "inconclusive", "pass") if name in found)


def summary(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Numbers for people: mean loss and score of each seed on both sides, spread over seeds, churn."""
    value: dict[str, Any] = {}
    for kind in ("nll", "scores"):
        sides = {side: arrays[f"{PREFIX}{side}_{kind}"].mean(axis=1) for side in ("reference", "candidate")}
        value[kind] = {
            "reference_by_seed": sides["reference"].tolist(),
            "candidate_by_seed": sides["candidate"].tolist(),
            "reference_spread": float(np.std(sides["reference"], ddof=1)),
            "difference": float((sides["candidate"] - sides["reference"]).mean()),
        }
    if f"{PREFIX}reference_predictions" in arrays:
        found = churn(arrays[f"{PREFIX}reference_predictions"], arrays[f"{PREFIX}candidate_predictions"], margin=1.0)
        value["churn"] = {"amp": found.pairs, "seeds": found.seeds, "num_flips": found.num_flips}
        value["churn"] |= {} if found.num_flips else {"flip_bound": found.flip_bound}
    return value


def _place(
    arrays: Mapping[str, Array], facts: Mapping[str, Any], digests: Mapping[str, str], notes: Mapping[str, Any]
) -> Place:
    return Place(
        AT, "fp32", "10-train", baseline=TRAINING_BASELINE, facts=facts, arrays=arrays, digests=digests, notes=notes
    )


def seeds_place(context: Context) -> list[Place]:
    """The place of the paired seeds, as evidence; none at tier 0."""
    record = context.run.record("10-train")
    found = record.report.get("parity", {}) if record is not None else {}
    if record is None or not found.get("looks"):
        return []
    notes = {
        "metric": accuracy.metric_name(context.pipeline.validation.metric),
        "trained_in": record.report["choice"]["precision"],
        "samples": "calibration split",
    }
    facts = {"parity_looks": found["looks"], "parity_tier": found["tier"]}
    if found.get("same"):
        return [_place({}, facts | {"parity_same": True}, {}, notes)]
    artifact = context.run.artifact("10-train", "parity")
    return [_place(_loaded(artifact.path), facts, {"artifact": artifact.sha256}, notes)]


def _loaded(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
