"""Pruning as a part of 10-train: the dense model is fine-tuned with masks, and both are measured on held-out samples."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mpdeploy.measure import accuracy
from mpdeploy.pipeline import Context

if TYPE_CHECKING:
    from torch import nn

    from mpdeploy.train.precision import PrecisionChoice
    from mpdeploy.train.splits import Splits


def pruned(
    context: Context, choice: PrecisionChoice, splits: Splits, key: str, dense: nn.Module
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that ships and the report; the model itself and `{"method": "off"}` where nothing is to be pruned."""
    config = context.pipeline.train
    if config.pruning.method == "off":
        return dense, {"method": "off"}
    from mpdeploy.train.loop import train
    from mpdeploy.train.pruning import fine_tuning, is_2_4, masked_models, pruned_layers, remove_masks, sizes

    total = math.ceil(len(splits.train) / config.batch_size) * config.pruning.epochs
    with masked_models(config.pruning, total, lambda: copy.deepcopy(dense)) as masked:
        done = train(
            fine_tuning(config, masked), choice, splits.train, splits.early_stopping,
            state_path=context.run.folder("10-train") / "state.pruned.pt", state_key=f"{key} pruned",
            progress=lambda at, of, text: context.progress(at, of, f"pruning ({config.pruning.method}), {text}"),
        )  # fmt: skip
    sparse = remove_masks(done.model)
    layers = pruned_layers(sparse, config.pruning)
    before, after = (_measured(context, choice, splits, model) | sizes(model) for model in (dense, sparse))
    report: dict[str, Any] = {
        "method": config.pruning.method,
        "sparsity": config.pruning.sparsity,
        "dense": before,
        "pruned": after,
        "layers": {name: float((module.weight == 0).float().mean()) for name, module in layers.items()},
        "sparse_2_4": all(is_2_4(module.weight) for module in layers.values()),
        "measured_on": f"{len(splits.calibration)} samples of the calibration split",
    }
    context.message(
        f"pruned {100 * after['zeros']:.3g} % of the weights: score {before['score']:.4g} -> {after['score']:.4g} on "
        f"{report['measured_on']}; {before['gzip_bytes']:,} -> {after['gzip_bytes']:,} bytes gzipped "
        f"({after['dense_bytes']:,} dense)"
    )
    return sparse, report


def _measured(context: Context, choice: PrecisionChoice, splits: Splits, model: nn.Module) -> dict[str, float]:
    from mpdeploy.train.parity import held_out_answers

    samples = splits.calibration
    answers = held_out_answers(context.pipeline.train, choice.device, model, samples)
    named = {context.pipeline.export.output_names[0]: answers.outputs}
    scores = accuracy.score(context.pipeline.validation.metric, named, samples.labels)
    return {"loss": float(answers.nll.mean()), "score": float(np.mean(scores))}
