"""40-build/ENGINE: the model in the precision that the engine takes here -> an engine, audited against the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpdeploy.artifact import FileArtifact, OnnxModel
from mpdeploy.engines import backend
from mpdeploy.engines.accounting import HALF, audit_report
from mpdeploy.engines.isolation import BuildRequest, build_isolated
from mpdeploy.environment import package_version
from mpdeploy.errors import UnavailableError
from mpdeploy.pipeline import Context, Outcome
from mpdeploy.stages.common import profile_of

__all__ = ["BuildStage", "audit_report"]
PACKAGES = (
    "mpdeploy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13", "tensorrt-rtx-cu13-bindings",
)  # fmt: skip


class BuildStage:
    """See the module's docstring."""

    def __init__(self, engine: str, *, asked_for: bool) -> None:
        self.engine = engine
        self.name = f"40-build/{engine}"
        self.isolated = True
        self._asked_for = asked_for

    def _source(self, context: Context) -> tuple[str, OnnxModel | None]:
        precision = backend(self.engine).takes()
        stage, name = ("20-export", "model") if precision == "fp32" else ("30-convert", precision)
        record = context.run.record(stage)
        found = record.artifacts.get(name) if record else None
        return precision, found if isinstance(found, OnnxModel) else None

    def _options(self, context: Context) -> dict[str, Any]:
        given = context.pipeline.build.options.get(self.engine, {})
        trained = context.run.record("10-train")
        pruning = trained.report.get("pruning") if trained else None
        if self.engine.startswith("tensorrt") and pruning and pruning.get("sparse_2_4"):
            given = {"sparse_weights": True, **given}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    def key(self, context: Context) -> dict[str, Any]:
        """The model, the build's config and the library's version, or why it is not available."""
        missing = backend(self.engine).available()
        if missing is not None:
            return {"unavailable": missing.reason}
        precision, model = self._source(context)
        exported = context.run.record("20-export")
        return {
            "precision": precision,
            "model": model.sha256 if model else None,
            "profile": [list(context.pipeline.build.profile), context.pipeline.build.shortest],
            "golden": exported.artifacts["golden"].sha256 if exported and "golden" in exported.artifacts else None,
            "options": self._options(context),
            "versions": {
                name: found for name in PACKAGES if (found := package_version(name)) and _concerns(self.engine, name)
            },
        }

    def run(self, context: Context) -> Outcome:
        """Build and audit."""
        engine_backend = backend(self.engine)
        missing = engine_backend.available()
        if missing is not None:
            if self._asked_for:
                raise UnavailableError(f"The engine '{self.engine}' was asked for: {missing.reason}", hint=missing.hint)
            return Outcome(status="unavailable", message=missing.reason, hint=missing.hint)
        engine_backend.check_options(self._options(context))
        precision, _ = self._source(context)
        stage, name = ("20-export", "model") if precision == "fp32" else ("30-convert", precision)
        model = context.run.artifact(stage, name)
        assert isinstance(model, OnnxModel)
        folder = context.run.folder(self.name)
        context.progress(0, 0, f"building from the {precision} model")
        profile = profile_of(context, model)
        engine = build_isolated(
            BuildRequest(self.engine, model, profile, self._options(context), folder),
            lambda phase, done, total: context.progress(done, total, phase),
        )
        audit = engine_backend.audit(engine)
        plan_record = context.run.record("30-convert")
        plan = {}
        if precision in HALF and plan_record is not None:
            plan = json.loads(context.run.artifact("30-convert", f"plan.{precision}").path.read_text(encoding="utf-8"))
        cannot_run = engine_backend.can_run()
        report = {
            "precision": precision,
            "audit": audit_report(audit, plan, _makers_of_outputs(model.path)),
            "bytes": sum(file.stat().st_size for file in folder.glob("engine.*") if file.suffix != ".json"),
            "cannot_run_here": None if cannot_run is None else {"reason": cannot_run.reason, "hint": cannot_run.hint},
        }
        artifacts: dict[str, FileArtifact] = {"engine": engine, "sidecar": FileArtifact.of(folder / "engine.json")}
        return Outcome(artifacts, report)


def _concerns(engine: str, package: str) -> bool:
    return package == "mpdeploy" or package.split("-cu13")[0].removesuffix("-gpu") == engine


def _makers_of_outputs(model: Path) -> dict[str, str]:
    """Graph output -> id of the node that makes it."""
    import onnx_ir as ir

    from mpdeploy.precision.graph_index import GraphIndex

    index = GraphIndex.of(ir.load(model))
    return {
        value.name or "": node_id
        for node_id, node in index.nodes.items()
        for value in node.outputs
        if value.is_graph_output()
    }
