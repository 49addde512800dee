"""10-train: data -> the AMP model that ships, an FP32 reference to compare it with, and the ranges training saw."""

from __future__ import annotations

from typing import Any

from mpdeploy.artifact import Checkpoint, FileArtifact
from mpdeploy.environment import package_version
from mpdeploy.errors import DataError, MissingExtraError
from mpdeploy.files import digest_of_json, write_json
from mpdeploy.pipeline import Context, Outcome
from mpdeploy.stages.common import folder_digest, load_splits
from mpdeploy.stages.parity import paired_seeds, parity_key
from mpdeploy.stages.pruning import pruned
from mpdeploy.stages.together import train_together
from mpdeploy.user_code import user_call

NAME = "10-train"


class TrainStage:
    """See the module's docstring."""

    name = NAME
    isolated = False

    def key(self, context: Context) -> dict[str, Any]:
        """The data's and training's config and source, and torch's version; what comes after the training beside them."""
        train = context.pipeline.train
        after = {"parity": train.parity.to_json() | parity_key(context), "pruning": train.pruning.to_json()}
        return self._training_key(context) | after

    def _training_key(self, context: Context) -> dict[str, Any]:
        """What the training itself rests on: a change of anything else trains nothing anew."""
        pipeline = context.pipeline
        beside = {"monitor": None, "parity": None, "pruning": None}  # where numbers go changes none of them
        return {
            "data": pipeline.data.to_json(),
            "data_folder": folder_digest(pipeline.data.folder),
            "train": pipeline.train.to_json() | beside,
            "versions": {name: package_version(name) for name in ("torch", "scikit-learn", "mpdeploy")},
        }

    def run(self, context: Context) -> Outcome:
        """Train twice (AMP, and FP32 where `train.reference` asks for it), compare gradients, record ranges."""
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError.for_extra("torch", "train") from error
        from mpdeploy.train.health import ActivationRanges, compare_gradients
        from mpdeploy.train.loop import gradients, tensors_of
        from mpdeploy.train.precision import PrecisionChoice, autocast

        config, folder = context.pipeline.train, context.run.folder(NAME)
        splits = load_splits(context.pipeline)
        if splits.train.labels is None:
            raise DataError("The training split has no labels.")
        key = digest_of_json(self._training_key(context))
        choice = _choose(context, key, splits)
        context.message(f"{choice.precision} on {choice.device} ({choice.reason})")
        amp, reference = train_together(config, choice, splits, key=key, folder=folder, progress=context.progress)
        fp32 = PrecisionChoice("fp32", choice.device, "the reference", {})
        context.progress(0, 0, "comparing gradients")
        inputs, labels = tensors_of(splits.train.take(slice(0, config.batch_size)), choice.device)
        parities = [
            compare_gradients(expected, found)
            for expected, found in zip(
                gradients(config, fp32, (inputs, labels), steps=2),
                gradients(config, choice, (inputs, labels), steps=2),
                strict=True,
            )
        ]
        artifacts, parity = paired_seeds(
            context, choice, splits, key, amp.model, reference.model if reference else None
        )
        model, pruning = pruned(context, choice, splits, f"{key} {config.pruning.to_json()}", amp.model)
        ranges = ActivationRanges()
        with ranges.recording(model), torch.no_grad(), autocast(fp32):
            for feeds in splits.train.batches(256):
                model(*(torch.from_numpy(values).to(choice.device) for values in feeds.values()))
        artifacts |= _write(folder, model, reference, ranges.to_json(), choice)
        report = {
            "choice": choice.to_json(),
            "splits": splits.sizes(),
            "splits_sha256": splits.digest,
            **amp.to_json(),
            "reference_history": reference.history if reference else None,
            "reference_step_ms": _median(reference.step_ms) if reference else None,
            "reference_memory": reference.memory if reference else None,
            "gradient_parity": [found.to_json() for found in parities],
            "excess_zero_gradients": max(found.worst_excess_zeros for found in parities),
            "parity": parity,
            "pruning": pruning,
        }
        write_json(folder / "health.json", report)
        report["health"] = {name: value for name, value in amp.health.items() if not name.endswith("_exponents")}
        return Outcome(artifacts, report)


def _choose(context: Context, key: str, splits: Any) -> Any:
    """The precision: what an earlier, interrupted try wrote down, else chosen now and written down before the first step."""
    from mpdeploy.train.feeding import tensors_of
    from mpdeploy.train.modules import loss_of, make_model, prepared
    from mpdeploy.train.precision import PrecisionChoice, autocast, choose_precision, pick_device

    config, path = context.pipeline.train, context.run.folder(NAME) / "precision.json"
    kept = _read_choice(path, key)
    if kept is not None:
        return PrecisionChoice(**kept)
    device = pick_device(config)
    inputs, labels = tensors_of(splits.train.take(slice(0, config.batch_size)), device)
    model, loss = make_model(config, device), loss_of(config)

    def step(precision: str) -> None:
        with prepared(model, config), autocast(PrecisionChoice(precision, device, "", {})):
            outputs = user_call(model, *inputs)
        user_call(loss, outputs.float(), labels).backward()

    choice = choose_precision(config, device, step)
    write_json(path, {"key": key, "choice": choice.to_json()})
    return choice


def _read_choice(path: Any, key: str) -> dict[str, Any] | None:
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found["choice"] if found.get("key") == key else None


def _write(folder: Any, model: Any, reference: Any, amax: dict[str, float], choice: Any) -> dict[str, FileArtifact]:
    from mpdeploy.train.checkpoint import save_weights

    save_weights(model, folder / "model.safetensors", metadata={"precision": choice.precision})
    write_json(folder / "amax.json", {"source": "training split, FP32 forward of the shipped weights", "modules": amax})
    artifacts: dict[str, FileArtifact] = {
        "model": Checkpoint.of(folder / "model.safetensors", sidecar={"trained_in": choice.precision}),
        "amax": FileArtifact.of(folder / "amax.json"),
    }
    if reference is not None:
        save_weights(reference.model, folder / "reference.safetensors", metadata={"precision": "fp32"})
        artifacts["reference"] = Checkpoint.of(folder / "reference.safetensors", sidecar={"trained_in": "fp32"})
    return artifacts


def _median(values: list[float]) -> float | None:
    import statistics

    return round(statistics.median(values), 4) if values else None
