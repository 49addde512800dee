"""The five stages of `train-and-export`, one file each, and the list of them."""

from __future__ import annotations

from collections.abc import Sequence

from mpdeploy.config import Pipeline
from mpdeploy.pipeline import Stage


def stages_of(pipeline: Pipeline, engines: Sequence[str]) -> list[Stage]:
    """All stages of a pipeline that builds these engines, in order."""
    from mpdeploy.stages.build import BuildStage
    from mpdeploy.stages.convert import ConvertStage
    from mpdeploy.stages.export import ExportStage
    from mpdeploy.stages.train import TrainStage
    from mpdeploy.stages.validate import ValidateStage

    asked = bool(pipeline.build.engines)
    return [
        TrainStage(),
        ExportStage(),
        ConvertStage(tuple(engines)),
        *(BuildStage(engine, asked_for=asked) for engine in engines),
        ValidateStage(tuple(engines)),
    ]
