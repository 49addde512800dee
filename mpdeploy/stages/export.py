"""20-export: the checkpoint -> FP32 ONNX, checked against torch at several sizes; and the golden answers, written once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpdeploy.artifact import FileArtifact, Golden, OnnxModel
from mpdeploy.environment import package_version
from mpdeploy.errors import StageFailedError
from mpdeploy.files import write_json
from mpdeploy.pipeline import Context, Outcome
from mpdeploy.stages.common import folder_digest, load_splits
from mpdeploy.user_code import describe_callable

if TYPE_CHECKING:
    from mpdeploy.train.splits import Splits

NAME = "20-export"


class ExportStage:
    """See the module's docstring."""

    name = NAME
    isolated = False

    def key(self, context: Context) -> dict[str, Any]:
        """The checkpoints, the model's source, the data and the export's config."""
        pipeline = context.pipeline
        trained = context.run.record("10-train")
        return {
            "checkpoints": {name: item.sha256 for name, item in trained.artifacts.items()} if trained else {},
            "model": describe_callable(pipeline.train.model),
            "data": pipeline.data.to_json(),
            "data_folder": folder_digest(pipeline.data.folder),
            "export": pipeline.export.to_json(),
            "versions": {
                name: package_version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime", "mpdeploy")
            },
        }

    def run(self, context: Context) -> Outcome:
        """Export, check, and write the golden answers."""
        from mpdeploy.export.handover import tensors_from_modules
        from mpdeploy.export.to_onnx import answers_of, check_parity, export_onnx
        from mpdeploy.precision.model_io import input_specs, load_model, output_specs
        from mpdeploy.train.checkpoint import load_weights
        from mpdeploy.train.loop import make_model

        config, folder = context.pipeline.export, context.run.folder(NAME)
        splits = load_splits(context.pipeline)
        _refuse_other_data(context, splits)
        train_config = context.pipeline.train.model_copy(update={"channels_last": False})

        def loaded(artifact: str) -> Any:
            model = make_model(train_config, "cpu")
            load_weights(model, context.run.artifact("10-train", artifact).path)
            return model.eval()

        model, names = loaded("model"), config.output_names
        context.progress(1, 4, "torch.onnx.export")
        path = folder / "model.fp32.onnx"
        samples = {name: array[:16] for name, array in splits.calibration.inputs.items()}
        notes = export_onnx(model, samples, path, opset=config.opset, output_names=names)
        for note in (*splits.notes, *notes):
            context.message(note)
        context.progress(2, 4, "checking against torch")
        parity = check_parity(model, path, samples, names, rtol=config.parity_rtol)
        context.progress(3, 4, "golden answers")
        gate = splits.gate
        Golden(gate, answers_of(model, dict(gate.inputs), names)).save(folder / "golden.npz")
        artifacts: dict[str, FileArtifact] = {"golden": FileArtifact.of(folder / "golden.npz")}
        trained = context.run.record("10-train")
        if trained is not None and "reference" in trained.artifacts:
            reference = answers_of(loaded("reference"), dict(gate.inputs), names)
            Golden(gate, reference).save(folder / "fp32_reference.npz")
            artifacts["fp32_reference"] = FileArtifact.of(folder / "fp32_reference.npz")
        handover = tensors_from_modules(path, _amax(context.run.artifact("10-train", "amax").path))
        write_json(folder / "amax.json", handover.to_json())
        graph = load_model(path)
        sidecar = {"precision": "fp32", "opset": config.opset, "made_by": "torch.onnx.export(dynamo=True)"}
        artifacts["model"] = OnnxModel.of(path, inputs=input_specs(graph), outputs=output_specs(graph), sidecar=sidecar)
        artifacts["amax"] = FileArtifact.of(folder / "amax.json")
        report = {
            "parity_rel_l2": parity,
            "golden_samples": len(gate),
            "amax_unmapped": list(handover.unmapped),
            "data": {"source": splits.source, "classes": list(splits.classes), "notes": list(splits.notes)},
            "notes": list(notes),
        }
        return Outcome(artifacts, report)


def _refuse_other_data(context: Context, splits: Splits) -> None:
    """The samples must be those that were trained on: else the gate's may be among the training ones.

    Raises:
        StageFailedError: they are others, for example those of another Python's library.
    """
    trained = context.run.record("10-train")
    recorded = trained.report.get("splits_sha256") if trained is not None else None
    if recorded is not None and recorded != splits.digest:
        raise StageFailedError(
            f"data.load gives other samples than in 10-train: sha256 {splits.digest[:12]}, recorded was {str(recorded)[:12]}.",
            hint="make it depend on its config alone, or train again with --from 10-train",
        )


def _amax(path: Path) -> dict[str, float]:
    return {name: float(value) for name, value in json.loads(path.read_text(encoding="utf-8"))["modules"].items()}
