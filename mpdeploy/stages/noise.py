"""Noise floors: how far numbers move when nothing was changed, so that limits are derived and not guessed. And batch sweeps."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import Array, Dataset, Engine, OnnxModel, Runner
from mpdeploy.config import ValidationConfig
from mpdeploy.engines import backend
from mpdeploy.files import digest_of_json
from mpdeploy.measure.drift import DriftMeter
from mpdeploy.measure.latency import measure_one
from mpdeploy.pipeline import Context
from mpdeploy.stages.common import load_splits, profile_of

MAX_SAMPLES = 256
"""Noise of an engine is measured on so many samples at most."""
SWEEP_SAMPLES = 40
"""Timed calls at each batch of a sweep."""


def engine_noise(context: Context, engine: Engine, dataset: Dataset, config: ValidationConfig) -> dict[str, Any]:
    """Relative L2 drift of an engine against itself: run again, and built again from the same model.

    Returns:
        facts `noise_rerun_rel_l2`, `noise_rebuild_rel_l2`, as far as the config asks for them.
    """
    samples = dataset.take(slice(0, MAX_SAMPLES))
    if not config.noise_floors:
        return {}
    with backend(engine.backend).load(engine) as runner:
        first = list(_answers(runner, samples, config.batch_size))
        again = list(_answers(runner, samples, config.batch_size)) if "rerun" in config.noise_floors else None
    facts: dict[str, Any] = {} if again is None else {"noise_rerun_rel_l2": _drift(first, again)}
    if "rebuild" in config.noise_floors:
        stage, name = ("20-export", "model") if engine.precision == "fp32" else ("30-convert", engine.precision)
        model = context.run.artifact(stage, name)
        assert isinstance(model, OnnxModel)
        with tempfile.TemporaryDirectory(prefix="mpdeploy-rebuild-") as folder:
            profile = profile_of(context, model)
            options = context.pipeline.build.options.get(engine.backend, {})
            rebuilt = backend(engine.backend).build(model, profile, options, Path(folder))
            with backend(engine.backend).load(rebuilt) as runner:
                facts["noise_rebuild_rel_l2"] = _drift(first, list(_answers(runner, samples, config.batch_size)))
    return facts


def tf32_noise(context: Context, dataset: Dataset, config: ValidationConfig) -> dict[str, Any]:
    """Relative L2 drift of the trained model in TF32 against itself in FP32, on a GPU: what two good answers may differ by.

    Returns:
        `rel_l2`; or `missing`, the reason, where there is no GPU; nothing where the config does not ask for it.
    """
    if "tf32" not in config.noise_floors:
        return {}
    import torch

    if not torch.cuda.is_available():
        return {"missing": "TF32 is a mode of NVIDIA GPUs, and torch sees none here"}
    from mpdeploy.train.checkpoint import load_weights
    from mpdeploy.train.loop import make_model
    from mpdeploy.train.precision import PrecisionChoice, float32_arithmetic

    samples = dataset.take(slice(0, MAX_SAMPLES))
    model = make_model(context.pipeline.train, "cuda")
    load_weights(model, context.run.artifact("10-train", "model").path)
    model.eval()
    answers = []
    for precision in ("fp32", "tf32"):
        with float32_arithmetic(PrecisionChoice(precision, "cuda", "a noise floor", {})), torch.inference_mode():
            parts = [
                model(*(torch.from_numpy(np.ascontiguousarray(array)).cuda() for array in feeds.values()))
                for feeds in samples.batches(config.batch_size)
            ]
        answers.append([_named(part, context.pipeline.export.output_names) for part in parts])
    return {"rel_l2": _drift(*answers)}


def _named(answer: Any, names: Sequence[str]) -> dict[str, Array]:
    from mpdeploy.export.to_onnx import named_outputs

    return {name: value.float().cpu().numpy() for name, value in zip(names, named_outputs(answer, names), strict=True)}


def _answers(runner: Runner, samples: Dataset, batch_size: int) -> list[dict[str, Array]]:
    return [
        {name: np.asarray(value) for name, value in runner.infer(feeds).items()}
        for feeds in samples.batches(batch_size)
    ]


def _drift(first: Sequence[Mapping[str, Array]], second: Sequence[Mapping[str, Array]]) -> float:
    meter = DriftMeter()
    for one, other in zip(first, second, strict=True):
        meter.add(one, other)
    return meter.report().rel_l2


def seed_noise(
    context: Context, dataset: Dataset, scored_by: Callable[[Mapping[str, Array]], tuple[Array, Array | None]]
) -> dict[str, Any]:
    """How far seeds alone move the score: FP32 models trained with other seeds, on the gate's samples. Empty where not asked for.

    Returns:
        mean score of each seed, their spread, and the share of samples whose predicted class differs between two of them.
    """
    count = context.pipeline.validation.noise_floor_seeds
    if not count:
        return {}
    from mpdeploy.export.to_onnx import answers_of
    from mpdeploy.train.loop import train
    from mpdeploy.train.precision import PrecisionChoice, pick_device

    splits, config = load_splits(context.pipeline), context.pipeline.train
    device = pick_device(config)
    key = digest_of_json([config.to_json(), splits.digest])
    scores: dict[str, float] = {}
    predictions: list[Array] = []
    for number in range(1, count + 1):
        seed = config.seed + number
        done = train(
            config.model_copy(update={"seed": seed, "reference": False}),
            PrecisionChoice("fp32", device, "seed against seed", {}), splits.train, splits.early_stopping,
            state_path=context.run.folder(context.stage) / f"state.seed{seed}.pt", state_key=f"{key} {seed}",
            progress=lambda at, total, text, s=seed: context.progress(at, total, f"FP32 with seed {s}, {text}"),  # type: ignore[misc]
        )  # fmt: skip
        outputs = answers_of(done.model.cpu().eval(), dict(dataset.inputs), context.pipeline.export.output_names)
        found, predicted = scored_by(outputs)
        scores[str(seed)] = float(np.mean(found))
        if predicted is not None:
            predictions.append(predicted)
    pairs = [(one, other) for at, one in enumerate(predictions) for other in predictions[at + 1 :]]
    return {
        "scores": scores,
        "spread": statistics.stdev(scores.values()) if count > 1 else None,
        "flips_between_two": statistics.mean(float((one != other).mean()) for one, other in pairs) if pairs else None,
    }


def batch_sweep(runner: Runner, dataset: Dataset, batches: Sequence[int]) -> list[dict[str, float]]:
    """Latency and throughput of one runner at several batches, alone on the machine."""
    rows = []
    for batch in batches:
        feeds = {name: np.ascontiguousarray(array[:batch]) for name, array in dataset.inputs.items()}
        found = measure_one(runner, feeds, SWEEP_SAMPLES, max_warmup_s=2.0)
        rows.append({"batch": batch, "median_ms": found.median_ms, "throughput_per_s": found.throughput_per_s})
    return rows
