"""30-convert: the FP32 model -> one mixed model a half precision that an engine here takes, with a reason for every kept node."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.artifact import FileArtifact, OnnxModel
from mpdeploy.data_files import FeedSet
from mpdeploy.engines import backend
from mpdeploy.environment import package_version
from mpdeploy.files import write_json
from mpdeploy.pipeline import Context, Outcome
from mpdeploy.precision.formats import HalfName
from mpdeploy.stages.common import folder_digest, load_splits

NAME = "30-convert"


class ConvertStage:
    """See the module's docstring."""

    name = NAME
    isolated = False

    def __init__(self, engines: tuple[str, ...]) -> None:
        self._engines = engines

    def precisions(self, context: Context) -> tuple[HalfName, ...]:
        """FP16 always, and BF16 where an engine here takes it; or what the config says."""
        if context.pipeline.convert.precisions:
            return context.pipeline.convert.precisions
        bf16 = any(backend(name).available() is None and backend(name).takes() == "bf16" for name in self._engines)
        return ("fp16", "bf16") if bf16 else ("fp16",)

    def key(self, context: Context) -> dict[str, Any]:
        """The FP32 model, training's ranges, the calibration data and the conversion's config."""
        pipeline = context.pipeline
        exported = context.run.record("20-export")
        return {
            "inputs": {name: exported.artifacts[name].sha256 for name in ("model", "amax")}
            if exported and exported.artifacts
            else {},
            "data": pipeline.data.to_json(),
            "data_folder": folder_digest(pipeline.data.folder),
            "fp32_modules": list(_fp32_modules(context)),
            "convert": pipeline.convert.to_json(),
            "precisions": list(self.precisions(context)),
            "versions": {name: package_version(name) for name in ("onnx", "onnx-ir", "onnxruntime", "mpdeploy")},
        }

    def run(self, context: Context) -> Outcome:
        """Convert to each precision; drift is emulated on the calibration samples (the gate's are seen by gates alone)."""
        from mpdeploy.conversion import convert, write_plan
        from mpdeploy.precision.model_io import input_specs, load_model, output_specs

        folder, config = context.run.folder(NAME), context.pipeline.convert
        model = context.run.artifact("20-export", "model")
        handed = json.loads(context.run.artifact("20-export", "amax").path.read_text(encoding="utf-8"))
        keep = _with_fp32_modules(context, config.keep, model.path)
        calibration = load_splits(context.pipeline).calibration.take(slice(0, config.calibration_samples))
        feeds = FeedSet(
            tuple(
                {name: np.ascontiguousarray(array) for name, array in feed.items()} for feed in calibration.batches(16)
            ),
            model.inputs,
            frozenset(model.inputs[i].name for i in range(len(model.inputs))),
        )
        artifacts: dict[str, FileArtifact] = {}
        report: dict[str, Any] = {"calibration_samples": len(calibration), "calibration_sha256": calibration.digest}
        precisions = self.precisions(context)
        for number, precision in enumerate(precisions):
            path = folder / f"model.{precision}.onnx"
            done = convert(
                model.path, data=feeds, keep=keep, precision=precision, keep_io=True, output=path,
                amax=handed["tensors"], amax_modules=handed.get("modules", {}),
                progress=lambda text, n=number, p=precision: context.progress(n, len(precisions), f"{p}: {text}"),  # type: ignore[misc]
            )  # fmt: skip
            write_plan(folder / f"plan.{precision}.json", done)
            for warning in done.warnings:
                context.message(warning)
            graph = load_model(path)
            artifacts[precision] = OnnxModel.of(
                path, inputs=input_specs(graph), outputs=output_specs(graph), sidecar={"precision": precision}
            )
            artifacts[f"plan.{precision}"] = FileArtifact.of(folder / f"plan.{precision}.json")
            report[precision] = {
                key: value for key, value in done.to_json().items() if key not in ("output", "seconds")
            }
        return Outcome(artifacts, report)


def _fp32_modules(context: Context) -> Sequence[str]:
    """Modules that stayed FP32 in training."""
    trained = context.run.record("10-train")
    return trained.report.get("fp32_modules", ()) if trained is not None else ()


def _with_fp32_modules(context: Context, keep: Sequence[str], model: Path) -> list[str]:
    """The user's keep-list, and a file of the nodes that training kept in FP32: half there was never tried."""
    from mpdeploy.export.handover import keep_file_json, nodes_from_modules

    modules = _fp32_modules(context)
    if not modules:
        return list(keep)
    found = nodes_from_modules(model, modules)
    for module in found.unmapped:
        context.message(f"fp32_modules: '{module}' has no node in the exported graph")
    path = context.run.folder(NAME) / "fp32_modules.json"
    write_json(path, keep_file_json(found))
    return [*keep, f"@{path}"] if found.nodes else list(keep)
